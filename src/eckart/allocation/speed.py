"""Speed as a budget: how many times as fast the compressed model is to be, and what each rank takes on a machine.

The seconds of a model's step are those of its selected linears and a rest (embeddings, attention, head, other linears),
which no rank changes:

    speed = (rest + sum_l dense_l) / (rest + sum_l seconds_l(r_l))

so a speed is a budget on sum_l seconds_l(r_l), as a share kept is one on the numbers stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from eckart.allocation.costs import pays_nothing
from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit, units_of
from eckart.support.plain_data import parse_json


@dataclass(frozen=True)
class Speed:
    """How fast the compressed model is to be, by a table of this machine.

    Attributes:
        times: tokens per second over the dense model's, at least 1.
        rows: tokens at a time. 1 is generating; more is reading a prompt of so many.

    Raises:
        ValueError: one is out of range.
    """

    times: float
    rows: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.times < math.inf:
            raise ValueError(f"speed {self.times:g} is not 1 or more: it is a multiple of the dense model's speed")
        if self.rows < 1:
            raise ValueError(f"speed: rows {self.rows} is not positive")

    def __str__(self) -> str:
        return f"speed {self.times:g}"


@dataclass(frozen=True)
class Shape:
    """What a unit's time depends on: its width, and of each linear in it how many outputs and whether a bias."""

    d_in: int
    d_outs: tuple[int, ...]
    biases: tuple[bool, ...]

    @classmethod
    def of(cls, unit: Unit) -> Shape:
        return cls(unit.d_in, tuple(site.d_out for site in unit.sites), tuple(site.has_bias for site in unit.sites))


@dataclass(frozen=True)
class LinearTimes:
    """Nanoseconds of one unit.

    Attributes:
        dense: of its dense linears together.
        ranks: ascending, where the low-rank unit was timed. low_rank: its times there, with one right factor for all
            the linears in it.

    Raises:
        ValueError: no ranks, ranks that do not ascend, a time for each is missing, or a time is not positive.
    """

    shape: Shape
    dense: int
    ranks: tuple[int, ...]
    low_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or len(self.ranks) != len(self.low_rank):
            raise ValueError(f"ranks {self.ranks} and times {self.low_rank} are not two lists of one length")
        if min(self.dense, self.ranks[0], *self.low_rank) < 1:
            raise ValueError(f"{self.shape}: a rank or a time is not positive")

    @cached_property
    def by_rank(self) -> list[int]:
        """The time at rank 0, 1, ... : between ranks that were timed on the line, and never below a smaller rank's."""
        at = np.arange(self.ranks[-1] + 1)
        never_less = np.maximum.accumulate(self.low_rank)
        return [round(time) for time in np.interp(at, self.ranks, never_less).tolist()]


