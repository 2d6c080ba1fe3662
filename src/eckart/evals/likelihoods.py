"""Likelihoods: how likely a model finds a text, for decoders and for encoders, in padded batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.encoding import check_vocabulary
from eckart.data.positions import usable_positions
from eckart.evals.predictions import token_losses
from eckart.support.progress import Track, silent


@dataclass(frozen=True)
class Row:
    """One input of a model.

    Attributes:
        ids: token ids.
        name: for messages.
        scored: first of the tokens that a decoder scores; 0 scores the first from the start token alone.
        masked, target: position that an encoder reads, and the token that it should find there.
        types: token types, where the input is a pair.
    """

    ids: list[int]
    name: str
    scored: int = 0
    masked: int = 0
    target: int = 0
    types: list[int] | None = None


@dataclass(frozen=True)
class Batching:
    """How rows are read; nothing of it changes a number beyond rounding."""

    size: int = 8
    task: str = "likelihood"
    track: Track = silent


@dataclass(frozen=True)
class Start:
    """How a decoder's tokenizer starts a text.

    Attributes:
        token: id of the start token: begin of sequence, or end of text where there is none.
        always: whether the tokenizer puts it before every text.
    """

    token: int
    always: bool


def find_start(tokenizer: PreTrainedTokenizerBase) -> Start | None:
    """The start token of a decoder's tokenizer; None where it has neither begin of sequence nor end of text."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return Start(token, tokenizer("a")["input_ids"][:1] == [token])
    return None


def decoder_row(tokenizer: PreTrainedTokenizerBase, text: str, name: str, *, context: str = "") -> Row:
    """The row that scores `text`, after `context` and a space where there is one.

    The tokens are those of both texts as one; the first tokens, as many as the context has on its own, are not scored.
    Without a context and a start token, the first token has no probability and is not scored.

    Raises:
        ValueError: no token to score.
    """
    start = find_start(tokenizer)
    ids = _plain(tokenizer, f"{context} {text}" if context else text)
    before = len(_plain(tokenizer, context)) if context else 0
    if start is None:
        before = max(before, 1)
    if before >= len(ids):
        raise ValueError(f"{name}: the tokenizer leaves no token to score in {text!r}")
    if start is not None and start.always:
        return Row([start.token, *ids], name, scored=before + 1)
    return Row(ids, name, scored=before)


@torch.inference_mode()
def mean_log_likelihoods(
    model: PreTrainedModel, rows: Sequence[Row], start: Start | None, batching: Batching
) -> list[float]:
    """Mean log-probability per scored token of each row, in nats, by a decoder.

    A first token that is scored takes its probability from the start token alone.

    Raises:
        ValueError: a logit that is not finite, or a row past the model's vocabulary or positions; the message names
            the row.
    """
    first = None
    if start is not None and any(row.scored == 0 for row in rows):
        begin = Row([start.token], "the start token")
        _check_rows(model, [begin])
        first = _read_logits(model, [begin]).logits[0, -1].float()
        _check_finite(first[None], torch.ones(1, 1, dtype=torch.bool), [begin], batching.task)
        first = first.log_softmax(-1)
    means = [math.nan] * len(rows)
    for numbers, batch in _batches(model, rows, batching):
        ids, mask = _pad(batch)
        logits = _read_logits(model, batch).logits.float()
        _check_finite(logits, mask, batch, batching.task)
        losses = token_losses(logits[:, :-1], ids[:, 1:].to(logits.device))
        for row, number, loss in zip(batch, numbers, losses.double(), strict=True):
            total = -float(loss[max(row.scored, 1) - 1 : len(row.ids) - 1].sum())
            if row.scored == 0:
                assert first is not None
                total += float(first[row.ids[0]])
            means[number] = total / (len(row.ids) - row.scored)
    return means


