"""A table of speeds for the tests, made up: a linear takes a call's time and as long as it has numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from eckart.allocation import SpeedTable
from eckart.allocation.speed import LinearTimes, Shape
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit, units_of


def table(
    sites: Sequence[Site],
    *,
    rest: int = 5000,
    call: int = 40,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    rows: int = 1,
    grid: int = 3,
) -> SpeedTable:
    """Nanoseconds: of a call `call`, of a number ten; outside of the linears `rest`."""

    def dense(unit: Unit) -> int:
        return sum(call + 10 * site.num_params for site in unit.sites)

    shapes = {Shape.of(unit): unit for unit in (*units_of(sites), *units_of(sites, joint))}
    linears = []
    for shape, unit in shapes.items():
        ranks = tuple(sorted({1, *range(grid, min(unit.d_out, unit.d_in) + 1, grid)}))
        calls = call * (1 + len(unit.sites))
        low_rank = tuple(calls + 10 * unit.num_stored(rank, layout) for rank in ranks)
        linears.append(LinearTimes(shape, dense(unit), ranks, low_rank))
    step = rest + sum(dense(Unit((site,))) for site in sites)
    return SpeedTable(rows, layout, step, tuple(linears), {"name": "made up", "dtype": "float32"})
