"""Costs: what a budget counts, in whole numbers: the numbers that are stored, or the nanoseconds of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from eckart.lowrank import Layout
from eckart.models.units import Unit

# cost(unit, rank, layout); rank None is dense. It does not fall with the rank. `Unit.num_stored` is the numbers stored.
Cost: TypeAlias = Callable[[Unit, int | None, Layout], int]


def pays_nothing(unit: Unit, rank: int | None, layout: Layout, cost: Cost = Unit.num_stored) -> bool:
    """Whether the rank is full, or its factors store or cost no less than the dense weight."""
    return (
        rank is None
        or rank >= min(unit.d_out, unit.d_in)
        or unit.num_stored(rank, layout) >= unit.num_params
        or cost(unit, rank, layout) >= cost(unit, None, layout)
    )