def masked_rows(
    tokenizer: PreTrainedTokenizerBase, template: str, word: str, name: str, *, blank: str = "BLANK"
) -> list[Row]:
    """Rows that ask an encoder for a word piece by piece: one for each piece, with the pieces before it and one mask.

    The pieces are those of the word where it is in the template. Where the template has the blank more than once,
    every blank is filled alike and the first is read.

    Raises:
        ValueError: a tokenizer without a mask token or without offsets, or that has no piece for the word.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; an encoder cannot be asked for a word")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets; load its fast version")
    spans, end = [], 0
    for gap in template.split(blank)[:-1]:
        spans.append((end + len(gap), end + len(gap) + len(word)))
        end += len(gap) + len(word)
    encoded = tokenizer(template.replace(blank, word), return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    pieces = [
        [
            number
            for number, (begin, after) in enumerate(encoded["offset_mapping"])
            if begin < stop and after > start and after > begin
        ]
        for start, stop in spans
    ]
    if not pieces or not all(pieces):
        raise ValueError(f"{name}: the tokenizer has no piece for {word!r} in {template!r}")
    rows = []
    for step, target in enumerate(pieces[0]):
        filled: list[int] = []
        copied = 0
        for positions in pieces:
            filled += ids[copied : positions[0]] + [ids[p] for p in positions[:step]] + [tokenizer.mask_token_id]
            copied = positions[-1] + 1
        rows.append(Row(filled + ids[copied:], name, masked=pieces[0][0] + step, target=ids[target]))
    return rows


@torch.inference_mode()
def masked_log_probabilities(model: PreTrainedModel, rows: Sequence[Row], batching: Batching) -> list[float]:
    """Log-probability of each row's target at its mask, in nats, by an encoder.

    Raises:
        ValueError: as `mean_log_likelihoods`.
    """
    logs = [math.nan] * len(rows)
    for numbers, batch in _batches(model, rows, batching):
        output = _read_logits(model, batch)
        logits = (output.prediction_logits if "prediction_logits" in output else output.logits).float()
        _check_finite(logits, _pad(batch)[1], batch, batching.task)
        for row, number, there in zip(batch, numbers, logits, strict=True):
            logs[number] = float(there[row.masked].log_softmax(-1)[row.target])
    return logs


def pair_row(tokenizer: PreTrainedTokenizerBase, context: str, text: str, name: str) -> Row:
    """The row that asks an encoder whether `text` follows `context`: both as a pair, as the tokenizer joins them."""
    encoded = tokenizer(context, text, return_token_type_ids=True)
    return Row(encoded["input_ids"], name, types=encoded["token_type_ids"])


@torch.inference_mode()
def following_log_probabilities(model: PreTrainedModel, rows: Sequence[Row], batching: Batching) -> list[float]:
    """Log-probability that the second text of each pair follows the first, by the next-sentence head of an encoder.

    Class 0 of the head is "follows" (BERT).

    Raises:
        ValueError: as `mean_log_likelihoods`.
    """
    logs = [math.nan] * len(rows)
    for numbers, batch in _batches(model, rows, batching):
        output = _read_logits(model, batch)
        logits = (output.seq_relationship_logits if "seq_relationship_logits" in output else output.logits).float()
        _check_finite(logits[:, None], torch.ones(len(batch), 1, dtype=torch.bool), batch, batching.task)
        for number, log in zip(numbers, logits.log_softmax(-1)[:, 0].tolist(), strict=True):
            logs[number] = log
    return logs


def has_next_sentence_head(model: PreTrainedModel) -> bool:
    """Whether an encoder has the head that tells if a sentence follows another, as BERT's pretraining does."""
    return any(name.rpartition(".")[2] == "seq_relationship" for name, _ in model.named_modules())


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _batches(model: PreTrainedModel, rows: Sequence[Row], batching: Batching) -> Iterator[tuple[list[int], list[Row]]]:
    """(numbers, rows) of about one length at a time, so that little is padding; the longest first."""
    _check_rows(model, rows)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    chunks = [order[at : at + batching.size] for at in range(0, len(order), batching.size)]
    for numbers in batching.track(chunks, batching.task, len(chunks)):
        yield numbers, [rows[number] for number in numbers]


def _check_rows(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    positions = usable_positions(model)
    for row in rows:
        if positions is not None and len(row.ids) > positions:
            raise ValueError(f"{row.name} has {len(row.ids)} tokens, past the model's {positions} positions")
    check_vocabulary(model, torch.tensor([token for row in rows for token in row.ids]))


def _pad(batch: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(ids, mask), padded on the right, where it shifts nobody's positions; True is a real token."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.bool)
    for number, row in enumerate(batch):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = True
    return ids, mask


def _read_logits(model: PreTrainedModel, batch: Sequence[Row]) -> Any:
    ids, mask = _pad(batch)
    pad = getattr(model.config, "pad_token_id", None)
    inputs = {"input_ids": ids.masked_fill(~mask, 0 if pad is None else pad), "attention_mask": mask.long()}
    if batch[0].types is not None:
        types = torch.zeros_like(ids)
        for number, row in enumerate(batch):
            types[number, : len(row.ids)] = torch.tensor(row.types)
        inputs["token_type_ids"] = types
    return model(**{name: value.to(model.device) for name, value in inputs.items()})


def _check_finite(logits: Tensor, mask: Tensor, batch: Sequence[Row], task: str) -> None:
    finite = (torch.isfinite(logits).all(-1) | ~mask.to(logits.device)).all(1)
    if not finite.all():
        name = batch[int((~finite).nonzero()[0])].name
        raise ValueError(f"{task}: a logit in {name} is not finite; the model is broken, there is no result")
