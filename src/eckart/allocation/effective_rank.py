"""Effective: ranks in proportion to how many directions a linear really uses."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.allocation.costs import Cost
from eckart.allocation.curves import Curve
from eckart.allocation.fitting import bare, check_multiple, fit
from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit


def effective_rank(
    sites: Sequence[Site],
    curves: Sequence[Curve],
    budget: int,
    *,
    layout: Layout = "plain",
    rank_multiple: int = 1,
    cost: Cost = Unit.num_stored,
) -> RankPlan:
    """Ranks in proportion to the effective ranks of the loss curves (Roy and Vetterli, EUSIPCO 2007).

    rank = factor x exp(entropy of the normalised singular values), rounded down to a multiple of `rank_multiple` and at
    least one multiple; dense where its factors store no less. The factor is the largest that fits. Weights of curves
    play no part.

    Args:
        sites: every site of the model; those of no curve stay dense.
        budget: how many numbers the curves' sites may store together, or cost by `cost`.

    Raises:
        ValueError: the smallest ranks take more than `budget`, or a site is in two curves.
    """
    check_multiple(rank_multiple)
    effective = {curve.name: curve.effective_rank for curve in curves}

    def rank_at(unit: Unit, factor: float) -> int:
        rank = int(factor * effective[unit.name])
        return max(rank - rank % rank_multiple, rank_multiple)

    units = bare(curves)
    # Every rank is past full here, one multiple's rounding included.
    largest = max(((unit.d_in + rank_multiple) / effective[unit.name] for unit in units), default=1.0)
    return fit(sites, units, budget, rank_at, largest, layout=layout, cost=cost)
