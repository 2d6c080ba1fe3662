"""Windows: a stream of tokens cut into rows that a model can read, and the checks that come before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.encoding import check_vocabulary
from eckart.data.pairs import check_reads_text, is_encoder_decoder
from eckart.data.positions import check_positions
from eckart.data.samples import half_content, halve
from eckart.data.tokens import Tokens

# Logits of one batch in float32 are the largest tensor of an evaluation; this bounds them at 256 MB.
LOGITS_PER_BATCH = 2**26
# The special tokens that a tokenizer puts before and after a text.
Specials = tuple[Sequence[int], Sequence[int]]


def cut_text(
    model: PreTrainedModel,
    stream: Int[Tensor, "tokens"],
    *,
    length: int,
    limit: int | None = None,
    specials: Specials = ((), ()),
) -> Tokens:
    """The stream as what the model reads: `cut_windows`, or of an encoder-decoder the pairs of `cut_halves`."""
    if is_encoder_decoder(model):
        ids = cut_halves(model, stream, length=length, limit=limit, specials=specials)
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), split=ids.shape[1] // 2)
    ids = cut_windows(model, stream, length=length, limit=limit)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def cut_windows(
    model: PreTrainedModel, stream: Int[Tensor, "tokens"], *, length: int, limit: int | None = None
) -> Int[Tensor, "windows length"]:
    """The stream cut into windows of `length` from its start, without overlap; a shorter rest is left out.

    Args:
        stream: (n,) token ids.
        limit: at most this many windows.

    Raises:
        ValueError: less than one window of text, a length past the model's positions, a token outside its vocabulary,
            a model in training mode, or one that reads pairs.
    """
    check_evaluating(model)
    check_one_text(model)
    if length < 2:
        raise ValueError(f"length {length} leaves nothing to predict")
    check_positions(model, length)
    return _cut(model, stream, length, limit)


def cut_halves(
    model: PreTrainedModel,
    stream: Int[Tensor, "tokens"],
    *,
    length: int,
    limit: int | None = None,
    specials: Specials = ((), ()),
) -> Int[Tensor, "windows length"]:
    """The stream cut into windows for an encoder-decoder: the first half of each is the source, the second the target.

    Args:
        stream, limit: as in `cut_windows`.
        length: tokens of a pair; with `specials`, which stand before and after each half.

    Raises:
        ValueError: as `cut_windows`; or a model that reads no text.
    """
    check_evaluating(model)
    check_reads_text(model)
    content = half_content(length, *specials)
    check_positions(model, length // 2, f"length {length}: half of it,")
    return halve(_cut(model, stream, 2 * content, limit), *specials)


def _cut(
    model: PreTrainedModel, stream: Int[Tensor, "tokens"], length: int, limit: int | None
) -> Int[Tensor, "windows length"]:
    windows = len(stream) // length
    if windows == 0:
        raise ValueError(f"the text has {len(stream)} tokens, less than one window of {length}: lower the length")
    windows = windows if limit is None else min(windows, limit)
    if windows < 1:
        raise ValueError(f"limit {limit} leaves no window to read")
    rows = stream[: windows * length].view(windows, length)
    check_vocabulary(model, rows)
    return rows


def windows_per_batch(length: int, vocabulary: int, models: int = 1) -> int:
    """Windows at a time, so that the logits of `models` models stay within LOGITS_PER_BATCH numbers."""
    return max(1, LOGITS_PER_BATCH // (length * vocabulary * models))


def check_predicts(model: PreTrainedModel, what: str) -> None:
    """Raises ValueError unless the model predicts tokens from those before them; `what` is not defined for others."""
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} is not a causal language model; {what} is not defined for it")


def check_causal(model: PreTrainedModel, what: str = "perplexity") -> None:
    """Raises ValueError unless the model predicts the next token; `what` is not defined for others."""
    if not is_causal(model):
        raise ValueError(f"{type(model).__name__} is not a causal language model; {what} is not defined for it")


def check_one_text(model: PreTrainedModel) -> None:
    """Raises ValueError for an encoder-decoder."""
    if is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which reads pairs of source and target, and this is of "
            "one text: perplexity, divergence, distance and similarity read pairs, and cost needs no text"
        )


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token from those before it."""
    return model.can_generate() and not is_encoder_decoder(model)


def check_evaluating(model: PreTrainedModel) -> None:
    """Raises ValueError for a model in training mode, whose dropout makes every number random."""
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, with its dropout: call model.eval() first")


def check_finite(logits: Tensor, what: str, first: int) -> None:
    """Raises ValueError where a logit is not finite: a broken model has no result.

    Args:
        logits: (rows, ...) of one batch.
        what: names the evaluation, in the message.
        first: number of the batch's first row.
    """
    finite = torch.isfinite(logits).flatten(1).all(1)
    if not finite.all():
        window = first + int((~finite).nonzero()[0])
        raise ValueError(f"{what}: a logit in window {window} is not finite; the model is broken, there is no result")
