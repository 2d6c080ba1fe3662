"""Predictions: what a model says of every token or example of some text, and how far two models' are apart."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.data.pairs import source_and_target
from eckart.evals.windows import is_causal

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
    if split is None:
        ids, mask = ids.to(model.device), mask.to(model.device)
        # As in calibration, a mask that hides nothing is left out.
        output = model(input_ids=ids, attention_mask=None if bool(mask.all()) else mask.long())
    else:
        given, _, mask = source_and_target(model, ids, mask, split, sound)
        output = model(**given)
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
