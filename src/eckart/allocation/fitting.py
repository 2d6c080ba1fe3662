"""Fitting: ranks that grow with one factor, as large as a budget lets them be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eckart.allocation.costs import Cost, pays_nothing
from eckart.allocation.curves import Curve
from eckart.allocation.rank_plan import RankPlan, settle
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit

# Halvings of the bracket: more than a float64 factor has binary digits.
HALVINGS = 60


def fit(
    sites: Sequence[Site],
    units: Sequence[Unit],
    budget: int,
    rank_at: Callable[[Unit, float], int | None],
    largest: float,
    *,
    layout: Layout,
    cost: Cost = Unit.num_stored,
) -> RankPlan:
    """The plan at the largest factor in (0, `largest`] whose units cost no more than `budget` together.

    Args:
        sites: every site of the model.
        rank_at: a unit's rank at a factor; None is dense. It must not be smaller at a larger factor.
        largest: a factor at which every unit is dense.
        cost: what the budget counts.

    Raises:
        ValueError: the smallest ranks cost more than `budget`; the message says how much.

    Cost: some sixty times all units' ranks.
    """
    check_units(units)
    if not units:
        raise ValueError("there is nothing to share a budget among: no linear is selected")

    def ranks(factor: float) -> list[int | None]:
        wanted = [rank_at(unit, factor) for unit in units]
        return [
            None if pays_nothing(unit, rank, layout, cost) else rank for unit, rank in zip(units, wanted, strict=True)
        ]

    def total(choice: Sequence[int | None]) -> int:
        return sum(cost(unit, rank, layout) for unit, rank in zip(units, choice, strict=True))

    low, high = 0.0, largest
    best = ranks(low)
    if total(best) > budget:
        raise ValueError(too_small(budget, total(best)))
    if total(ranks(high)) <= budget:
        best = ranks(high)
    else:
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            choice = ranks(middle)
            if total(choice) <= budget:
                low, best = middle, choice
            else:
                high = middle
    return plan_of(sites, units, best, layout)


def share_rank(unit: Unit, share: float, layout: Layout, rank_multiple: int) -> int | None:
    """The unit's rank at a share of its numbers; None from 1 on, where the dense weight is as small, and exact."""
    if share >= 1:
        return None
    return 1 if share == 0 else unit.rank_for(share, layout, rank_multiple)


def check_multiple(rank_multiple: int) -> None:
    """Raises ValueError unless it is positive."""
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple {rank_multiple} is not positive")


def bare(units: Sequence[Unit | Curve]) -> list[Unit]:
    """The units; of a curve, the unit that it is of."""
    return [unit.unit if isinstance(unit, Curve) else unit for unit in units]


def plan_of(sites: Sequence[Site], units: Sequence[Unit], ranks: Sequence[int | None], layout: Layout) -> RankPlan:
    """The plan in which each site has the rank of its unit, and low-rank units of several sites are joint."""
    named = {site.name: rank for unit, rank in zip(units, ranks, strict=True) for site in unit.sites}
    joint = [unit.group for unit, rank in zip(units, ranks, strict=True) if len(unit.sites) > 1 and rank is not None]
    return settle(sites, named, layout=layout, joint=joint)


def too_small(budget: int, least: int) -> str:
    """What to say of a budget that nothing fits."""
    return (
        f"a budget of {budget:,} numbers is too small: at their smallest ranks the selected linears take {least:,}; "
        "allow more, or lower rank_multiple"
    )


def check_units(units: Sequence[Unit]) -> None:
    """Raises ValueError where a site is in two units."""
    seen: set[str] = set()
    for unit in units:
        for site in unit.sites:
            if site.name in seen:
                raise ValueError(f"{site.name} is in two of the units that a budget is shared among")
            seen.add(site.name)
