"""Encoding: text as one stream of token ids, and the checks that a model can read them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import Text
from eckart.data.pieces import pieces


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
    before, after = specials_of(tokenizer) if specials else ([], [])
    read = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in parts)
    return torch.cat([torch.tensor(ids, dtype=torch.int64) for ids in (before, *read, after)])


def specials_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    example = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = example["input_ids"], example["special_tokens_mask"]
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


@contextmanager
def cut_on_the_right(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside, the tokenizer cuts what is too long at its end, whatever its own configuration says."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side


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
