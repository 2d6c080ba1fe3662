"""Knapsack: one option for each item, so that together they fit a budget and lose the least.

minimise  sum_i loss_i(x_i)   subject to   sum_i cost_i(x_i) <= budget,   x_i an option of item i

the multiple-choice knapsack problem (Sinha and Zoltners 1979; Kellerer, Pferschy and Pisinger 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eckart.allocation.lagrange import Table, relax, spend
from eckart.allocation.proof import prove


@dataclass(frozen=True, eq=False)
class Item:
    """One choice to make.

    Attributes:
        name: for messages.
        costs: (options,) whole numbers, not negative.
        losses: (options,) of the same options.

    Raises:
        ValueError: no options, shapes that differ, a cost that is negative or not whole, a loss that is not finite.
    """

    name: str
    costs: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        costs, losses = np.asarray(self.costs), np.asarray(self.losses, dtype=np.float64)
        if costs.ndim != 1 or costs.shape != losses.shape or not len(costs):
            raise ValueError(
                f"{self.name}: costs {costs.shape} and losses {losses.shape} are not two lists of one length"
            )
        if not np.isfinite(losses).all():
            raise ValueError(f"{self.name}: a loss is not finite")
        if not np.issubdtype(costs.dtype, np.integer) or costs.min() < 0:
            raise ValueError(f"{self.name}: costs are whole numbers from 0")
        object.__setattr__(self, "costs", costs.astype(np.int64))
        object.__setattr__(self, "losses", losses)


@dataclass(frozen=True)
class Solution:
    """A choice for each item.

    Attributes:
        choices: for each item the number of its option.
        cost, loss: of these options together; the cost is within the budget.
        bound: no choice within the budget loses less than this.
    """

    choices: tuple[int, ...]
    cost: int
    loss: float
    bound: float


def solve(items: Sequence[Item], budget: int, *, exact: bool = False) -> Solution:
    """The options of `items` that fit `budget` together and lose the least.

    A multiplier on the cost makes the items independent: each takes the option with the least loss + multiplier x
    cost. The multiplier that spends the budget best is found between two that bracket it; it gives a lower bound on
    every solution (Lagrange duality), and what its choice leaves over is spent on upgrades. The result is at most one
    item's step from the bound.

    Args:
        exact: go on to the true optimum, up to rounding (`proof.prove`).

    Raises:
        ValueError: no items, or even the cheapest options do not fit the budget; the message says what they take.

    Cost: a few dozen passes over all options, which are held as one (items, options) table.
    """
    if not items:
        raise ValueError("there is nothing to choose: no items")
    table = Table.of([item.costs for item in items], [item.losses for item in items])
    least = int(table.costs[:, 0].sum())
    if budget < least:
        raise ValueError(f"a budget of {budget} is too small: the cheapest options take {least} together")
    relaxed = relax(table, budget)
    columns = spend(table, relaxed.fits, budget)
    if exact:
        columns = prove(table, columns, budget)
    cost, loss = table.sums(columns)
    choices = table.order[np.arange(len(columns)), columns]
    return Solution(tuple(choices.tolist()), cost, loss, loss if exact else min(relaxed.bound, loss))


def lower_hull(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The options, by rising cost, that some multiplier on the cost makes the best.

    The first is the cheapest, the last loses the least. Each loses less than the one before it, at a falling rate.
    """
    hull: list[int] = []
    rates: list[float] = []  # from the one before
    cost, loss = costs.tolist(), losses.tolist()
    for option in np.lexsort((losses, costs)).tolist():
        if hull and (cost[option] == cost[hull[-1]] or loss[option] >= loss[hull[-1]]):
            continue
        rate = np.inf
        while hull:
            rate = (loss[hull[-1]] - loss[option]) / (cost[option] - cost[hull[-1]])
            if not rates or rate < rates[-1]:
                break
            hull.pop()
            rates.pop()
        if hull:
            rates.append(rate)
        hull.append(option)
    return np.array(hull)
