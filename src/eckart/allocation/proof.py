"""Proof: the true optimum of a knapsack, by branching on large steps and going through all small ones.

Solvers of integer programmes do not get there: where hundreds of linears have thousands of ranks, a great many choices
are equally good to five digits, and HiGHS spends a minute on a few hundred options without raising its bound.
"""

from __future__ import annotations

import numpy as np

from eckart.allocation.lagrange import Relaxed, Table, relax, spend

# What rounding in sums of a few hundred float64 losses can do to a value, as a share of it: two solutions nearer to
# each other than this are equally good.
ROUNDING = 1e-12
# Partial choices that are gone through before it is tried to do with fewer by branching. Branching raises the bound
# and thins them out, but starts anew, so each branch may hold a little more of them: some search always ends. Measured
# on 224 items with 4096 options: 2,000 and 10,000 take as long, 20,000 that double with each branch twenty times that.
PARTIAL, GROWTH = 5000, 1.15
# Multipliers next to the best one, as shares of it, whose bounds rule out partial choices that cost far too much or too
# little for the remaining options to make up for it.
NEARBY = (0.8, 0.95, 1.05, 1.2)


def prove(table: Table, columns: np.ndarray, budget: int) -> np.ndarray:
    """A choice that no other within the budget betters by more than ROUNDING of the loss.

    Branch and bound: the multiplier's bound for a table rules it out, or its core is gone through, or it is split in
    two at the item whose step from under to over the budget is largest, which is to a dense weight as a rule. The bound
    is loose by the part of that step which the budget cuts off, and tight in each of the two.

    Args:
        columns: a choice that fits, the better the faster.

    Cost: for 224 items of 4096 options some seconds where all costs are multiples of one step, as those of plain
    factors are, and up to a minute where they are not.
    """

    def loss(choice: np.ndarray) -> float:
        return table.sums(choice)[1]

    best = columns
    branches = [(table, float(PARTIAL))]
    while branches:
        branch, partial = branches.pop()
        if branch.sums(np.isfinite(branch.losses).argmax(axis=1))[0] > budget:
            continue
        relaxed = relax(branch, budget)
        best = min(best, spend(branch, relaxed.fits, budget), key=loss)
        target = loss(best) - ROUNDING * (abs(loss(best)) + relaxed.multiplier * budget)
        if relaxed.bound >= target or relaxed.multiplier == 0:
            continue
        better, complete = _core(branch, relaxed, budget, target - relaxed.bound, partial)
        if better is not None:
            best = min(best, better, key=loss)
        if complete:
            continue
        step = np.abs(branch.take(relaxed.over)[0] - branch.take(relaxed.fits)[0])
        row = step.argmax()
        cheaper = np.ones(branch.costs.shape, bool)
        cheaper[row, max(relaxed.fits[row], relaxed.over[row]) :] = False
        dearer = cheaper.copy()
        dearer[row] = ~dearer[row]
        branches += [(branch.only(cheaper), partial * GROWTH), (branch.only(dearer), partial * GROWTH)]
    return best


def _core(table: Table, relaxed: Relaxed, budget: int, gap: float, partial: float) -> tuple[np.ndarray | None, bool]:
    """(a choice that loses less than bound + gap, or None; whether no choice is better than this one).

    With s >= 0 the unspent budget, loss = bound + sum_i reduced_i(x_i) + multiplier s, where reduced >= 0 is what an
    option adds to its item's minimum of loss + multiplier cost. So only options that add less than the gap matter: the
    core. Its items are put together one by one (dynamic programming), those with the least to lose first, and every
    better choice that turns up on the way narrows the gap. A partial choice is (cost, reduced); it is dropped when
    another costs no more and loses no more, or when a bound says that it cannot be completed within the gap.

    It is given up when more than `partial` of them are held.
    """
    rows = np.arange(len(table.costs))
    values = table.losses + relaxed.multiplier * table.costs
    reduced = values - values.min(axis=1, keepdims=True)
    # The choice that fits takes minima as well, up to rounding. Going out from it, small steps fill the budget.
    base = np.where(reduced[rows, relaxed.fits] < gap, relaxed.fits, reduced.argmin(axis=1))
    dearer = table.costs - table.take(base)[0][:, None]
    spare = budget - table.sums(base)[0]
    others = reduced.copy()
    others[rows, base] = np.inf
    nearest = others.min(axis=1)
    core = np.argsort(nearest)
    core = core[nearest[core] < gap]
    slopes = [(share - 1) * relaxed.multiplier for share in NEARBY]
    least = np.array([(reduced[core] + slope * dearer[core]).min(axis=1) for slope in slopes])
    # The least that the items still to come add, for each multiplier.
    to_come = np.concatenate([least[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((len(slopes), 1))], axis=1)

    cost, lost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[int, np.ndarray, np.ndarray]] = []
    best: tuple[int, int] | None = None
    if spare >= 0 and relaxed.multiplier * spare < gap:
        gap, best = relaxed.multiplier * spare, (-1, 0)
    for number, row in enumerate(core.tolist()):
        options = np.flatnonzero(reduced[row] < gap)
        costs = (cost[:, None] + dearer[row, options]).ravel()
        losses = (lost[:, None] + reduced[row, options]).ravel()
        bounds = losses.copy()
        for slope, rest in zip(slopes, to_come[:, number + 1], strict=True):
            np.maximum(bounds, losses + slope * (costs - spare) + rest, out=bounds)
        kept = np.flatnonzero(bounds < gap)
        kept = kept[np.lexsort((losses[kept], costs[kept]))]
        if not len(kept):
            return _choice(base, steps, best), True
        total = losses[kept] - relaxed.multiplier * costs[kept]  # the loss itself, but for a constant
        kept = kept[np.append(True, total[1:] < np.minimum.accumulate(total)[:-1])]
        cost, lost = costs[kept], losses[kept]
        steps.append((row, options, kept))
        complete = np.where(cost <= spare, lost + relaxed.multiplier * (spare - cost), np.inf)
        if complete.min() < gap:
            gap, best = complete.min(), (number, int(complete.argmin()))
        if len(kept) > partial:
            return _choice(base, steps, best), number == len(core) - 1
    return _choice(base, steps, best), True


def _choice(
    base: np.ndarray, steps: list[tuple[int, np.ndarray, np.ndarray]], best: tuple[int, int] | None
) -> np.ndarray | None:
    """The columns of partial choice `best` (step, place), with the other items as in `base`."""
    if best is None:
        return None
    columns, (number, place) = base.copy(), best
    for row, options, kept in reversed(steps[: number + 1]):
        place, option = divmod(int(kept[place]), len(options))
        columns[row] = options[option]
    return columns
