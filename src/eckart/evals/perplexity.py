"""Perplexity: exp of the mean negative log-likelihood per token, over fixed windows that do not overlap."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.encoding import check_vocabulary
from eckart.evals.means import stderr_of
from eckart.evals.predictions import next_logits, scored_of, token_losses
from eckart.evals.result import TRAITS, EvalResult
from eckart.evals.windows import Specials, check_finite, check_predicts, cut_text, windows_per_batch
from eckart.support.progress import Track, silent


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    stream: Int[Tensor, "tokens"],
    *,
    length: int,
    limit: int | None = None,
    specials: Specials = ((), ()),
    task: str = "perplexity",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """Perplexity of a causal language model, or of an encoder-decoder, on a stream of tokens.

    The stream is cut into windows of `length` from its start; a shorter rest is left out. In each window every token
    but the first is predicted from those before it. The softmax is taken in float32.

    Of an encoder-decoder the first half of a window is the source, and each token of the second half is predicted from
    the source and the tokens of that half before it.

    Args:
        stream: (n,) token ids.
        length: window length; results at different lengths cannot be compared.
        limit: read at most this many windows.
        specials: token ids that an encoder-decoder reads before and after each half, within `length`; not scored.

    Returns:
        value = exp(mean NLL); stderr by the delta method from the spread between windows; examples = NLL per token of
        each window.

    Raises:
        ValueError: less than one window of text, a length past the model's positions, a token outside its vocabulary,
            a model that is neither causal nor an encoder-decoder or is in training mode, or a logit that is not finite
            (the message names the window).
    """
    check_predicts(model, "perplexity")
    tokens = cut_text(model, stream, length=length, limit=limit, specials=specials)
    scored, windows = scored_of(tokens, specials), len(tokens)
    size = windows_per_batch(length, check_vocabulary(model, tokens.ids))
    losses: list[Tensor] = []
    for rows in track(tokens.rows(size), task, math.ceil(windows / size)):
        logits, targets = next_logits(model, rows, scored)
        check_finite(logits, task, sum(map(len, losses)))
        losses.append(token_losses(logits, targets).double().mean(1).cpu())
    means = torch.cat(losses)
    value = float(means.mean().exp())  # infinite where math.exp would raise
    return EvalResult(
        task=task,
        metric="perplexity",
        value=value,
        stderr=stderr_of(means, slope=value),
        n=windows,
        traits=TRAITS["perplexity"],
        settings={
            "length": length,
            "windows": windows,
            "scored_tokens": windows * (scored.stop - scored.start),
            **(settings or {}),
        },
        examples=[round(mean, 6) for mean in means.tolist()],
    )
