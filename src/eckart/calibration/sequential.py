"""Sequential: blocks compressed in order, each calibrated on the outputs of the compressed blocks before it.

Two streams of hidden states walk through the model: one through its dense blocks, one through the blocks as they are
once compressed. Inside a block the input groups follow in the order in which the block reads them, so that the output
projection is already calibrated on the compressed q, k and v. Some samples are held out: no statistic sees them, and
a pass over a block (see `passes`) is undone unless it lowers the loss on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.doors import Doors
from eckart.calibration.moments import BlockCalibration, check_readable, gather_gradients, weighing_readers
from eckart.calibration.routes import mean_gradients
from eckart.calibration.streams import OpenDoors, Sample, Samples, Streams, hold
from eckart.calibration.weights import group_weights
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, InputMoments, Method
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.models.experts import layer_role
from eckart.models.sites import Site, default_sites, first_readers, joint_readers
from eckart.support.memory import give_back
from eckart.support.progress import Track, silent

# What a site is calibrated on: the dense model's inputs; the compressed model's; or the compressed model's inputs with
# the dense model's outputs as target.
Order = Literal["one-shot", "sequential", "anchored"]


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


# From a block's number to {input group: the dense model's moments}, of any groups.
KnownInputs = Callable[[int], Mapping[str, InputMoments]]


class BlockPass(Protocol):
    """Improves a block whose sites are replaced, in place, or leaves it as it was."""

    def __call__(
        self, number: int, block: nn.Module, samples: Sequence[Sample], held_out: Sequence[Sample], track: Track
    ) -> PassReport | None: ...


class SequentialCalibration:
    """The moments of one input group after another; give them to `compress`, which replaces sites as they come.

    It can be iterated once. `reports` fills with the results of the passes.

    Args:
        model: dense; `compress` changes it on the way. With a `reference`: compressed, as a quantised one is, and
            changed further on the way.
        tokens: calibration samples. held_out: samples held out, for passes and refits.
        judged: whether a part has moments of the held-out samples too, by which a refit is judged.
        method: for what it needs. An anchored one (`Method.anchored`) is for order "anchored", and only for it.
        order: see `Order`.
        sites: those that will be replaced; default all.
        joint: `Site.joint_group`s whose sites will share a right factor.
        gradients: of these sites, if they were gathered before.
        reference: the dense model, where `model` is compressed already; for order "anchored".
        known: the dense model's moments on `tokens`, where they were taken before; for order "anchored".
        passes: applied in turn to each block once its sites are replaced.
        batch_size: rows at a time; it changes memory and speed only, but for passes that take steps, where it
            changes numbers.

    Raises:
        ValueError: as `calibrate_by_block`; an order that does not fit the method; passes without held-out samples.

    Cost: one forward pass of each stream, see `Streams.meet`; a second one of the compressed stream with passes.
    Memory: the hidden states of both streams, a second copy of one block, and what its waiting runs hold.
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
        joint: Collection[str] = (),
        gradients: dict[str, GradientMoments] | None = None,
        reference: PreTrainedModel | None = None,
        known: KnownInputs | None = None,
        passes: Sequence[BlockPass] = (),
        judged: bool = True,
        batch_size: int = 8,
        track: Track = silent,
    ) -> None:
        if (order == "anchored") != (method.anchor is not None):
            raise ValueError(f"order {order!r} and {method.name}, anchored at {method.anchor}, do not fit together")
        if passes and held_out is None:
            raise ValueError("a pass is tested on held-out samples: hold some out")
        self.model, self.tokens, self.method, self.order, self.held_out = model, tokens, method, order, held_out
        self.sites = default_sites(model) if sites is None else tuple(sites)
        self.gradients, self.passes, self.batch_size, self.track = gradients, tuple(passes), batch_size, track
        if reference is not None and order != "anchored":
            raise ValueError(f"a reference is for order 'anchored', and not for {order!r}: leave it out")
        self.joint = frozenset(joint)
        self.judged, self.known, self.reference = judged, known, reference
        # The dense model's, while it is one: what tokens weigh is of all linears that read an input, cut or not.
        self.readers = weighing_readers(reference or model, method)
        self.reports: list[PassReport] = []
        self.started = False

    def __iter__(self) -> Iterator[BlockCalibration]:
        self.begin()
        streams = self.open_streams()
        for number in range(1 + self.last):
            yield from self.walk(streams, number)

    def begin(self) -> None:
        """Check the samples, and gather the gradients that were not given: before the first block.

        Raises:
            ValueError: the model cannot read the samples, or it was begun before.
        """
        if self.started:
            raise ValueError("this calibration was walked through already, and the model is compressed: make a new one")
        self.started = True
        for tokens in (self.tokens, self.held_out):
            for model in (self.model, self.reference):
                if tokens is not None and model is not None:
                    check_readable(model, tokens)
        if self.gradients is None:
            dense = self.reference or self.model
            self.gradients = gather_gradients(dense, self.tokens, self.method, sites=self.sites, track=self.track)

    @property
    def last(self) -> int:
        """The last block with sites; -1 where there are none."""
        return max((site.block for site in self.sites), default=-1)

    @property
    def names(self) -> list[str]:
        """The streams that the order and the passes need."""
        return [
            *(["dense"] if self.order != "sequential" or self.passes else []),
            *(["compressed"] if self.order != "one-shot" or self.passes else []),
        ]

    def open_streams(
        self, open_doors: OpenDoors = hold, start: tuple[int, Mapping[str, Doors]] | None = None
    ) -> Streams:
        """The streams at the first block's door, or where `start` has them; see `Streams`."""
        return Streams(
            self.model,
            self.tokens,
            self.held_out,
            self.batch_size,
            self.names,
            open_doors=open_doors,
            start=start,
            judged=self.judged,
            reference=self.reference,
            track=self.track,
        )

    def walk(
        self, streams: Streams, number: int, gradients: Mapping[str, GradientMoments] | None = None
    ) -> Iterator[BlockCalibration]:
        """The parts of block `number`, then its passes.

        Args:
            streams: at the door of the block; at the next one's afterwards, unless this is the last.
            gradients: of the block's sites, for what tokens weigh, where they are not those of all blocks.
        """
        sites = [site for site in self.sites if site.block == number]
        if sites:
            known = (self.gradients or {}) if gradients is None else gradients
            streams.weights = group_weights(known, self._readers_of(sites), self.tokens)
            streams.separate()
            yield from self._parts(streams, number, sites)
            self._run_passes(streams, number)
        if number < self.last:
            streams.go_on()

    def pass_by(self, streams: Streams, number: int, put_back: Callable[[], None]) -> None:
        """Take the streams to the next door through a block that was compressed before.

        Args:
            put_back: puts in place what replaced the block's sites.
        """
        if any(site.block == number for site in self.sites):
            streams.separate()
            streams.go_on({"dense"} & {*streams.names})
            put_back()
        streams.go_on()

    def _readers_of(self, sites: Sequence[Site]) -> list[Site]:
        """All linears, cut or not, that read what these do."""
        groups = {site.input_group for site in sites}
        return [site for site in self.readers if site.input_group in groups]

    def _parts(self, streams: Streams, number: int, sites: Sequence[Site]) -> Iterator[BlockCalibration]:
        """The parts of a block. The dense stream goes on to the next door meanwhile, where anything reads it there.

        The copy of the dense block is gone when this ends, and the moments of a part before the next ones are made:
        nothing here has a name for them.
        """
        block, needs = streams.blocks[number], self.method.needs & INPUT_STATISTICS
        readers = first_readers(sites)
        onward = {"dense"} & {*streams.names} if number < self.last or self.passes else set()
        if not needs:
            streams.go_on(onward)
            yield self._part(number, sites, {})
        elif self.order == "one-shot":
            yield self._part(number, sites, streams.gather(block, readers, needs))
        else:
            blocks = {"compressed": block}
            if self.order == "anchored":
                blocks["dense"] = streams.dense_blocks[number] if self.reference else _copy(block)
            else:
                streams.go_on(onward)
            if number < self.last and not self.passes:
                onward.add("compressed")
            known = None if self.known is None else self.known(number)
            means = streams.means(blocks.get("dense", block), readers, needs, known)
            roles = {role for site in sites if (role := layer_role(site.name)) is not None}
            gradient_means = mean_gradients(self.gradients or {}, roles) if roles else {}
            together = joint_readers(sites, self.joint)
            for moments in streams.meet(blocks, together, needs, onward, known):
                read = [site for site in sites if site.input_group in moments]
                yield self._part(number, read, moments, means, gradient_means)
                del moments
                give_back()

    def _run_passes(self, streams: Streams, number: int) -> None:
        """Every pass over the block, in place; `reports` gets the result of each."""
        for work in self.passes:
            samples, split = Samples(streams), streams.first_held_out
            report = work(number, streams.blocks[number], samples[:split], samples[split:], self.track)
            if report is not None:
                self.reports.append(report)

    def _part(
        self,
        number: int,
        sites: Sequence[Site],
        moments: dict[str, tuple[InputMoments, InputMoments]],
        means: dict[str, InputMoments] | None = None,
        gradient_means: dict[str, GradientMoments] | None = None,
    ) -> BlockCalibration:
        """The statistics of some sites of a block; moments are (calibration, held-out) ones."""
        return BlockCalibration(
            number,
            {group: calibrated for group, (calibrated, _) in moments.items()},
            self._gradients_of(sites),
            {group: held_out for group, (_, held_out) in moments.items() if held_out.total},
            means or {},
            gradient_means or {},
        )

    def _gradients_of(self, sites: Sequence[Site]) -> dict[str, GradientMoments]:
        """Their gradient statistics, of those that have any."""
        gradients = self.gradients or {}
        return {site.name: gradients[site.name] for site in sites if site.name in gradients}


def _copy(block: nn.Module) -> nn.Module:
    """A copy of a block, without the graphs of what it has kept of the last text: states of a recurrence."""
    for module in block.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())
    return copy.deepcopy(block)