@dataclass(frozen=True)
class SpeedTable:
    """What a model's linears take on a machine, dense and at every rank, and what a whole step takes.

    Attributes:
        rows: tokens at a time, as of `Speed`.
        layout: of the low-rank linears.
        step: nanoseconds of a step of the dense model.
        linears: every shape of a unit, once.
        machine: where it was measured, in words.
    """

    rows: int
    layout: Layout
    step: int
    linears: tuple[LinearTimes, ...]
    machine: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _by_shape(self) -> dict[Shape, LinearTimes]:
        return {times.shape: times for times in self.linears}

    def cost(self, unit: Unit, rank: int | None, layout: Layout) -> int:
        """Nanoseconds of the unit at this rank; None is dense. A `Cost`.

        Past the last rank that was timed a rank costs what that one does.

        Raises:
            ValueError: the table is of another layout, or has no such unit.
        """
        times = self._by_shape.get(Shape.of(unit))
        if times is None or layout != self.layout:
            raise ValueError(f"{unit.name}: the table of speeds, of {self.layout} factors, has no such {layout} linear")
        return times.dense if rank is None else times.by_rank[min(rank, len(times.by_rank) - 1)]

    def dense(self, sites: Sequence[Site]) -> int:
        """Nanoseconds of these linears, dense."""
        return sum(self.cost(Unit((site,)), None, self.layout) for site in sites)

    def rest(self, sites: Sequence[Site]) -> int:
        """Nanoseconds of a step that are not in these linears. None where they alone are timed longer than a step."""
        return max(self.step - self.dense(sites), 0)

    def budget(
        self,
        speed: Speed,
        sites: Sequence[Site],
        *,
        joint: Collection[str] = (),
        members: bool = False,
        rank_multiple: int = 1,
    ) -> int:
        """Nanoseconds that the selected `sites` may take together; at `times` 1 their dense ones.

        Args:
            joint: input groups whose sites share a right factor. members: where that is better, else they do not.

        Raises:
            ValueError: too fast even at the smallest ranks; the message says what is the most, and why.
        """
        rest, dense = self.rest(sites), self.dense(sites)
        budget = math.floor((rest + dense) / speed.times) - rest
        least = sum(self._least(unit, members, rank_multiple) for unit in units_of(sites, joint))
        if budget < least:
            most = math.floor(100 * (rest + dense) / (rest + least)) / 100
            raise ValueError(
                f"{speed}: too fast, the most is {most:.2f} on this machine ({describe_rows(self.rows)}), with every "
                f"selected linear at its fastest: {rest / (rest + dense):.0%} of the dense model's time is not in the "
                "selected linears (embeddings, attention, head); ask for less, or choose more linears"
            )
        return min(budget, dense)

    def modelled(self, plan: RankPlan, sites: Sequence[Site]) -> float:
        """The speed of a plan for these selected sites, over the dense model's."""
        selected = set(sites)
        units = [unit for unit in plan.units if unit.sites[0] in selected]
        rest, dense = self.rest(sites), self.dense(sites)
        taken = sum(self.cost(unit, plan.rank(unit.sites[0]), self.layout) for unit in units)
        return (rest + dense) / (rest + taken)

    def facts(self, speed: Speed, plan: RankPlan, sites: Sequence[Site]) -> dict[str, Any]:
        """For JSON: what was asked for, what the table makes of the plan, and what it is made of."""
        rest, dense = self.rest(sites), self.dense(sites)
        return {
            "asked": speed.times,
            "modelled": round(self.modelled(plan, sites), 4),
            "rows": self.rows,
            "dense_step_seconds": (rest + dense) / 1e9,
            "share_in_linears": round(dense / (rest + dense), 4),
            "machine": self.machine,
        }

    def _least(self, unit: Unit, members: bool, rank_multiple: int) -> int:
        """Nanoseconds of the unit at its fastest."""
        paid = not pays_nothing(unit, rank_multiple, self.layout, self.cost)
        least = self.cost(unit, rank_multiple if paid else None, self.layout)
        if members and len(unit.sites) > 1:
            least = min(least, sum(self._least(Unit((site,)), False, rank_multiple) for site in unit.sites))
        return least

    def to_json(self) -> str:
        """To be kept, and read back by `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> SpeedTable:
        """The table in `text`.

        Args:
            where: names it in the message.

        Raises:
            ValueError: it is none.
        """
        data = parse_json(text, where)
        try:
            linears = [
                LinearTimes(
                    Shape(entry["shape"]["d_in"], tuple(entry["shape"]["d_outs"]), tuple(entry["shape"]["biases"])),
                    int(entry["dense"]),
                    tuple(map(int, entry["ranks"])),
                    tuple(map(int, entry["low_rank"])),
                )
                for entry in data["linears"]
            ]
            return cls(int(data["rows"]), data["layout"], int(data["step"]), tuple(linears), dict(data["machine"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is no table of speeds: {error!r}") from error


def describe_rows(rows: int) -> str:
    """How many tokens at a time, in words."""
    return "generating, one token at a time" if rows == 1 else f"reading prompts of {rows} tokens"
