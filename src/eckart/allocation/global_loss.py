"""Optimal: the ranks that lose the least together, out of all that a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eckart.allocation.costs import Cost
from eckart.allocation.curves import Curve
from eckart.allocation.fitting import check_multiple, check_units, plan_of, too_small
from eckart.allocation.knapsack import Item, lower_hull, solve
from eckart.allocation.rank_plan import RankPlan, settle
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit

# A rank for each of some units.
Choice = list[tuple[Unit, int | None]]


def global_(
    sites: Sequence[Site],
    curves: Sequence[Curve],
    budget: int,
    *,
    layout: Layout = "plain",
    rank_multiple: int = 1,
    exact: bool = False,
    cost: Cost = Unit.num_stored,
) -> RankPlan:
    """The ranks, or dense, that lose the least: minimise sum weight_l loss_l(r_l) with sum cost_l(r_l) <= budget.

    A multiple-choice knapsack (METHODS, Allocation) with the multiples of `rank_multiple` that save something, and the
    dense weight at no loss, as options of each curve. See `knapsack.solve`.

    An input group may come with the curves of its sites and with the curve of all of them as one stack; whichever is
    better is taken. Both are then one choice: any option of the stack, or the separate sites' options along their
    common lower convex hull, which are those that some price per number makes the best.

    Args:
        sites: every site of the model; those of no curve stay dense.
        budget: how many numbers the curves' sites may store together, or cost by `cost`.
        exact: the true optimum of that choice; else within a step of it.

    Raises:
        ValueError: the smallest ranks take more than `budget`; or a site is in two curves, other than its own and
            that of its whole group.
    """
    check_multiple(rank_multiple)
    if not curves:
        raise ValueError("there is nothing to share a budget among: no linear is selected")
    options = [_options(group, layout, rank_multiple, cost) for group in _groups(curves)]
    least = sum(int(option.item.costs.min()) for option in options)
    if budget < least:
        raise ValueError(too_small(budget, least))
    named = {site.name: site for curve in curves for site in curve.sites}
    if budget >= sum(cost(Unit((site,)), None, layout) for site in named.values()):
        return settle(sites, dict.fromkeys(named), layout=layout)
    solution = solve([option.item for option in options], budget, exact=exact)
    picked = [pair for option, at in zip(options, solution.choices, strict=True) for pair in option.choice(at)]
    return plan_of(sites, [unit for unit, _ in picked], [rank for _, rank in picked], layout)


@dataclass(frozen=True)
class _Options:
    """A choice to make, and what each of its options means."""

    item: Item
    choice: Callable[[int], Choice]


def _groups(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Curves whose ranks are decided together: one, or a joint one (first) and those of its sites."""
    alone = [curve for curve in curves if len(curve.sites) == 1]
    joint = [curve for curve in curves if len(curve.sites) > 1]
    check_units([curve.unit for curve in alone])
    check_units([curve.unit for curve in joint])
    by_name = {curve.name: curve for curve in alone}
    groups = []
    for curve in joint:
        members = [by_name.pop(site.name) for site in curve.sites if site.name in by_name]
        if members and len(members) < len(curve.sites):
            raise ValueError(
                f"joint {curve.name} is of {len(curve.sites)} linears, and only {len(members)} of them have curves of "
                "their own; give all or none"
            )
        groups.append([curve, *members])
    return groups + [[curve] for curve in by_name.values()]


def _options(group: Sequence[Curve], layout: Layout, rank_multiple: int, cost: Cost) -> _Options:
    first, *members = group
    item, ranks = first.item(layout, rank_multiple, cost)
    if not members:
        return _Options(item, lambda at: [(first.unit, ranks[at])])
    made = [member.item(layout, rank_multiple, cost) for member in members]
    costs, losses, columns = _merge([separate for separate, _ in made])

    def choice(at: int) -> Choice:
        if at < len(ranks):
            return [(first.unit, ranks[at])]
        picked = columns[at - len(ranks)]
        return [
            (member.unit, own[column]) for member, (_, own), column in zip(members, made, picked.tolist(), strict=True)
        ]

    both = Item(item.name, np.concatenate([item.costs, costs]), np.concatenate([item.losses, losses]))
    return _Options(both, choice)


def _merge(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(costs, losses, options of each item (choices, items)) along the lower convex hull of all combinations.

    The hull of a sum is the sum of the hulls: the steps of all of them, those that gain the most for their cost first.
    """
    hulls = [lower_hull(item.costs, item.losses) for item in items]
    steps = np.concatenate([np.full(len(hull) - 1, which) for which, hull in enumerate(hulls)])
    dearer = np.concatenate([np.diff(item.costs[hull]) for item, hull in zip(items, hulls, strict=True)])
    gains = np.concatenate([-np.diff(item.losses[hull]) for item, hull in zip(items, hulls, strict=True)])
    order = np.argsort(-gains / dearer, kind="stable")
    taken = np.zeros((len(order) + 1, len(items)), np.int64)
    taken[np.arange(1, len(order) + 1), steps[order]] = 1
    columns = np.stack([hull[at] for hull, at in zip(hulls, taken.cumsum(axis=0).T, strict=True)], axis=1)
    costs = sum((item.costs[at] for item, at in zip(items, columns.T, strict=True)), np.zeros(len(columns), np.int64))
    losses = sum((item.losses[at] for item, at in zip(items, columns.T, strict=True)), np.zeros(len(columns)))
    return costs, losses, columns
