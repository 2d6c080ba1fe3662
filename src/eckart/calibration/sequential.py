"""Sequential: blocks compressed in order, each calibrated on the outputs of the compressed blocks before it.

Two streams of hidden states walk through the model: one through its dense blocks, one through the blocks as they are
once compressed. Inside a block the input groups follow in the order in which the block reads them, so that the output
projection is already calibrated on the compressed q, k and v. Some samples are held out: no statistic sees them, and
a pass over a block (see `passes`) is undone unless it lowers the loss on them.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.moments import BlockCalibration, check_readable, gather_gradients
from eckart.calibration.walk import check_rows, hidden_of, not_of_tokens, record_calls
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, InputMoments, Method
from eckart.lowrank.moments import INPUT_STATISTICS
from eckart.models.sites import Site, blocks_of, find_sites, first_readers
from eckart.support.progress import Track, silent

# What a site is calibrated on: the dense model's inputs; the compressed model's; or the compressed model's inputs with
# the dense model's outputs as target.
Order = Literal["one-shot", "sequential", "anchored"]


@dataclass(frozen=True)
class Sample:
    """One batch at the door of a block.

    Attributes:
        hidden: (batch, length, width) output of the compressed blocks before it.
        args, kwargs: the other arguments of the block's call.
        mask: (batch, length), True for real tokens.
        target: the dense block's output on the dense stream.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor
    target: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """A block's output on it."""
        return hidden_of(block(self.hidden, *self.args, **self.kwargs))

    def cast(self, dtype: torch.dtype) -> Sample:
        """The same in another float type, masks and rotary tables included; `target` stays as it is."""
        if self.hidden.dtype == dtype:
            return self
        return replace(
            self, hidden=self.hidden.to(dtype), args=_cast(self.args, dtype), kwargs=_cast(self.kwargs, dtype)
        )


@dataclass(frozen=True)
class PassReport:
    """The result of a pass over one block, or over the model: its loss on the held-out tokens, before and after.

    Attributes:
        name: of the pass.
        place: "block 3", or "model".
        kept: whether it lowered the loss. One that did not was undone; but a recovery, whose losses are of the samples
            that it took steps on, is always kept.
    """

    name: str
    place: str
    before: float
    after: float
    kept: bool


class BlockPass(Protocol):
    """Improves a block whose sites are replaced, in place, or leaves it as it was."""

    def __call__(
        self, number: int, block: nn.Module, samples: Sequence[Sample], held_out: Sequence[Sample], track: Track
    ) -> PassReport | None: ...


