"""Divergence: how far a model's next-token distributions are from those of the dense model that it came from."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.encoding import check_vocabulary
from eckart.data.pairs import is_encoder_decoder
from eckart.data.tokens import Rows
from eckart.evals.means import mean_of
from eckart.evals.predictions import next_logits, scored_of
from eckart.evals.result import TRAITS, EvalResult, Score
from eckart.evals.windows import Specials, check_finite, check_predicts, cut_text, windows_per_batch
from eckart.support.progress import Track, silent

# What is kept of a window: means over its predicted tokens, in this order.
KEPT = ("kl", "top1", "top5", "log_perplexity", "log_perplexity.reference", "right", "top1 and right")


@torch.inference_mode()
def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    stream: Int[Tensor, "tokens"],
    *,
    length: int,
    limit: int | None = None,
    specials: Specials = ((), ()),
    task: str = "divergence",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """KL(reference || model) of the next-token distributions, in nats per token, on windows as `perplexity` cuts them.

    The softmax is in float32, sums over the vocabulary and over tokens are in float64. KL is never negative and is
    zero where the models agree; rounding alone leaves about 1e-7 of either sign.

    Args:
        model, reference: causal models or encoder-decoders with one tokenizer, which cannot be checked beyond the size
            of the vocabulary. The distributions are compared on the model's device.
        stream: (n,) token ids.
        length: window length.
        limit: read at most this many windows.
        specials: as in `perplexity`.

    Returns:
        value = mean KL; examples = mean KL of each window. Standard errors are from the spread between windows.
        Scores, all means over predicted tokens:
            top1: both models have the same most likely token;
            top1_where_right: the same, over the tokens that the reference gets right; absent where there is none;
            top5: the share of the reference's five likeliest tokens that are among the model's five;
            log_perplexity, log_perplexity.reference: mean NLL in nats;
            log_perplexity.change: the difference, with its paired standard error.

    Raises:
        ValueError: vocabularies of other sizes, a logit that is not finite (the message names model and window), and
            what `perplexity` raises about text, length and either model.
    """
    if is_encoder_decoder(model) != is_encoder_decoder(reference):
        raise ValueError(f"{task}: only one of the two models is an encoder-decoder; they cannot be compared")
    for candidate in (reference, model):
        check_predicts(candidate, task)
        tokens = cut_text(candidate, stream, length=length, limit=limit, specials=specials)
    scored = scored_of(tokens, specials)
    sizes = [check_vocabulary(candidate, tokens.ids) for candidate in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{task}: the model has a vocabulary of {sizes[0]}, the reference of {sizes[1]}; they cannot be compared"
        )
    size = windows_per_batch(length, sizes[0], models=2)
    parts: list[Tensor] = []
    for rows in track(tokens.rows(size), task, math.ceil(len(tokens) / size)):
        first = sum(len(part) for part in parts)
        ours, targets = _log_probabilities(model, rows, scored, f"{task}, compressed model", first)
        theirs, _ = _log_probabilities(reference, rows, scored, f"{task}, dense model", first)
        parts.append(_compare(ours, theirs.to(ours.device), targets).cpu())
    means = dict(zip(KEPT, torch.cat(parts).unbind(1), strict=True))
    windows = len(tokens)
    kl = mean_of(means["kl"])
    scores = {name: mean_of(means[name]) for name in ("top1", "top5", "log_perplexity", "log_perplexity.reference")}
    scores["log_perplexity.change"] = mean_of(means["log_perplexity"] - means["log_perplexity.reference"])
    if means["right"].any():
        scores["top1_where_right"] = _ratio(means["top1 and right"], means["right"])
    return EvalResult(
        task=task,
        metric="kl",
        value=kl.value,
        stderr=kl.stderr,
        n=windows,
        traits=TRAITS["divergence"],
        settings={
            "length": length,
            "windows": windows,
            "scored_tokens": windows * (scored.stop - scored.start),
            **(settings or {}),
        },
        examples=[round(value, 9) for value in means["kl"].tolist()],
        scores=scores,
    )


def _log_probabilities(
    model: PreTrainedModel, rows: Rows, scored: slice, what: str, first: int
) -> tuple[Tensor, Tensor]:
    """(log-probabilities at the scored tokens, those tokens)."""
    logits, targets = next_logits(model, rows, scored)
    check_finite(logits, what, first)
    return logits.log_softmax(-1), targets


def _compare(ours: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
    """(windows, len(KEPT)) means over the predicted tokens, from (windows, scored, vocabulary) log-probabilities.

    The vocabulary is weighed and summed a window at a time: a float64 copy of all of it would be the largest tensor.
    """
    count = min(5, ours.shape[-1])
    columns = []
    for log_q, log_p, target in zip(ours, theirs, targets, strict=True):
        best_q, best_p = log_q.topk(count).indices, log_p.topk(count).indices
        same, right = best_q[:, 0] == best_p[:, 0], best_p[:, 0] == target
        shared = (best_p[:, :, None] == best_q[:, None, :]).any(-1).double().mean(-1)
        per_token = [
            (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1),
            same.double(),
            shared,
            -log_q.gather(1, target[:, None])[:, 0].double(),
            -log_p.gather(1, target[:, None])[:, 0].double(),
            right.double(),
            (same & right).double(),
        ]
        columns.append(torch.stack(per_token).mean(1))
    return torch.stack(columns)


def _ratio(top: Tensor, bottom: Tensor) -> Score:
    """Sum over sum, with the standard error of the linearised ratio."""
    count, value = len(top), float(top.sum() / bottom.sum())
    spread = float((top - value * bottom).std()) * math.sqrt(count) / float(bottom.sum()) if count > 1 else None
    return Score(value, spread, count)
