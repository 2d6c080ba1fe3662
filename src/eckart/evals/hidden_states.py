"""Hidden states: what every layer of a model makes of each text, one vector a text, in a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.encoding import check_vocabulary, cut_on_the_right
from eckart.data.positions import check_positions, usable_positions
from eckart.evals.windows import check_evaluating, check_one_text, is_causal
from eckart.support.files import claimed, set_aside, write_whole
from eckart.support.fingerprint import describe_architecture, hash_weights
from eckart.support.progress import Track, silent

Pooling = Literal["mean", "last", "cls"]
# Number of this layout and of the way states are pooled; part of every digest.
FORMAT = 1
# Bytes of the digest at a file's end.
DIGEST = hashlib.sha256().digest_size
# Batches between two notes of how far a reading is: a killed one does these again at most.
NOTED_EVERY = 64
# A text is read so far at most, unless more is asked for.
LONGEST = 2048


@dataclass(frozen=True)
class HiddenStates:
    """The states of a text set.

    Attributes:
        values: (layers + 1, texts, width) float32, mapped from its file: [0] is the embeddings, [k] what block k gives.
            The last is behind the final norm, where the model has one, as transformers gives it.
        truncated: texts that were cut at the model's positions.
        length: tokens of a text that are read at most.
    """

    values: NDArray[np.float32]
    truncated: int
    length: int


@dataclass(frozen=True)
class TokenRows:
    """Texts as token ids.

    Attributes:
        ids: of each text.
        padding: what fills a batch, the model's own token for it; None where it has none. A decoder's head for classes
            reads the last token that is not this one, so that without it each text is read alone.
        truncated: texts that were cut. length: tokens of a text read at most.
    """

    ids: tuple[tuple[int, ...], ...]
    padding: int | None
    truncated: int
    length: int

    @property
    def by_length(self) -> list[int]:
        """The texts from the shortest on, so that little of a batch is padding."""
        return sorted(range(len(self.ids)), key=lambda row: (len(self.ids[row]), row))


@contextmanager
def read_hidden_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    length: int | None = None,
    batch_size: int = 8,
    cache: Path | None = None,
    track: Track = silent,
) -> Iterator[HiddenStates]:
    """The hidden states of every layer, one vector a text; each text is read once, whatever the states are asked later.

    Texts are tokenized as the tokenizer does it by itself, specials included, cut on the right and read in order of
    their length, so that little is padded. Padding is in no state.

    Args:
        pooling: "mean" over all of a text's tokens, its "last" token, or its first ("cls").
        length: tokens of a text read at most; default what the model has positions for, 2048 at most.
        batch_size: texts at a time: memory and speed only.
        cache: folder for states. They are kept in `cache/<digest>.npy`, where the digest is of the model's
            configuration and weights, the token ids and the pooling; what is there is not read again, and a killed
            reading goes on where it was. None keeps them while the context is open, in a file all the same.

    Yields:
        the states, float32 on disk: 4 (layers + 1) texts width bytes.

    Raises:
        ValueError: no texts, one without tokens, "cls" of a causal model (its first token has seen nothing), a state
            that is not finite (names the layer), a token outside the vocabulary, or a model in training mode.
        OSError: the disk has no room for the states; raised before anything is read.

    Cost: one forward pass of the model without its head over the texts; memory for the states of one batch.
    """
    check_evaluating(model)
    check_one_text(model)
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling {pooling!r} is none of {', '.join(get_args(Pooling))}")
    if pooling == "cls" and is_causal(model):
        raise ValueError(
            f"{type(model).__name__} is causal: its first token has seen no other; pool by mean or by last token"
        )
    rows = tokenize_texts(model, tokenizer, texts, length)
    with ExitStack() as stack:
        kept = cache is not None
        if cache is None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eckart-states-")))
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / (f"{_digest(model, rows, pooling)}.npy" if kept else "states.npy")
        if not _is_sound(file):
            _fill(model, rows, pooling, file, batch_size, track)
        values = np.load(file, mmap_mode="r")
        try:
            yield HiddenStates(values, rows.truncated, rows.length)
        finally:
            del values


def tokenize_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int | None = None
) -> TokenRows:
    """The texts as the tokenizer makes them by itself, specials included, cut on the right.

    Args:
        length: tokens of a text at most; default what the model has positions for, 2048 at most.

    Raises:
        ValueError: no texts, one without tokens, a length past the model's positions, a token outside its vocabulary.
    """
    if not texts:
        raise ValueError("no texts to read")
    if length is not None:
        check_positions(model, length)
    length = length or min(LONGEST, usable_positions(model) or LONGEST)
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    empty = next((place for place, ids in enumerate(rows) if not ids), None)
    if empty is not None:
        raise ValueError(f"text {empty} ({texts[empty]!r}) has no token")
    long = [place for place, ids in enumerate(rows) if len(ids) > length]
    with cut_on_the_right(tokenizer):
        for place in long:  # by the tokenizer, which keeps the specials at the end
            rows[place] = tokenizer(texts[place], truncation=True, max_length=length, verbose=False)["input_ids"]
    check_vocabulary(model, torch.tensor([max(map(max, rows))]), tokenizer)
    return TokenRows(tuple(map(tuple, rows)), _padding_of(model), len(long), length)


def _padding_of(model: PreTrainedModel) -> int | None:
    """The model's own token for padding; None where it has none, or one that it has no embedding of, such as -1."""
    padding: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    known = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    return padding if padding is not None and 0 <= padding < known else None


