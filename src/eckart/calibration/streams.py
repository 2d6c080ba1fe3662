"""Streams: hidden states of all batches in the dense model and in the compressed one, block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.calls import Call, record, shared
from eckart.calibration.doors import Doors, Held
from eckart.calibration.pausing import Read, Run
from eckart.calibration.routes import add_rows, both_routes, mean_of_experts
from eckart.calibration.walk import check_rows, summing_inputs
from eckart.calibration.weights import Weights, rows_weighed
from eckart.data.tokens import Tokens
from eckart.lowrank import InputMoments
from eckart.models.experts import every_expert, layer_role
from eckart.models.sites import Site, blocks_of, stacks_of
from eckart.support.progress import Track, silent

# Bytes of main memory that waiting runs may hold, by estimate; batches beyond it are run from the door again for every
# group. It changes memory and time, and no number.
WAITING_BYTES = 2**30
# Tensors of the hidden states' width, and of the widest input's, that a block has in memory while it waits.
NARROW, WIDE = 6, 2

# What a linear reads of a batch, and of which tokens; None for all.
# Opens the doors of a stream by its name, with its states at the given one first.
OpenDoors = Callable[[str, int], Doors]


def hold(_name: str, _first: int) -> Doors:
    """Doors in memory."""
    return Held()


@dataclass(frozen=True)
class Sample:
    """One batch at the door of a block.

    Attributes:
        hidden: (batch, length, width) output of the compressed blocks before it; of an encoder-decoder's decoder after
            the encoder's states.
        call: the other arguments of the block's call.
        mask: (batch, length), True for real tokens that the block's own states are of.
        target: the dense block's output on the dense stream, of those tokens.
    """

    hidden: Tensor
    call: Call
    mask: Tensor
    target: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """A block's output on it."""
        return self.call.run(block, self.hidden)[:, self.call.start :]

    @property
    def own(self) -> Tensor:
        """The states that the block adds to."""
        return self.call.own(self.hidden)

    def cast(self, dtype: torch.dtype) -> Sample:
        """The same in another float type, masks and rotary tables included; `target` stays as it is."""
        if self.hidden.dtype == dtype:
            return self
        return replace(self, hidden=self.hidden.to(dtype), call=self.call.cast(dtype))


class Samples(Sequence[Sample]):
    """Every batch at the door of a block as a `Sample`, read when it is asked for.

    Args:
        streams: the dense one at the next block's door already.
    """

    def __init__(self, streams: Streams, indices: range | None = None) -> None:
        self.streams = streams
        self.indices = range(len(streams.batches)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.streams, self.indices[index])
        at, streams = self.indices[index], self.streams
        call, rows = streams.call("compressed", at), streams.batches[at]
        target = streams.read("dense", at)[:, call.start :]
        mask = rows.mask_of(source=streams.number < streams.encoders)
        return Sample(streams.read("compressed", at), call, mask, target)