class SequentialCalibration:
    """The moments of one input group after another; give them to `compress`, which replaces sites as they come.

    It can be iterated once. `reports` fills with the results of the passes.

    Args:
        model: dense; `compress` changes it on the way.
        tokens: calibration samples. held_out: samples held out, for passes and refits.
        method: for what it needs. An anchored one (`Method.anchored`) is for order "anchored", and only for it.
        order: see `Order`.
        sites: those that will be replaced; default all.
        gradients: of these sites, if they were gathered before.
        passes: applied in turn to each block once its sites are replaced.
        batch_size: rows at a time; it changes memory and speed only, but for passes that take steps, where it
            changes numbers.

    Raises:
        ValueError: as `calibrate_by_block`; an order that does not fit the method; passes without held-out samples.

    Cost: one forward pass of each stream, and for each input group of a block another one up to where it is read.
    Memory: the hidden states of both streams, and a second copy of one block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        method: Method,
        *,
        order: Order = "anchored",
        held_out: Tokens | None = None,
        sites: Sequence[Site] | None = None,
        gradients: dict[str, GradientMoments] | None = None,
        passes: Sequence[BlockPass] = (),
        batch_size: int = 8,
        track: Track = silent,
    ) -> None:
        if (order == "anchored") != (method.anchor is not None):
            raise ValueError(f"order {order!r} and {method.name}, anchored at {method.anchor}, do not fit together")
        if passes and held_out is None:
            raise ValueError("a pass is tested on held-out samples: hold some out")
        self.model, self.tokens, self.method, self.order, self.held_out = model, tokens, method, order, held_out
        self.sites = find_sites(model) if sites is None else tuple(sites)
        self.gradients, self.passes, self.batch_size, self.track = gradients, tuple(passes), batch_size, track
        self.reports: list[PassReport] = []
        self.started = False

    def __iter__(self) -> Iterator[BlockCalibration]:
        if self.started:
            raise ValueError("this calibration was walked through already, and the model is compressed: make a new one")
        self.started = True
        for tokens in (self.tokens, self.held_out):
            if tokens is not None:
                check_readable(self.model, tokens)
        if self.gradients is None:
            self.gradients = gather_gradients(self.model, self.tokens, self.method, sites=self.sites, track=self.track)
        streams = _Streams(self.model, self.tokens, self.held_out, self.batch_size, self.track)
        last = max((site.block for site in self.sites), default=-1)
        for number, block in enumerate(streams.blocks):
            sites = [site for site in self.sites if site.block == number]
            if not sites:
                streams.advance(block, block)
                continue
            targets = yield from self._block(streams, number, block, sites, last=number == last)
            if number == last:
                return
            streams.turn(block, targets)

    def _block(
        self, streams: _Streams, number: int, block: nn.Module, sites: Sequence[Site], *, last: bool
    ) -> Generator[BlockCalibration, None, list[Tensor]]:
        """The parts of a block, then its passes; returns the dense block's output on every batch.

        The copy of the dense block is gone when it returns, and the moments of a part before the next ones are made:
        nothing here has a name for them.
        """
        dense = copy.deepcopy(block)
        needs = self.method.needs & INPUT_STATISTICS
        if not needs:
            yield self._part(number, sites, {})
        elif self.order == "one-shot":
            groups = first_readers(sites).items()
            yield self._part(
                number, sites, {group: streams.moments({"dense": (dense, site)}, needs) for group, site in groups}
            )
        else:
            for group, site in streams.in_order(dense, first_readers(sites)):
                readings = {"compressed": (block, site)}
                if self.order == "anchored":
                    readings["dense"] = (dense, site)
                members = [member for member in sites if member.input_group == group]
                yield self._part(number, members, {group: streams.moments(readings, needs)})
        if last and not self.passes:
            return []
        targets = streams.through(dense, "dense")
        self._run_passes(streams, number, block, targets)
        return targets

    def _run_passes(self, streams: _Streams, number: int, block: nn.Module, targets: list[Tensor]) -> None:
        """Every pass over the block, in place; `reports` gets the result of each."""
        samples, split = streams.samples(number, targets), streams.first_held_out
        for work in self.passes:
            report = work(number, block, samples[:split], samples[split:], self.track)
            if report is not None:
                self.reports.append(report)

    def _part(
        self, number: int, sites: Sequence[Site], moments: dict[str, tuple[InputMoments, InputMoments]]
    ) -> BlockCalibration:
        """The statistics of some sites of a block; moments as `_Streams.moments` returns them."""
        gradients = self.gradients or {}
        return BlockCalibration(
            number,
            {group: calibrated for group, (calibrated, _) in moments.items()},
            {site.name: gradients[site.name] for site in sites if site.name in gradients},
            {group: held_out for group, (_, held_out) in moments.items() if held_out.count},
        )


class _Streams:
    """Hidden states of all batches in both models, at the door of block `number`; those held out come last."""

    def __init__(
        self, model: PreTrainedModel, tokens: Tokens, held_out: Tokens | None, batch_size: int, track: Track
    ) -> None:
        self.blocks, self.track, self.number = blocks_of(model), track, 0
        batches = tokens.batches(batch_size)
        self.first_held_out = len(batches)
        if held_out is not None:
            batches += held_out.batches(batch_size)
        self.masks = [mask for _, mask in batches]
        recordings = record_calls(model, batches, track)
        self.calls = [recording.calls for recording in recordings]
        self.hidden = {name: [recording.hidden for recording in recordings] for name in ("dense", "compressed")}

    def advance(self, block: nn.Module, dense: nn.Module) -> None:
        """Both streams through a block that is not replaced; in one run where they are still the same."""
        through = self.through(dense, "dense")
        same = all(a is b for a, b in zip(self.hidden["dense"], self.hidden["compressed"], strict=True))
        self.hidden["compressed"] = through if same else self.through(block, "compressed")
        self.hidden["dense"] = through
        self.number += 1

    def turn(self, block: nn.Module, targets: list[Tensor]) -> None:
        """Both streams to the next block's door, given the dense block's outputs."""
        self.hidden["compressed"] = self.through(block, "compressed")
        self.hidden["dense"] = targets
        self.number += 1

    @torch.no_grad()
    def through(self, block: nn.Module, stream: str) -> list[Tensor]:
        """A block's output on every batch of a stream."""
        outputs = []
        batches = zip(self.hidden[stream], self.calls, strict=True)
        for hidden, calls in self.track(batches, f"block {self.number}: {stream}", len(self.calls)):
            args, kwargs = calls[self.number]
            outputs.append(hidden_of(block(hidden, *args, **kwargs)))
        return outputs

    @torch.no_grad()
    def moments(
        self, places: dict[str, tuple[nn.Module, Site]], needs: frozenset[str]
    ) -> tuple[InputMoments, InputMoments]:
        """(calibration, held-out) moments of an input group: of what its first site reads in the streams of `places`.

        Args:
            places: {stream: (block, site)}. With both streams xh is the compressed one's and the dense one is the
                reference.
        """
        reading = "compressed" if "compressed" in places else "dense"
        site = places[reading][1]
        device = self.hidden[reading][0].device
        moments = InputMoments(site.d_in, needs, device=device), InputMoments(site.d_in, needs, device=device)
        batches = zip(range(len(self.calls)), self.masks, strict=True)
        for index, mask in self.track(batches, f"{site.input_group}: moments", len(self.calls)):
            seen = {
                stream: _read(block, site, self.hidden[stream][index], *self.calls[index][self.number])
                for stream, (block, site) in places.items()
            }
            check_rows(site.input_group, seen[reading], mask)
            reference = seen["dense"] if "cross_moment" in needs else None
            try:
                moments[index >= self.first_held_out].update(
                    seen[reading], mask.to(seen[reading].device), reference=reference
                )
            except ValueError as error:
                raise ValueError(f"{site.input_group}: {error}") from error
        return moments[0].compact(), moments[1].compact()

    @torch.no_grad()
    def in_order(self, block: nn.Module, groups: dict[str, Site]) -> list[tuple[str, Site]]:
        """The input groups in the order in which the block reads them."""
        seen: list[str] = []
        with _watching({group: block.get_submodule(site.role) for group, site in groups.items()}, seen):
            args, kwargs = self.calls[0][self.number]
            block(self.hidden["dense"][0], *args, **kwargs)
        order = list(dict.fromkeys(seen))
        for group in order:
            if seen.count(group) > 1:
                raise not_of_tokens(group, "is called more than once by its block")
        return [(group, groups[group]) for group in order + [group for group in groups if group not in order]]

    def samples(self, number: int, targets: list[Tensor]) -> list[Sample]:
        """Every batch at the door of a block, with the dense block's output on the dense stream."""
        return [
            Sample(hidden, *calls[number], mask, target)
            for hidden, calls, mask, target in zip(
                self.hidden["compressed"], self.calls, self.masks, targets, strict=True
            )
        ]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with every float tensor in it, in tuples, lists and dicts as well, in the type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


class _Reached(Exception):
    """The block reached the linear whose input is read; the rest of it need not run."""


def _read(block: nn.Module, site: Site, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a site of the block reads. The block runs no further than that."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = block.get_submodule(site.role).register_forward_pre_hook(stop)
    try:
        block(hidden, *args, **kwargs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"{site.name} is not called by its block; exclude it")
    return seen[0]


@contextmanager
def _watching(modules: dict[str, nn.Module], seen: list[str]) -> Iterator[None]:
    """Inside, each call of one of the modules notes its name."""
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: seen.append(name))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
