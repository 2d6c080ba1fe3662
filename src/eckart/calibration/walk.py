"""Walk: a model run one block at a time on all batches, from the recorded calls that it makes of its blocks.

The embedding runs once and every block's call is recorded. What a model passes to its blocks besides hidden states
(masks, rotary tables) does not depend on them, so that afterwards one block at a time can be run on all batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.doors import Doors, Held
from eckart.calibration.routes import Routes, add_rows
from eckart.lowrank import InputMoments
from eckart.models.experts import Route
from eckart.models.sites import Site, blocks_of
from eckart.support.progress import Track, silent

# The other arguments of a block's call.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# What a block returns after the hidden states; None where it returns them alone.
Tail = tuple[Any, ...] | None


@dataclass
class Recording:
    """One batch on its way: the hidden states it has reached, and the other arguments of every block's call.

    Attributes:
        tail: what the first block returned after the hidden states; every block's output has this form.
    """

    hidden: Tensor
    calls: list[Call]
    tail: Tail = None


@torch.no_grad()
def record_each(
    model: PreTrainedModel, batches: Sequence[tuple[Tensor, Tensor]], track: Track = silent
) -> Iterator[Recording]:
    """Embed one batch after the other and record the masks and position embeddings that the model calls blocks with.

    The blocks themselves do not run (but for the first, once, to see the form of its output): the other arguments do
    not depend on the hidden states.

    Raises:
        ValueError: the blocks are not called once each, in order.
    """
    base, blocks = model.base_model, blocks_of(model)
    options = without_cache(base)
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
    """Inside, a block's forward records its call and passes the hidden states through."""
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
                tails.append(tail_of(output))
            return hidden if tails[0] is None else (hidden, *tails[0])

        return note

    with _replaced(blocks, [stand_in(index, block) for index, block in enumerate(blocks)]):
        yield calls, tails


@contextmanager
def standing_in(blocks: nn.ModuleList, hidden: Tensor, tail: Tail) -> Iterator[None]:
    """Inside, every block returns these hidden states, whatever its input: the modules after the last read them.

    Args:
        tail: what blocks return after them, see `Recording`.
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
                block.forward = earlier  # an instance attribute of another library, as accelerate's for offloading


def shared(value: Any, known: Any) -> Any:
    """`known` where the value equals it, else the value; of tuples, lists and dicts each item.

    All batches of one length are called with the same rotary tables: they are held once for all.
    """
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        alike = (value.shape, value.dtype, value.device) == (known.shape, known.dtype, known.device)
        return known if alike and torch.equal(value, known) else value
    if type(value) in (tuple, list) and type(known) is type(value) and len(value) == len(known):
        return type(value)(shared(*pair) for pair in zip(value, known, strict=True))
    if type(value) is dict and type(known) is dict:
        return {key: shared(item, known.get(key)) for key, item in value.items()}
    return value


def check_rows(name: str, x: Tensor, mask: Tensor, route: Route | None = None) -> None:
    """Raises ValueError where a linear's input (..., d_in) is not one row for each token of the mask, or of a route."""
    rows, tokens = x.shape[:-1].numel(), mask.numel() if route is None else len(route.tokens)
    if rows != tokens:
        raise not_of_tokens(name, f"reads {rows} rows for {tokens} tokens")


def not_of_tokens(name: str, what: str) -> ValueError:
    """The error of a linear whose inputs are not the text's tokens alone: DeBERTa's read relative positions too."""
    return ValueError(
        f"{name} {what}, so that it has no input for each token to take statistics of; exclude it, or give a method "
        "that needs no calibration, such as svd"
    )


@contextmanager
def summing_inputs(
    root: nn.Module, readers: Mapping[str, str], sums: Mapping[str, InputMoments]
) -> Iterator[Callable[[Tensor], None]]:
    """Inside, what each linear reads is added to the moments of its input group, in place.

    Args:
        root: the model, or a block of it.
        readers: {input group: path of its first reader}. sums: {input group: moments}, of the same groups.

    Yields: what is to be told the mask of a batch's tokens before its forward pass.

    Raises:
        ValueError: an input that is not finite or not one row for each token, or a second one in a forward pass (names
            the group).
    """
    masks: list[Tensor] = []
    seen: set[str] = set()
    routes = Routes(root, readers.values())

    def expect(mask: Tensor) -> None:
        masks[:] = [mask]
        seen.clear()

    def watch(group: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if group in seen:
                raise not_of_tokens(group, "is called more than once by its block")
            seen.add(group)
            route = routes.of(readers[group])
            check_rows(group, args[0], masks[0], route)
            try:
                add_rows(sums[group], args[0], masks[0], route)
            except ValueError as error:
                raise ValueError(f"{group}: {error}") from error

        return add

    handles = [root.get_submodule(path).register_forward_pre_hook(watch(group)) for group, path in readers.items()]
    try:
        with routes.watched():
            yield expect
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    return output[0] if isinstance(output, tuple | list) else output


def tail_of(output: Any) -> Tail:
    """What a block's output has after the hidden states."""
    return tuple(output[1:]) if isinstance(output, tuple | list) else None


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument by which a model keeps no keys and values of what it reads; none of one that never does."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


class Walk:
    """Hidden states of all batches, advancing block by block.

    Attributes:
        next: the block at whose door they are.
        calls: of each batch, the other arguments of every block's call.
        tail: what blocks return after the hidden states.

    Args:
        batches: (ids, mask) of each.
        held: where they are kept between blocks; default in memory.
        start: the block at whose door `held` has them already; None to embed them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[tuple[Tensor, Tensor]],
        track: Track = silent,
        *,
        held: Doors | None = None,
        start: int | None = None,
    ) -> None:
        self.blocks = blocks_of(model)
        self.track = track
        self.held: Doors = held or Held()
        self.masks = [mask for _, mask in batches]
        self.calls: list[list[Call]] = []
        self.tail: Tail = None
        for index, recording in enumerate(record_each(model, batches, track)):
            if start is None:
                self.held.write(index, recording.hidden)
            self.calls.append(shared(recording.calls, self.calls[-1] if self.calls else None))
            self.tail = recording.tail
            del recording
        if start is None:
            self.held.turn()
        self.next = start or 0

    @torch.no_grad()
    def moments(self, number: int, groups: dict[str, Site], needs: frozenset[str]) -> dict[str, InputMoments]:
        """Run the blocks up to and with `number`, and return its moments."""
        self.skip(number - 1)
        device = self.held.read(0).device
        collected = {group: InputMoments(site.d_in, needs, device=device) for group, site in groups.items()}
        readers = {group: site.role for group, site in groups.items()}
        with summing_inputs(self.blocks[number], readers, collected) as expect:
            for _ in self._advance(f"block {number}: moments", expect):
                pass
        return {group: collected.pop(group).compact() for group in list(collected)}

    @torch.no_grad()
    def skip(self, number: int) -> None:
        """Run the blocks up to and with `number`, without moments."""
        while self.next <= number:
            for _ in self._advance(f"block {self.next}: forward"):
                pass

    def _advance(self, description: str, expect: Callable[[Tensor], None] = lambda _: None) -> Iterator[Tensor]:
        """Run the next block on every batch; yields each batch's mask once its forward pass is done.

        Args:
            expect: is given each batch's mask before its forward pass.
        """
        block = self.blocks[self.next]
        for index, mask in self.track(enumerate(self.masks), description, len(self.masks)):
            args, kwargs = self.calls[index][self.next]
            expect(mask)
            self.held.write(index, hidden_of(block(self.held.read(index), *args, **kwargs)))
            yield mask
        self.held.turn()
        self.next += 1