class Streams:
    """Hidden states of all batches in one or both models; those held out come last.

    Attributes:
        number: the block at whose door they are. Within a block's turn a stream may be at the next door already.
        batches: of both texts.
        encoders: how many of the blocks are an encoder-decoder's encoder's.
        first_held_out: index of the first batch that is held out.

    Args:
        names: "dense", "compressed" or both.
        open_doors: where they are kept.
        start: the block at whose door the states of these streams are already, {stream: doors}; of the first name's at
            least, which stands for the others up to the first block that is compressed. None to embed the text.
        judged: whether the held-out samples have moments of their own. They are as large as those of calibration.
        reference: the model that the dense stream goes through, from its embedding on, where the compressed one is a
            model of its own; None where `model` is the dense one until its blocks are compressed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        held_out: Tokens | None,
        batch_size: int,
        names: Sequence[str],
        *,
        open_doors: OpenDoors = hold,
        start: tuple[int, Mapping[str, Doors]] | None = None,
        judged: bool = True,
        reference: PreTrainedModel | None = None,
        track: Track = silent,
    ) -> None:
        self.blocks, self.track, self.names, self.open_doors = blocks_of(model), track, tuple(names), open_doors
        self.dense_blocks = self.blocks if reference is None else blocks_of(reference)
        self.number = 0 if start is None else start[0]
        # Those that embed the text: one for both streams, or of two models each its own.
        embedding = dict.fromkeys(self.names[:1], model)
        if reference is not None:
            embedding = {name: reference if name == "dense" else model for name in self.names}
        self.doors = {name: open_doors(name, 0) for name in embedding} if start is None else dict(start[1])
        self.encoders = sum(map(len, stacks_of(model)[:-1]))
        self.batches = batches = tokens.rows(batch_size)
        self.first_held_out = len(batches)
        if held_out is not None:
            batches += held_out.rows(batch_size)
        # Batches from this one on have no moments.
        self.measured = len(batches) if judged else self.first_held_out
        # Of each batch, the other arguments of every block's call.
        self._calls: dict[str, list[list[Call]]] = {name: [] for name in embedding}
        for name, source in embedding.items():
            calls = self._calls[name]
            for index, rows in track(enumerate(batches), "embedding", len(batches)):
                recording = record(source, rows)
                if start is None:
                    self.doors[name].write(index, recording.hidden)
                calls.append(shared(recording.calls, calls[-1] if calls else None))
                del recording
            if start is None:
                self.doors[name].turn()
        self.ahead: set[str] = set()
        # What tokens weigh in the moments of the block's input groups, where they do not weigh alike.
        self.weights: Weights = {}

    def call(self, name: str, index: int) -> Call:
        """What a batch of a stream calls the block with, other than hidden states."""
        return (self._calls.get(name) or self._calls[self.names[0]])[index][self.number]

    def read(self, name: str, index: int) -> Tensor:
        """A batch of a stream, at the door that the stream has reached."""
        return (self.doors.get(name) or self.doors[self.names[0]]).read(index)

    def separate(self) -> None:
        """From here on each stream has states of its own."""
        for name in self.names[1:]:
            if name not in self.doors:
                own = self.open_doors(name, self.number)
                for index in range(len(self.batches)):
                    own.write(index, self.read(name, index))
                own.turn()
                self.doors[name] = own

    @torch.no_grad()
    def go_on(self, names: Collection[str] | None = None) -> None:
        """Run the block, as it is now, on these streams, unless they are at the next door already.

        Args:
            names: None for all, which ends the block's turn.
        """
        for name in self.doors if names is None else names:
            if name in self.ahead:
                continue
            block = (self.dense_blocks if name == "dense" else self.blocks)[self.number]
            what = f"block {self.number}: {name if len(self.doors) > 1 else 'forward'}"
            for index in self.track(range(len(self.batches)), what, len(self.batches)):
                self.doors[name].write(index, self.call(name, index).run(block, self.read(name, index)))
            self._turn(name)
        if names is None:
            self.ahead.clear()
            self.number += 1

    def gather(
        self, block: nn.Module, readers: Mapping[str, Site], needs: frozenset[str]
    ) -> dict[str, tuple[InputMoments, InputMoments]]:
        """{input group: (calibration, held-out) moments} of the dense stream, which is at the next door then.

        Cost: one forward pass of the block.
        """
        paths = {group: {group: site.role} for group, site in readers.items()}
        collected = {group: self._start(site, needs) for group, site in readers.items()}
        visited: set[str] = set()
        for index in self.track(range(len(self.batches)), f"block {self.number}: moments", len(self.batches)):
            run = Run(block, self.read("dense", index), self.call("dense", index), paths)
            while not isinstance(reached := run.advance(), Tensor):
                ((group, read),) = reached[1].items()
                visited.add(group)
                if index < self.measured:
                    self._add(collected[group], index, readers[group], {"dense": read})
            self.doors["dense"].write(index, reached)
            _check_all_read(readers, visited)
        self._turn("dense")
        return {group: _compact(collected.pop(group)) for group in list(collected)}

    def meet(
        self,
        blocks: Mapping[str, nn.Module],
        readers: Mapping[str, Mapping[str, Site]],
        needs: frozenset[str],
        onward: Collection[str] = (),
        known: Mapping[str, InputMoments] | None = None,
    ) -> Iterator[dict[str, tuple[InputMoments, InputMoments]]]:
        """One group after the other, as they are read: {input group: its (calibration, held-out) moments}.

        The sites of a group may be replaced once its moments were yielded: what is read after them is computed then.

        Args:
            blocks: {stream: the block that it goes through}. With both, xh is what the compressed one reads and the
                dense one is the reference.
            readers: as `joint_readers` has them.
            onward: streams of `blocks` that are to be at the next door at the end.
            known: {input group: moments of what the dense block reads on the calibration tokens}, of any groups; with
                both streams they are not summed again.

        Raises:
            ValueError: a site is not called by its block, or more than once, or in an order that depends on the text;
                an input is not finite.

        Cost: one forward pass of each block, which waits at every group. Of batches that do not fit `WAITING_BYTES`,
        for each group another one up to where it is read.
        """
        runs = _Runs(self, blocks, readers)
        while (group := runs.next_group()) is not None:
            reference = (known or {}).get(group) if len(blocks) > 1 and layer_role(group) is None else None
            yield self._meet_at(group, runs, readers[group], needs, reference)
        for name in onward:
            if name in blocks:
                what = f"block {self.number}: {name}"
                for index in self.track(range(len(self.batches)), what, len(self.batches)):
                    self.doors[name].write(index, runs.finish(name, index))
                self._turn(name)

    @torch.no_grad()
    def means(
        self,
        block: nn.Module,
        readers: Mapping[str, Site],
        needs: frozenset[str],
        known: Mapping[str, InputMoments] | None = None,
    ) -> dict[str, InputMoments]:
        """{role of the experts of a layer: moments of all their tokens in the dense stream}, towards which the moments
        of an expert with few tokens are shrunk. Where those of two streams are needed, both are this one.

        Args:
            block: the dense one. readers, needs, known: as in `meet`.

        Cost: a forward pass of the block, where not all that is needed is known; nothing in a block without experts.
        """
        paths = {path: site.d_in for site in readers.values() for path in every_expert(block, site.role)}
        if not paths:
            return {}
        first = next(iter(readers.values()))
        prefix = first.name.removesuffix(first.role)
        own = frozenset({"second_moment"} if needs & {"second_moment", "cross_moment"} else ())
        sums = {path: (known or {}).get(prefix + path) for path in paths}
        if any(each is None for each in sums.values()):
            device = self.read("dense", 0).device
            fresh = {path: InputMoments(d_in, own, device=device) for path, d_in in paths.items()}
            with summing_inputs(block, {path: path for path in paths}, fresh) as expect:
                for index in self.track(
                    range(self.first_held_out), f"block {self.number}: experts", self.first_held_out
                ):
                    expect(self.batches[index])
                    self.call("dense", index).run(block, self.read("dense", index))
            sums |= fresh
        means = {}
        for layer in {role for path in paths if (role := layer_role(path)) is not None}:
            mean = mean_of_experts(
                each for path, each in sums.items() if each is not None and layer_role(path) == layer
            )
            means[prefix + layer] = mean.doubled() if "cross_moment" in needs else mean
        return means

    def _meet_at(
        self,
        group: str,
        runs: _Runs,
        readers: Mapping[str, Site],
        needs: frozenset[str],
        reference: InputMoments | None,
    ) -> dict[str, tuple[InputMoments, InputMoments]]:
        collected = {name: self._start(site, needs, reference) for name, site in readers.items()}
        for index in self.track(range(self.measured), f"{group}: moments", self.measured):
            seen = runs.advance(index, group)
            for name, moments in collected.items():
                reads = {stream: each[name] for stream, each in seen.items()}
                self._add(moments, index, readers[name], reads)
        runs.passed.append(group)
        return {name: _compact(collected.pop(name)) for name in list(collected)}

    def _start(
        self, site: Site, needs: frozenset[str], reference: InputMoments | None = None
    ) -> tuple[InputMoments, InputMoments]:
        device = self.read(self.names[0], 0).device
        held_out = needs if self.measured > self.first_held_out else frozenset[str]()
        calibration = InputMoments(site.d_in, needs, device=device, reference=reference)
        return calibration, InputMoments(site.d_in, held_out, device=device)

    def _add(
        self, collected: tuple[InputMoments, InputMoments], index: int, site: Site, seen: Mapping[str, Read]
    ) -> None:
        """Add what a batch reads, {stream: input}, to the moments of calibration or of what is held out.

        Args:
            site: the first that reads it.
        """
        batch, group = self.batches[index], site.input_group
        mask, offered = batch.mask_of(source=site.of_source), batch.offered(source=site.of_source)
        for x, route in seen.values():
            check_rows(group, x, mask, route)
        # The compressed stream's weights, where there are both.
        names = sorted(seen, reverse=True)
        route, rows = both_routes({name: seen[name][1] for name in names}, {name: seen[name][0] for name in names})
        x = rows["compressed" if "compressed" in rows else "dense"]
        reference = rows["dense"] if len(rows) > 1 else None
        if reference is not None and reference.dtype != x.dtype:  # of two models
            x, reference = x.float(), reference.float()
        moments = collected[index >= self.first_held_out]
        weights = None
        if index < self.first_held_out:  # what is held out has no gradients
            weights = rows_weighed(self.weights, group, batch, source=site.of_source)
        try:
            add_rows(moments, x, mask, route, offered=offered, reference=reference, weights=weights)
        except ValueError as error:
            raise ValueError(f"{group}: {error}") from error

    def _turn(self, name: str) -> None:
        self.doors[name].turn()
        self.ahead.add(name)


def waiting_bytes(device: torch.device) -> float:
    """Bytes that waiting runs may hold: WAITING_BYTES, on a GPU half of what it has free, if that is more."""
    free = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 0
    return max(WAITING_BYTES, free)


class _Runs:
    """Runs of one block or two on all batches, which wait for each other at every input group.

    Args:
        blocks, readers: as in `Streams.meet`.
    """

    def __init__(
        self, streams: Streams, blocks: Mapping[str, nn.Module], readers: Mapping[str, Mapping[str, Site]]
    ) -> None:
        self.streams, self.blocks = streams, blocks
        self.readers = {group: next(iter(sites.values())) for group, sites in readers.items()}
        self.paths = {group: {name: site.role for name, site in sites.items()} for group, sites in readers.items()}
        self.passed: list[str] = []
        self.waiting: dict[tuple[str, int], Run] = {}
        self.reached: dict[tuple[str, int], tuple[str, dict[str, Read]] | Tensor] = {}
        width, hidden = max(site.d_in for site in self.readers.values()), streams.read(next(iter(blocks)), 0)
        row = hidden.element_size() * (NARROW * hidden.shape[-1] + WIDE * width)
        free = waiting_bytes(hidden.device)
        # Batches before this one wait, those from it on start again for every group.
        self.kept = 0
        for rows in streams.batches[: streams.measured]:
            free -= len(blocks) * rows.mask.numel() * row
            if free < 0:
                break
            self.kept += 1

    def next_group(self) -> str | None:
        """The input group that the block reads next; None where it reads no more.

        Raises:
            ValueError: the block has come to its end and has not read all groups.
        """
        if len(self.passed) == len(self.readers):
            return None
        name = next(iter(self.blocks))
        reached = self.reached[name, 0] = self._step(name, 0)
        if isinstance(reached, Tensor):
            _check_all_read(self.readers, self.passed)
            return None
        return reached[0]

    def advance(self, index: int, group: str) -> dict[str, dict[str, Read]]:
        """{stream: {input group: what the batch's run reads at the group, and of which tokens}}."""
        seen: dict[str, dict[str, Read]] = {}
        for name in self.blocks:
            reached = self.reached.pop((name, index), None)
            reached = self._step(name, index) if reached is None else reached
            if isinstance(reached, Tensor) or reached[0] != group:
                raise ValueError(
                    f"{group}: its block reads its linears in an order that depends on the text; exclude it"
                )
            seen[name] = reached[1]
            if index >= self.kept:
                self.waiting.pop((name, index)).throw()
        return seen

    def finish(self, name: str, index: int) -> Tensor:
        """The block's output on a batch of a stream."""
        run = self.waiting.pop((name, index), None) or self._open(name, index)
        return run.finish()

    def _step(self, name: str, index: int) -> tuple[str, dict[str, Read]] | Tensor:
        run = self.waiting.get((name, index))
        if run is None:
            run = self.waiting[name, index] = self._open(name, index)
        return run.advance()

    def _open(self, name: str, index: int) -> Run:
        streams = self.streams
        hidden, call = streams.read(name, index), streams.call(name, index)
        return Run(self.blocks[name], hidden, call, self.paths, tuple(self.passed))


def _check_all_read(readers: Mapping[str, Site], read: Collection[str]) -> None:
    """Raises ValueError where the block has not read what a site should."""
    for group, site in readers.items():
        if group not in read:
            raise ValueError(f"{site.name} is not called by its block; exclude it")


def _compact(moments: tuple[InputMoments, InputMoments]) -> tuple[InputMoments, InputMoments]:
    return moments[0].compact(), moments[1].compact()
