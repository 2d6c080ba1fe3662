"""Calls: what a model calls its blocks with, recorded once, so that one block at a time can be run on all batches.

What a model passes to its blocks besides hidden states (masks, rotary tables) does not depend on them. Of an
encoder-decoder one thing does: what the encoder gives, which every block of the decoder reads. It goes with the hidden
states: at the door of a decoder's block they are one tensor, what the encoder gives and after it, along the tokens, the
decoder's own. So a block is a function from the states at its door to those at the next for every model, and gradients
at a door are those of both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.data.pairs import decoder_inputs
from eckart.data.tokens import Rows
from eckart.models.sites import stacks_of

# What a block returns after the hidden states; None where it returns them alone.
Tail = tuple[Any, ...] | None


@dataclass(frozen=True)
class Call:
    """The other arguments of a block's call.

    Attributes:
        start: the first row, along the tokens, of the block's own hidden states at the next door.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return 0

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The states at the next door, of those at the block's."""
        return hidden_of(block(hidden, *self.args, **self.kwargs))

    def own(self, hidden: Tensor) -> Tensor:
        """The part of the states at the block's door that it adds to."""
        return hidden

    def cast(self, dtype: torch.dtype) -> Call:
        """The same in another float type, masks and rotary tables included."""
        return replace(self, args=_cast(self.args, dtype), kwargs=_cast(self.kwargs, dtype))


class _Encoded:
    """Stands for what the encoder gives, among the arguments of a decoder's block."""


ENCODED = _Encoded()


@dataclass(frozen=True)
class DecoderCall(Call):
    """The call of a decoder's block in an encoder-decoder; at its door the encoder's states come before its own.

    Attributes:
        split: how many rows are the encoder's.
        dtype: of those, where the decoder's own are of a wider one, as some of T5's are in float16.
    """

    split: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def start(self) -> int:
        return self.split

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """See `Call`."""
        encoded, own = hidden[:, : self.split].to(self.dtype), hidden[:, self.split :]
        args, kwargs = (_exchanged(given, ENCODED, encoded) for given in (self.args, self.kwargs))
        return torch.cat([encoded, hidden_of(block(own, *args, **kwargs))], 1)

    def own(self, hidden: Tensor) -> Tensor:
        """See `Call`."""
        return hidden[:, self.split :]

    def cast(self, dtype: torch.dtype) -> Call:
        """See `Call`."""
        return DecoderCall(_cast(self.args, dtype), _cast(self.kwargs, dtype), self.split, dtype)


@dataclass(frozen=True)
class FirstDecoderCall(DecoderCall):
    """The call of a decoder's first block; at its door there are the states after the encoder's last block.

    Attributes:
        enter: from those to what a `DecoderCall` reads: the encoder's final norm, and the embedded targets.
    """

    enter: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """See `Call`."""
        return super().run(block, self.enter(hidden))

    def own(self, hidden: Tensor) -> Tensor:
        """See `Call`."""
        return super().own(self.enter(hidden))

    def cast(self, dtype: torch.dtype) -> Call:
        """See `Call`."""
        enter = self.enter
        args, kwargs = _cast(self.args, dtype), _cast(self.kwargs, dtype)
        return FirstDecoderCall(args, kwargs, self.split, dtype, lambda hidden: enter(hidden).to(dtype))


@dataclass
class Recording:
    """One batch on its way: the hidden states it has reached, and the other arguments of every block's call.

    Attributes:
        tail: what the first block returned after the hidden states, of an encoder-decoder the decoder's first; every
            block's output has this form.
    """

    hidden: Tensor
    calls: list[Call]
    tail: Tail = None


@torch.no_grad()
def record(model: PreTrainedModel, rows: Rows) -> Recording:
    """Embed a batch and record the masks and position embeddings that the model calls blocks with.

    The blocks themselves do not run (but for the first of a stack, once, to see the form of its output): the other
    arguments do not depend on the hidden states.

    Raises:
        ValueError: the blocks are not called once each, in order.
    """
    stacks, device = stacks_of(model), model.device
    if rows.split is None:
        base = model.base_model
        ids, attention = rows.ids.to(device), _attention(rows.mask, device)
        with _recording(stacks[0]) as (made, tails):
            base(input_ids=ids, attention_mask=attention, **without_cache(base))
        _check_once_each(model, made, stacks[0])
        return Recording(made[0].hidden, [Call(each.args, each.kwargs) for each in made], tails[0])
    sides = _Sides.of(model, rows)
    with _recording(stacks[0]) as (read, read_tails):
        given = sides.encode()
    _check_once_each(model, read, stacks[0])
    with _recording(stacks[1]) as (made, tails):
        sides.decode(given)
    _check_once_each(model, made, stacks[1])
    enter = _Entrance(sides, stacks, (read_tails[0], tails[0]))
    calls = [Call(each.args, each.kwargs) for each in read]
    for number, each in enumerate(made):
        args, kwargs = (_exchanged(taken, given, ENCODED) for taken in (each.args, each.kwargs))
        calls.append(
            DecoderCall(args, kwargs, rows.split, given.dtype)
            if number
            else FirstDecoderCall(args, kwargs, rows.split, given.dtype, enter)
        )
    return Recording(read[0].hidden, calls, tails[0])


