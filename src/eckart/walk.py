"""Walk: the calls that a model makes of its blocks, recorded, so that any block can be run alone.

The embedding runs once and every block's call is noted. What a model passes to its blocks beside the hidden states
(masks, rotary tables) does not depend on them, so that afterwards one block at a time can be run on all batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.models.sites import blocks_of
from eckart.tracking import Track, silent


@dataclass
class Recording:
    """One batch on its way: the hidden states it has reached, and the other arguments of every block's call."""

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def record_calls(
    model: PreTrainedModel, batches: Sequence[tuple[Tensor, Tensor]], track: Track = silent
) -> list[Recording]:
    """Embed every batch and note with which masks and position embeddings the model calls each block.

    The blocks themselves do not run (but for the first, once, to see the form of its output): what a model passes to
    its blocks beside the hidden states does not depend on them.

    Raises:
        ValueError: the blocks are not called once each, in order.
    """
    base, blocks = model.base_model, blocks_of(model)
    accepted = inspect.signature(base.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    recordings = []
    for ids, mask in track(batches, "embedding", len(batches)):
        with _recording(blocks) as calls:
            # A mask that hides nothing is left out: the attention kernels then need no mask tensor at all.
            attention = None if bool(mask.all()) else mask.to(model.device).long()
            base(input_ids=ids.to(model.device), attention_mask=attention, **options)
        if [index for index, *_ in calls] != list(range(len(blocks))):
            raise ValueError(
                f"{type(model).__name__} does not call its {len(blocks)} blocks once each in order; "
                "it cannot be calibrated block by block"
            )
        recordings.append(Recording(calls[0][1], [(args, kwargs) for _, _, args, kwargs in calls]))
    return recordings


@contextmanager
def _recording(blocks: nn.ModuleList) -> Iterator[list[tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]]]:
    """Inside, a block's forward notes its call and passes the hidden states through."""
    calls: list[tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]] = []
    tails: list[tuple[Any, ...] | None] = []

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

    before = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = stand_in(index, block)
    try:
        yield calls
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward  # the instance attribute; the class's forward is visible again
            if forward is not None:
                block.forward = forward  # one that somebody else put there, as accelerate does to offload


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output
