"""Shares: the same share of every selected linear, or shares in given proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eckart.allocation.costs import Cost
from eckart.allocation.curves import Curve
from eckart.allocation.fitting import bare, check_multiple, fit, share_rank
from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank import Layout
from eckart.models.sites import Site, matches
from eckart.models.units import Unit


def uniform(
    sites: Sequence[Site],
    units: Sequence[Unit | Curve],
    budget: int,
    *,
    layout: Layout = "plain",
    rank_multiple: int = 1,
    cost: Cost = Unit.num_stored,
) -> RankPlan:
    """The same share at every unit: the largest at which the ranks of SFSD Eq. 3 (or the pivoted layout's) fit.

    Each rank is rounded down to what its share holds, and to a multiple, never below one.

    Args:
        sites: every site of the model; those in no unit stay dense.
        units: what the budget is shared among; of curves, only the sites are read.
        budget: how many numbers the units may store together, or cost by `cost`.

    Raises:
        ValueError: the smallest ranks take more than `budget`.
    """
    check_multiple(rank_multiple)
    return fit(
        sites,
        bare(units),
        budget,
        lambda unit, share: share_rank(unit, share, layout, rank_multiple),
        1.0,
        layout=layout,
        cost=cost,
    )


def per_role(
    sites: Sequence[Site],
    units: Sequence[Unit | Curve],
    budget: int,
    *,
    shares: Mapping[str, float],
    layout: Layout = "plain",
    rank_multiple: int = 1,
    cost: Cost = Unit.num_stored,
) -> RankPlan:
    """Shares in given proportions, {"mlp": 2, "attention": 1}, as large together as the budget lets them be.

    A unit keeps the share factor x weight of its numbers, and is dense from 1 on; the factor is the largest that fits.
    The plainest way to treat roles apart, as a baseline for those that look at losses.

    Args:
        sites: every site of the model; those in no unit stay dense.
        units: what the budget is shared among; of curves, only the sites are read.
        budget: how many numbers the units may store together, or cost by `cost`.
        shares: {role, part or shell pattern, as in `select_sites`: weight}; the first that names a site decides, and
            a site that none names has weight 1.
        rank_multiple: round ranks down to a multiple, never below one.

    Raises:
        ValueError: a weight that is not positive, a name that matches nothing, sites of one joint group with different
            weights, or the smallest ranks take more than `budget`.
    """
    check_multiple(rank_multiple)
    bare_units = bare(units)
    for pattern, weight in shares.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"shares: {pattern!r} has weight {weight}, which is not positive")
        if not any(matches(site, pattern) for unit in bare_units for site in unit.sites):
            roles = ", ".join(dict.fromkeys(site.role for unit in bare_units for site in unit.sites))
            raise ValueError(f"shares: {pattern!r} matches no selected site; roles: {roles}")
    weights = {unit.name: _weight(unit, shares) for unit in bare_units}
    return fit(
        sites,
        bare_units,
        budget,
        lambda unit, factor: share_rank(unit, factor * weights[unit.name], layout, rank_multiple),
        1 / min(weights.values(), default=1),
        layout=layout,
        cost=cost,
    )


def _weight(unit: Unit, shares: Mapping[str, float]) -> float:
    weights = {next((share for pattern, share in shares.items() if matches(site, pattern)), 1.0) for site in unit.sites}
    if len(weights) > 1:
        raise ValueError(
            f"shares: the linears of joint {unit.name} have the weights {', '.join(map(str, sorted(weights)))}; they "
            "are factored as one and need one"
        )
    return weights.pop()