@dataclass(frozen=True)
class _Sides:
    """A batch of pairs and the two stacks that read them."""

    model: PreTrainedModel
    sources: dict[str, Tensor]
    targets: Tensor
    source_mask: Tensor | None
    target_mask: Tensor | None

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Rows) -> _Sides:
        assert rows.split is not None
        device = model.device
        sources, targets = rows.ids.to(device).tensor_split([rows.split], 1)
        masks = (_attention(mask, device) for mask in rows.mask.tensor_split([rows.split], 1))
        read = {"input_ids": sources}
        if rows.sound is not None:
            read = {model.main_input_name: rows.sound.to(device, model.dtype)}
        return cls(model, read, decoder_inputs(model, targets), *masks)

    def encode(self) -> Tensor:
        """What the encoder gives."""
        output = self.model.get_encoder()(**self.sources, attention_mask=self.source_mask)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def decode(self, encoded: Tensor) -> Tensor:
        """What the decoder gives."""
        decoder = self.model.get_decoder()
        seen = {} if self.source_mask is None else {"encoder_attention_mask": self.source_mask}
        output = decoder(
            input_ids=self.targets,
            attention_mask=self.target_mask,
            encoder_hidden_states=encoded,
            **seen,
            **without_cache(decoder),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True)
class _Entrance:
    """From the states after the encoder's last block to those at the decoder's first: see `FirstDecoderCall`.

    Attributes:
        tails: what the blocks of each stack return after them.
    """

    sides: _Sides
    stacks: tuple[nn.ModuleList, ...]
    tails: tuple[Tail, Tail]

    def __call__(self, hidden: Tensor) -> Tensor:
        tail = self.tails[1]
        with standing_in(self.stacks[0], hidden, self.tails[0]):
            encoded = self.sides.encode()
        own: list[Tensor] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            own.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            return own[0] if tail is None else (own[0], *tail)

        with _replaced(self.stacks[1], [note] * len(self.stacks[1])):
            self.sides.decode(encoded)
        return torch.cat([encoded, own[0]], 1)


def run_through(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tail]:
    """What the last block gives, with the states of an encoder-decoder's encoder before its own, and its tail."""
    given: list[Any] = []
    handle = stacks_of(model)[-1][-1].register_forward_hook(lambda _module, _args, output: given.append(output))
    try:
        if rows.split is None:
            base, attention = model.base_model, _attention(rows.mask, model.device)
            base(input_ids=rows.ids.to(model.device), attention_mask=attention, **without_cache(base))
            return hidden_of(given[0]), tail_of(given[0])
        sides = _Sides.of(model, rows)
        encoded = sides.encode()
        sides.decode(encoded)
    finally:
        handle.remove()
    return torch.cat([encoded, hidden_of(given[0])], 1), tail_of(given[0])


@dataclass
class _Made:
    """A call of the block of this number."""

    number: int
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def _recording(blocks: nn.ModuleList) -> Iterator[tuple[list[_Made], list[Tail]]]:
    """Inside, a block's forward records its call and passes the hidden states through."""
    calls: list[_Made] = []
    tails: list[Tail] = []

    def stand_in(index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def note(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            rest = args if len(args) == 0 or args[0] is not hidden else args[1:]
            calls.append(_Made(index, hidden, rest, kwargs))
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


def _check_once_each(model: PreTrainedModel, made: Sequence[_Made], blocks: nn.ModuleList) -> None:
    if [each.number for each in made] != list(range(len(blocks))):
        raise ValueError(
            f"{type(model).__name__} does not call its {len(blocks)} blocks once each in order; "
            "it cannot be calibrated block by block"
        )


def _attention(mask: Tensor, device: torch.device) -> Tensor | None:
    """A mask for a model. One that hides nothing is left out: the attention kernels then need no mask at all."""
    return None if bool(mask.all()) else mask.to(device).long()


def shared(value: Any, known: Any) -> Any:
    """`known` where the value equals it, else the value; of calls, tuples, lists and dicts each item.

    All batches of one length are called with the same rotary tables: they are held once for all.
    """
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        alike = (value.shape, value.dtype, value.device) == (known.shape, known.dtype, known.device)
        return known if alike and torch.equal(value, known) else value
    if type(value) in (tuple, list) and type(known) is type(value) and len(value) == len(known):
        return type(value)(shared(*pair) for pair in zip(value, known, strict=True))
    if type(value) is dict and type(known) is dict:
        return {key: shared(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, Call) and type(known) is type(value):
        items = {each.name: shared(getattr(value, each.name), getattr(known, each.name)) for each in fields(value)}
        return replace(value, **items)
    return value


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    return output[0] if isinstance(output, tuple | list) else output


def tail_of(output: Any) -> Tail:
    """What a block's output has after the hidden states."""
    return tuple(output[1:]) if isinstance(output, tuple | list) else None


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument by which a model keeps no keys and values of what it reads; none of one that never does."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _exchanged(taken: Any, old: object, new: object) -> Any:
    """The arguments with one thing in place of another, in tuples and dicts as well."""
    if taken is old:
        return new
    if isinstance(taken, tuple):
        return tuple(_exchanged(item, old, new) for item in taken)
    if isinstance(taken, dict):
        return {key: _exchanged(item, old, new) for key, item in taken.items()}
    return taken


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with every float tensor in it, in tuples, lists and dicts as well, in the type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