def pad_rows(
    ids: Sequence[Sequence[int]], padding: int | None
) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """The rows side by side, filled on the right, with zeros for None, and which of them is real."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    filled = torch.full((len(ids), width), padding or 0)
    for place, row in enumerate(ids):
        filled[place, : len(row)] = torch.tensor(row)
    return filled, torch.arange(width) < lengths[:, None]


def _digest(model: PreTrainedModel, rows: TokenRows, pooling: Pooling) -> str:
    state = hashlib.sha256()
    header = {"format": FORMAT, **describe_architecture(model), "pooling": pooling, "padding": rows.padding or 0}
    state.update(json.dumps(header, sort_keys=True, default=str).encode())
    state.update(json.dumps(rows.ids).encode())
    hash_weights(state.update, model)
    return state.hexdigest()[:32]


def _fill(model: PreTrainedModel, rows: TokenRows, pooling: Pooling, file: Path, batch_size: int, track: Track) -> None:
    """Read all rows into `file`, which appears whole; continuing a killed reading."""
    order = rows.by_length
    partial, noted = file.with_suffix(".partial"), file.with_suffix(".rows")
    with claimed(file):
        if file.is_file():
            return  # another process has read it meanwhile
        finished = int(noted.read_text(encoding="ascii") or 0) if partial.is_file() and noted.is_file() else 0
        batches = [order[start : start + batch_size] for start in range(finished, len(order), batch_size)]
        values = np.load(partial, mmap_mode="r+") if finished else None
        for number, batch in enumerate(track(batches, "hidden states", len(batches)), 1):
            pooled = _pool(model, rows, batch, pooling)
            if values is None:
                shape = (len(pooled), len(order), pooled.shape[-1])
                values = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
                _take_room(partial)
            values[:, batch] = pooled.numpy()
            finished += len(batch)
            if number % NOTED_EVERY == 0:
                _note(noted, values, finished)
        assert values is not None
        values.flush()
        end = values.offset + values.nbytes
        del values
        os.truncate(partial, end)  # a process that was killed here has left a digest
        with partial.open("ab") as last:
            last.write(_digest_of_bytes(partial))
        partial.rename(file)
        noted.unlink(missing_ok=True)


def _take_room(file: Path) -> None:
    """Give the file its blocks now: a full disk ends a process that writes to a map, at some later write."""
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        with file.open("r+b") as room:
            os.posix_fallocate(room.fileno(), 0, file.stat().st_size)


def _note(file: Path, values: np.memmap, finished: int) -> None:
    """Put on disk what was read, and then how far that is."""
    values.flush()
    write_whole(file, str(finished))


def _is_sound(file: Path) -> bool:
    """Whether there are states, and they are those that were written; otherwise they are set aside, with a warning.

    After the numbers, where numpy does not look, is a digest of all before it. A file of an older eckart has none, and
    is believed.
    """
    if not file.is_file():
        return False
    try:
        values = np.load(file, mmap_mode="r")
        end, size = values.offset + values.nbytes, file.stat().st_size
    except (ValueError, EOFError, OSError):
        end = size = -1
    if 0 < end == size:
        return True
    if end < 0 or end + DIGEST != size or _last_bytes(file) != _digest_of_bytes(file, end):
        set_aside(file)
        return False
    return True


def _last_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(-DIGEST, os.SEEK_END)
        return stream.read()


def _digest_of_bytes(file: Path, end: int | None = None) -> bytes:
    return hashlib.sha256(np.memmap(file, dtype=np.uint8, mode="r")[:end].data).digest()


@torch.inference_mode()
def _pool(
    model: PreTrainedModel, rows: TokenRows, batch: Sequence[int], pooling: Pooling
) -> Float[Tensor, "layers rows width"]:
    """The pooled states of a batch, on the CPU."""
    ids, mask = pad_rows([rows.ids[row] for row in batch], rows.padding)
    output = model.base_model(
        input_ids=ids.to(model.device),
        attention_mask=None if bool(mask.all()) else mask.to(model.device).long(),
        output_hidden_states=True,
        **({"use_cache": False} if is_causal(model) else {}),
    )
    pooled = torch.stack([_pool_layer(states, mask, pooling) for states in output.hidden_states])
    if not bool(torch.isfinite(pooled).all()):
        layer = int((~torch.isfinite(pooled)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"a hidden state of layer {layer} is not finite; the model is broken, there is no result")
    return pooled.cpu()


def _pool_layer(
    states: Float[Tensor, "rows length width"], mask: Tensor, pooling: Pooling
) -> Float[Tensor, "rows width"]:
    """One vector a text, float32."""
    mask = mask.to(states.device)
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "last":
        return states[torch.arange(len(states)), mask.sum(1) - 1].float()
    weights = mask.float()
    return torch.einsum("rlw,rl->rw", states.float(), weights) / weights.sum(1, keepdim=True)
