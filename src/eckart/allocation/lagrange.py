"""Lagrange: choices that a multiplier on the cost makes for each item alone, and the bound that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Table:
    """All options as (items, options), each row by rising cost; short rows are filled up with what is never taken.

    A choice is an array "columns" (items,): the place of one option in each row.

    Attributes:
        costs, losses: (items, options). What is not to be taken has an infinite loss.
        order: (items, options) where the option stands in its item.
    """

    costs: np.ndarray
    losses: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, costs: Sequence[np.ndarray], losses: Sequence[np.ndarray]) -> Table:
        shape = (len(costs), max(map(len, costs)))
        table = cls(np.zeros(shape, np.int64), np.full(shape, np.inf), np.zeros(shape, np.int64))
        for row, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            by_cost = np.lexsort((loss, cost))
            table.costs[row] = cost.max()
            table.costs[row, : len(cost)] = cost[by_cost]
            table.losses[row, : len(cost)] = loss[by_cost]
            table.order[row, : len(cost)] = by_cost
        return table

    def take(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(costs, losses), each (items,), of a choice."""
        rows = np.arange(len(columns))
        return self.costs[rows, columns], self.losses[rows, columns]

    def sums(self, columns: np.ndarray) -> tuple[int, float]:
        """(cost, loss) of a choice."""
        costs, losses = self.take(columns)
        return int(costs.sum()), float(losses.sum())

    def only(self, allowed: np.ndarray) -> Table:
        """The table with other options than the `allowed` (items, options) never taken."""
        return Table(self.costs, np.where(allowed, self.losses, np.inf), self.order)


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What `relax` gives.

    Attributes:
        fits: the best choice of a multiplier that fits the budget.
        over: the choice on the other side of the best multiplier; the same where the budget is no limit.
        bound: no choice within the budget loses less.
        multiplier: that gives the bound.
    """

    fits: np.ndarray
    over: np.ndarray
    bound: float
    multiplier: float


def relax(table: Table, budget: int) -> Relaxed:
    """The multiplier that bounds the loss best: the maximum of sum_i min (loss + multiplier cost) - multiplier budget.

    The function is concave and made of straight lines, one for each choice: (loss, cost - budget). Between a choice
    that fits and one that does not, the next multiplier is where their lines cross; when the minimum there lies on
    them, that is the top. The cheapest choice must fit the budget.
    """
    fits = np.isfinite(table.losses).argmax(axis=1)  # rows run by cost, then by loss
    over = table.losses.argmin(axis=1)  # the first, so the cheapest of those that lose the least
    (fits_cost, fits_loss), (over_cost, over_loss) = table.sums(fits), table.sums(over)
    if over_cost <= budget:
        return Relaxed(over, over, over_loss, 0.0)
    bound, multiplier = over_loss, 0.0
    while True:
        crossing = (fits_loss - over_loss) / (over_cost - fits_cost)
        columns = (table.losses + crossing * table.costs).argmin(axis=1)
        cost, loss = table.sums(columns)
        value = loss + crossing * (cost - budget)
        if value > bound:
            bound, multiplier = value, crossing
        if cost <= budget and cost != fits_cost and loss < fits_loss:
            fits, fits_cost, fits_loss = columns, cost, loss
        elif cost > budget and cost != over_cost and loss > over_loss:
            over, over_cost, over_loss = columns, cost, loss
        else:
            return Relaxed(fits, over, bound, multiplier)


def spend(table: Table, columns: np.ndarray, budget: int) -> np.ndarray:
    """The choice `columns`, which fits, after upgrades with what it leaves of the budget.

    First in bulk: what stopped the multiplier was one large step, to a dense weight, say. Without the options that do
    not fit any more, the same search goes on below it. Then one by one, the best gain per cost first.
    """
    while True:
        costs, losses = table.take(columns)
        spare = budget - costs.sum()
        better = relax(table.only(table.costs <= costs[:, None] + spare), budget).fits
        if not table.sums(better)[1] < losses.sum():
            break
        columns = better
    columns = columns.copy()
    while True:
        costs, losses = table.take(columns)
        spare = budget - costs.sum()
        dearer, gain = table.costs - costs[:, None], losses[:, None] - table.losses
        # An option that costs no more and loses less comes before all others: as if it cost a millionth.
        rate = np.where((gain > 0) & (dearer <= spare), gain / np.maximum(dearer, 1e-6), 0)
        row, column = np.unravel_index(rate.argmax(), rate.shape)
        if rate[row, column] == 0:
            return columns
        columns[row] = column
