"""Predictions: what a model says of every token or example of some text, and how far two models' are apart."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.data.pairs import arguments_of
from eckart.data.tokens import Rows, Tokens
from eckart.evals.windows import Specials, is_causal

# Predictions compared at a time, so that the tensors in between stay far smaller than the predictions themselves.
ROWS = 1024


def log_probabilities(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, split: int | None = None, sound: Tensor | None = None
) -> Float[Tensor, "predictions outcomes"]:
    """Float32, (predictions, outcomes): of every real token that something is predicted at, or of every example.

    Of a causal model, the next-token distributions at every real token that has a next; of a masked language model,
    the distribution at every real token; of a classifier, the one of each example; of an encoder-decoder, the
    distribution at every real token of the targets.

    Args:
        split, sound: of pairs, as `Rows` has them.

    Raises:
        ValueError: the model makes no predictions, or one is not finite.
    """
    rows = Rows(ids, mask, split, sound)
    output = model(**arguments_of(model, rows))
    mask = rows.mask_of(source=False).to(model.device)
    if "logits" not in output or output.logits.shape[-1] < 2:
        raise ValueError(
            f"{type(model).__name__} makes no predictions to compare; load the model with a language-modelling or "
            "classification head"
        )
    logits = output.logits
    if is_causal(model):
        logits = logits[:, :-1][mask[:, :-1] & mask[:, 1:]]
    elif logits.ndim == 3:
        logits = logits[mask]
    if not torch.isfinite(logits).all():
        raise ValueError("a prediction is not finite; the model is broken, or the cut is")
    return logits.float().log_softmax(-1)


def scored_of(tokens: Tokens, specials: Specials = ((), ())) -> slice:
    """Which tokens of every window are predicted, of pairs among the target's: the text, and no special tokens.

    The first token of a window that is no pair has none before it.
    """
    if tokens.split is None:
        return slice(1, tokens.ids.shape[1])
    return slice(len(specials[0]), tokens.ids.shape[1] - tokens.split - len(specials[1]))


def next_logits(
    model: PreTrainedModel, rows: Rows, scored: slice
) -> tuple[Float[Tensor, "rows scored vocabulary"], Int[Tensor, "rows scored"]]:
    """(float32 logits that predict the `scored_of` each window, those tokens), on the model's device."""
    logits = model(**arguments_of(model, rows)).logits
    before = int(rows.split is None)  # a decoder's logits stand at the token before; of pairs the shift is made already
    logits = logits[:, scored.start - before : scored.stop - before]
    return logits.float(), rows.ids[:, rows.split or 0 :][:, scored].to(model.device)


def summed_divergence(dense: Float[Tensor, "n outcomes"], other: Float[Tensor, "n outcomes"]) -> float:
    """Sum over predictions of KL(dense || other), in nats; both are log-probabilities. Summed in float64."""
    return sum(
        float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        for log_p, log_q in zip(dense.split(ROWS), other.split(ROWS), strict=True)
    )


def token_losses(
    logits: Float[Tensor, "rows length vocabulary"], targets: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows length"]:
    """-log p of each target, in nats.

    Every place's classes are next to each other in memory: over transposed logits, which `cross_entropy` takes too, a
    CPU's softmax over 49,152 classes is 5e-5 nats off in the mean.
    """
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)
