"""Perplexity: exp of the mean negative log-likelihood per token, over fixed windows that do not overlap."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.corpora import check_vocabulary
from eckart.evals.result import EvalResult
from eckart.tracking import Track, silent

# Logits of one batch in float32 are the largest tensor of an evaluation; this bounds them at 256 MB.
LOGITS_PER_BATCH = 2**26


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    stream: Int[Tensor, "tokens"],
    *,
    length: int,
    limit: int | None = None,
    task: str = "perplexity",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """Perplexity of a causal language model on a stream of tokens.

    The stream is cut into windows of `length` from its start; a shorter rest is left out. In each window every token
    but the first is predicted from those before it. The softmax is taken in float32.

    Args:
        stream: (n,) token ids.
        length: window length; results at different lengths cannot be compared.
        limit: read at most this many windows.

    Returns:
        value = exp(mean NLL); stderr by the delta method from the spread between windows; examples = NLL per token of
        each window.

    Raises:
        ValueError: less than one window of text, a length past the model's positions, a token outside its vocabulary,
            a model that is not causal or is in training mode, or a logit that is not finite (the message names the
            window).
    """
    check_causal(model)
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, with its dropout: call model.eval() first")
    if length < 2:
        raise ValueError(f"length {length} leaves nothing to predict")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"length {length} is past the model's {positions} positions; lower it")
    windows = len(stream) // length
    if windows == 0:
        raise ValueError(f"the text has {len(stream)} tokens, less than one window of {length}: lower the length")
    windows = windows if limit is None else min(windows, limit)
    if windows < 1:
        raise ValueError(f"limit {limit} leaves no window to read")
    vocabulary = check_vocabulary(model, stream)
    rows = stream[: windows * length].view(windows, length)
    size = max(1, LOGITS_PER_BATCH // (length * vocabulary))
    losses: list[Tensor] = []
    for batch in track(rows.split(size), task, math.ceil(windows / size)):
        batch = batch.to(model.device)
        logits = model(input_ids=batch).logits[:, :-1].float()
        finite = torch.isfinite(logits).flatten(1).all(1)
        if not finite.all():
            window = sum(len(part) for part in losses) + int((~finite).nonzero()[0])
            raise ValueError(
                f"{task}: a logit in window {window} is not finite; the model is broken, there is no result"
            )
        losses.append(
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            .double()
            .mean(1)
            .cpu()
        )
    means = torch.cat(losses)
    value = float(means.mean().exp())  # infinite where math.exp would raise
    stderr = value * float(means.std()) / math.sqrt(windows) if windows > 1 else None
    return EvalResult(
        task=task,
        metric="perplexity",
        value=value,
        stderr=stderr,
        n=windows,
        settings={
            "length": length,
            "windows": windows,
            "scored_tokens": windows * (length - 1),
            **(settings or {}),
        },
        examples=[round(mean, 6) for mean in means.tolist()],
    )


def check_causal(model: PreTrainedModel) -> None:
    """Raises ValueError unless the model predicts the next token."""
    name = type(model).__name__
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is not a causal language model; perplexity is not defined for it")
