"""Tokens: text cut into windows or documents of token ids, and the checks that a model can read them."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import Text
from eckart.data.pieces import pieces


@dataclass(frozen=True)
class Tokens:
    """Token windows for calibration.

    Attributes:
        ids: (samples, length) int64.
        mask: (samples, length), True for real tokens, False for padding.
        source: where the text came from and how it was cut.
        mask_token: the tokenizer's, where it has one; masked language models need it for their loss.
    """

    ids: Int[Tensor, "samples length"]
    mask: Bool[Tensor, "samples length"]
    source: dict[str, Any] = field(default_factory=dict)
    mask_token: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())

    @property
    def digest(self) -> str:
        """A digest of the ids and the mask, so that another tokenizer, text, seed or cut has another digest."""
        state = hashlib.sha256(f"{tuple(self.ids.shape)} {self.mask_token}".encode())
        state.update(self.ids.numpy().tobytes())
        state.update(self.mask.numpy().tobytes())
        return state.hexdigest()

    def __add__(self, other: Tokens) -> Tokens:
        """Both, one after the other; the shorter rows are padded."""
        width = max(self.ids.shape[1], other.ids.shape[1])

        def widened(rows: Tensor) -> Tensor:
            return nn.functional.pad(rows, (0, width - rows.shape[1]))

        return Tokens(
            torch.cat([widened(self.ids), widened(other.ids)]),
            torch.cat([widened(self.mask), widened(other.mask)]),
            {"parts": [*self.source.get("parts", [self.source]), *other.source.get("parts", [other.source])]},
            self.mask_token,
        )

    def hold_out(self, share: float) -> tuple[Tokens, Tokens]:
        """(used, held out): the second is a share of the samples, at least one, evenly spread over all of them.

        Raises:
            ValueError: the share is outside (0, 1), or there are fewer than two samples.
        """
        if not 0 < share < 1:
            raise ValueError(f"share {share} is outside (0, 1)")
        if len(self) < 2:
            raise ValueError("one sample cannot be both used and held out: give at least two")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        held_out = torch.zeros(len(self), dtype=torch.bool)
        held_out[[(2 * index + 1) * len(self) // (2 * count) for index in range(count)]] = True
        return self._rows(~held_out, "used"), self._rows(held_out, "aside")

    def _rows(self, selected: Tensor, part: str) -> Tokens:
        return Tokens(self.ids[selected], self.mask[selected], {**self.source, "part": part}, self.mask_token)

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """(ids, mask) in order, `size` rows at a time."""
        return list(zip(self.ids.split(size), self.mask.split(size), strict=True))


def sample_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int = 0
) -> Tokens:
    """`samples` windows of `length` tokens drawn without overlap from the joined text: calibration of decoders.

    Raises:
        ValueError: fewer than `samples` windows in the text (the message has the numbers).
    """
    _positive(samples=samples, length=length)
    stream = encode(text, tokenizer)
    windows = len(stream) // length
    if windows < samples:
        raise ValueError(
            f"corpus {text.source.get('corpus')} has {len(stream)} tokens, {windows} windows of {length}; "
            f"{samples} were asked for: lower samples or length, or give more text"
        )
    numbers = sorted(random.Random(seed).sample(range(windows), samples))
    ids = stream[: windows * length].view(windows, length)[numbers]
    source = {**text.source, "samples": samples, "length": length, "seed": seed, "cut": "windows"}
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), source, tokenizer.mask_token_id)


def sample_documents(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int = 0
) -> Tokens:
    """`samples` documents, each cut at `length` tokens and padded: calibration of encoders, which read whole texts.

    A text file that is one document is split at its empty lines. Empty documents are skipped.

    Raises:
        ValueError: fewer than `samples` documents, or the tokenizer has no pad token.
    """
    _positive(samples=samples, length=length)
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set one, or calibrate on windows instead of documents")
    documents: Sequence[str] = text.documents
    if len(documents) == 1:
        documents = documents[0].split("\n\n")
    documents = [document for document in documents if document.strip()]
    if len(documents) < samples:
        raise ValueError(f"corpus {text.source.get('corpus')} has {len(documents)} documents; {samples} were asked for")
    numbers = sorted(random.Random(seed).sample(range(len(documents)), samples))
    batch = tokenizer(
        [documents[i] for i in numbers],
        truncation=True,
        max_length=length,
        padding=True,
        add_special_tokens=not text.templated,
        padding_side="right",  # on the left it would shift the positions of a model that counts them from the start
        return_tensors="pt",
    )
    source = {**text.source, "samples": samples, "length": length, "seed": seed, "cut": "documents"}
    return Tokens(batch["input_ids"], batch["attention_mask"].bool(), source, tokenizer.mask_token_id)


def encode(text: Text | str, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "tokens"]:
    """The text as one stream of tokens, with the tokenizer's own special tokens at its ends.

    A conversation that a chat template wrote out has its special tokens already. A long text is read in pieces where
    that gives the same tokens (see `pieces`): a tokenizer's own record of a token is some hundred bytes.
    """
    whole, specials = (text, True) if isinstance(text, str) else (text.joined, not text.templated)
    parts = pieces(whole, tokenizer)
    # verbose=False: the warning that the stream is longer than the model's window is meant for other uses.
    if len(parts) == 1:
        ids = tokenizer(whole, add_special_tokens=specials, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    before, after = _specials(tokenizer) if specials else ([], [])
    read = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in parts)
    return torch.cat([torch.tensor(ids, dtype=torch.int64) for ids in (before, *read, after)])


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    example = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = example["input_ids"], example["special_tokens_mask"]
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def check_vocabulary(model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The number of tokens that the model knows; checks that `ids` are among them.

    A tokenizer may know more, such as the image token of a model that was taken out of a larger one: what counts is
    which ids occur.

    Args:
        tokenizer: for the message, which then has the token's text as well.

    Raises:
        ValueError: an id is outside the model's embedding: the tokenizer is another model's, or has tokens added.
    """
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    largest = int(ids.max())
    if largest >= vocabulary:
        text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise ValueError(
            f"token {largest}{text} is outside the model's vocabulary of {vocabulary}; is it another model's tokenizer?"
        )
    return vocabulary


def warn_of_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns where the tokenizer may be another model's.

    Most embeddings are padded by a few percent at most, so one of which the tokenizer uses less than four fifths may
    have been made for another. Some were meant to be so large; nothing in the files tells the two apart.
    """
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    known = 1 + max(tokenizer.get_vocab().values())
    if known < 0.8 * vocabulary:
        warnings.warn(
            f"the tokenizer knows {known} tokens and {type(model).__name__} {vocabulary}: if it is another model's, "
            "every number is wrong; the model's own belongs into its directory",
            stacklevel=2,
        )


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} {value} is not positive")
