"""Walk: the calls that a model makes of its blocks, recorded, so that any block can be run alone.

The embedding runs once and every block's call is noted. What a model passes to its blocks beside the hidden states
(masks, rotary tables) does not depend on them, so that afterwards one block at a time can be run on all batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.models.sites import blocks_of
from eckart.tracking import Track, silent

# The other arguments of a block's call.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# What a block gives beside the hidden states; None where it gives them alone.
Tail = tuple[Any, ...] | None


@dataclass
class Recording:
    """One batch on its way: the hidden states it has reached, and the other arguments of every block's call.

    Attributes:
        tail: what the first block gave beside the hidden states, which is how any block's output is made up.
    """

    hidden: Tensor
    calls: list[Call]
    tail: Tail = None


class Doors(Protocol):
    """Hidden states of all batches at the door of one block and, as they are made, at the next."""

    def read(self, index: int) -> Tensor:
        """A batch's at this door."""
        ...

    def write(self, index: int, hidden: Tensor) -> None:
        """A batch's at the next door. It is not read at this one again."""
        ...

    def turn(self) -> None:
        """Every batch is at the next door, which is this one from now on."""
        ...


class Held:
    """Doors in memory: a batch's states take the place of those that they were made of."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}

    def read(self, index: int) -> Tensor:
        """See `Doors`."""
        return self._states[index]

    def write(self, index: int, hidden: Tensor) -> None:
        """See `Doors`."""
        self._states[index] = hidden

    def turn(self) -> None:
        """See `Doors`."""


def record_calls(
    model: PreTrainedModel, batches: Sequence[tuple[Tensor, Tensor]], track: Track = silent
) -> list[Recording]:
    """What `record_each` gives, of all batches."""
    return list(record_each(model, batches, track))


@torch.no_grad()
def record_each(
    model: PreTrainedModel, batches: Sequence[tuple[Tensor, Tensor]], track: Track = silent
) -> Iterator[Recording]:
    """Embed one batch after the other and note with which masks and position embeddings the model calls each block.

    The blocks themselves do not run (but for the first, once, to see the form of its output): what a model passes to
    its blocks beside the hidden states does not depend on them.

    Raises:
        ValueError: the blocks are not called once each, in order.
    """
    base, blocks = model.base_model, blocks_of(model)
    accepted = inspect.signature(base.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    for ids, mask in track(batches, "embedding", len(batches)):
        with _recording(blocks) as (calls, tails):
            # A mask that hides nothing is left out: the attention kernels then need no mask tensor at all.
            attention = None if bool(mask.all()) else mask.to(model.device).long()
            base(input_ids=ids.to(model.device), attention_mask=attention, **options)
        if [index for index, *_ in calls] != list(range(len(blocks))):
            raise ValueError(
                f"{type(model).__name__} does not call its {len(blocks)} blocks once each in order; "
                "it cannot be calibrated block by block"
            )
        yield Recording(calls[0][1], [(args, kwargs) for _, _, args, kwargs in calls], tails[0])


@contextmanager
def _recording(
    blocks: nn.ModuleList,
) -> Iterator[tuple[list[tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]], list[Tail]]]:
    """Inside, a block's forward notes its call and passes the hidden states through."""
    calls: list[tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]] = []
    tails: list[Tail] = []

    def stand_in(index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def note(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            rest = args if len(args) == 0 or args[0] is not hidden else args[1:]
            calls.append((index, hidden, rest, kwargs))
            if not tails:
                output = forward(hidden, *rest, **kwargs)
                tails.append(tuple(output[1:]) if isinstance(output, tuple | list) else None)
            return hidden if tails[0] is None else (hidden, *tails[0])

        return note

    with _replaced(blocks, [stand_in(index, block) for index, block in enumerate(blocks)]):
        yield calls, tails


@contextmanager
def standing_in(blocks: nn.ModuleList, hidden: Tensor, tail: Tail) -> Iterator[None]:
    """Inside, every block gives these hidden states, whatever it is called with: what stands after the last reads them.

    Args:
        tail: what blocks give beside them, see `Recording`.
    """

    def give(*_args: Any, **_kwargs: Any) -> Any:
        return hidden if tail is None else (hidden, *tail)

    with _replaced(blocks, [give] * len(blocks)):
        yield


@contextmanager
def _replaced(blocks: nn.ModuleList, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    before = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, earlier in zip(blocks, before, strict=True):
            del block.forward  # the instance attribute; the class's forward is visible again
            if earlier is not None:
                block.forward = earlier  # one that somebody else put there, as accelerate does to offload


def shared(value: Any, known: Any) -> Any:
    """`known` where the value equals it, else the value; of tuples, lists and dicts each item.

    All batches of one length are called with the same rotary tables: they need not be held once for each.
    """
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        alike = (value.shape, value.dtype, value.device) == (known.shape, known.dtype, known.device)
        return known if alike and torch.equal(value, known) else value
    if type(value) in (tuple, list) and type(known) is type(value) and len(value) == len(known):
        return type(value)(shared(*pair) for pair in zip(value, known, strict=True))
    if type(value) is dict and type(known) is dict:
        return {key: shared(item, known.get(key)) for key, item in value.items()}
    return value


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output
