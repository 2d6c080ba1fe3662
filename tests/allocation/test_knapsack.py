"""The knapsack: laws, against trying everything, and against HiGHS."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from eckart.allocation.knapsack import Item, Solution, lower_hull, solve

# Whole losses meet each other often, and then choices tie; fractions seldom do.
LOSSES = st.one_of(st.integers(-5, 20).map(float), st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 6)))
OPTIONS = st.lists(st.tuples(st.integers(0, 30), LOSSES), min_size=1, max_size=6)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=4)


def items_of(options: Sequence[Sequence[tuple[int, float]]]) -> list[Item]:
    return [
        Item(f"item {number}", np.array([c for c, _ in own]), np.array([loss for _, loss in own]))
        for number, own in enumerate(options)
    ]


def least(items: Sequence[Item]) -> int:
    return sum(int(item.costs.min()) for item in items)


def by_trying_all(items: Sequence[Item], budget: int) -> float:
    return min(
        sum(float(item.losses[at]) for item, at in zip(items, choice, strict=True))
        for choice in itertools.product(*(range(len(item.costs)) for item in items))
        if sum(int(item.costs[at]) for item, at in zip(items, choice, strict=True)) <= budget
    )


def check(items: Sequence[Item], budget: int, solution: Solution) -> None:
    """What is said of the choice is so."""
    picked = list(zip(items, solution.choices, strict=True))
    assert solution.cost == sum(item.costs[at] for item, at in picked) <= budget
    assert solution.loss == pytest.approx(sum(item.losses[at] for item, at in picked))
    assert solution.bound <= solution.loss


@given(ITEMS, st.integers(0, 60))
def test_bound_optimum_and_bisection_are_in_order(options: list[list[tuple[int, float]]], spare: int) -> None:
    items = items_of(options)
    budget = least(items) + spare
    quick, exact, optimum = solve(items, budget), solve(items, budget, exact=True), by_trying_all(items, budget)
    check(items, budget, quick)
    check(items, budget, exact)
    assert exact.loss == pytest.approx(optimum, abs=1e-9)
    assert exact.bound == exact.loss
    assert quick.bound - 1e-9 <= optimum <= quick.loss + 1e-9


@given(ITEMS, st.integers(0, 60), st.integers(0, 30))
def test_more_budget_never_hurts(options: list[list[tuple[int, float]]], spare: int, more: int) -> None:
    items = items_of(options)
    budget = least(items) + spare
    less, richer = (solve(items, size, exact=True).loss for size in (budget, budget + more))
    assert richer <= less + 1e-9


@given(ITEMS, st.integers(0, 60), st.tuples(st.integers(0, 30), LOSSES))
def test_one_more_option_never_hurts(
    options: list[list[tuple[int, float]]], spare: int, more: tuple[int, float]
) -> None:
    items = items_of(options)
    budget = least(items) + spare
    wider = items_of([[*options[0], more], *options[1:]])
    assert solve(wider, budget, exact=True).loss <= solve(items, budget, exact=True).loss + 1e-9


@given(ITEMS)
def test_a_budget_for_everything_takes_the_least_losses(options: list[list[tuple[int, float]]]) -> None:
    items = items_of(options)
    everything = solve(items, sum(int(item.costs.max()) for item in items))
    assert everything.loss == everything.bound == pytest.approx(sum(item.losses.min() for item in items))


def spectra(seed: int, count: int, ranks: int, *, pivoted: bool, dense: bool = True) -> list[Item]:
    """Items as linears make them: falling losses, and a dense option without any."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        d_out, d_in = ranks * rng.integers(1, 3), ranks
        energies = np.sort(rng.gamma(9, size=ranks))[::-1] * np.arange(1, ranks + 1) ** -rng.uniform(0.3, 1.5)
        rank = np.arange(1, ranks + 1)
        costs = rank * (d_out + d_in - (rank if pivoted else 0))
        saves = costs < d_out * d_in
        losses = np.append(energies[::-1].cumsum()[::-1][1:], 0.0)
        end = ([d_out * d_in], [0.0]) if dense else ([], [])
        made.append(Item(f"{number}", np.append(costs[saves], end[0]).astype(int), np.append(losses[saves], end[1])))
    return made


def by_highs(items: Sequence[Item], budget: int) -> float:
    costs, losses = (np.concatenate([getattr(item, name) for item in items]) for name in ("costs", "losses"))
    rows = np.concatenate([np.full(len(item.costs), number) for number, item in enumerate(items)])
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    found = milp(
        losses,
        integrality=np.ones(len(rows)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None], ub=budget)],
        options={"mip_rel_gap": 0},
    )
    assert found.status == 0
    return float(found.fun)


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_the_optimum_is_that_of_highs(pivoted: bool, keep: float) -> None:
    items = spectra(1, 8, 24, pivoted=pivoted)
    budget = int(keep * sum(int(item.costs.max()) for item in items))
    exact = solve(items, budget, exact=True)
    check(items, budget, exact)
    assert exact.loss == pytest.approx(by_highs(items, budget), rel=1e-5)


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_model_of_linears_is_solved_near_its_bound(pivoted: bool, keep: float) -> None:
    items = spectra(2, 60, 256, pivoted=pivoted)
    budget = int(keep * sum(int(item.costs.max()) for item in items))
    quick, exact = solve(items, budget), solve(items, budget, exact=True)
    check(items, budget, quick)
    check(items, budget, exact)
    assert quick.bound <= exact.loss <= quick.loss
    # Two ranks of one linear, in numbers: what is left over is less, and so is the gap.
    assert quick.loss - quick.bound < 0.005 * quick.loss
    assert budget - quick.cost < 2 * 768


def test_equal_items_are_no_trouble() -> None:
    """Every order of the same choices is as good, and only one of them is gone through."""
    one = spectra(3, 1, 64, pivoted=True)[0]
    items = [Item(str(number), one.costs, one.losses) for number in range(40)]
    budget = int(0.5 * 40 * one.costs.max())
    check(items, budget, solve(items, budget, exact=True))


@given(OPTIONS)
def test_the_hull_has_what_some_multiplier_prefers(options: list[tuple[int, float]]) -> None:
    item = items_of([options])[0]
    hull = lower_hull(item.costs, item.losses)
    assert item.costs[hull[0]] == item.costs.min()
    assert item.losses[hull[-1]] == item.losses.min()
    costs, losses = item.costs[hull], item.losses[hull]
    rates = -np.diff(losses) / np.diff(costs)
    assert (np.diff(costs) > 0).all()
    assert (rates > 0).all()
    assert (np.diff(rates) < 0).all()
    for multiplier in [0.0, *rates, *(rates + 1e-3), 1e3]:
        best = (item.losses + multiplier * item.costs).min()
        assert (losses + multiplier * costs).min() == pytest.approx(best, abs=1e-9)


def test_a_budget_that_nothing_fits_says_what_would() -> None:
    items = items_of([[(3, 1.0), (5, 0.0)], [(4, 2.0)]])
    with pytest.raises(ValueError, match="a budget of 6 is too small: the cheapest options take 7 together"):
        solve(items, 6)
    assert solve(items, 7).choices == (0, 0)


def test_nothing_to_choose_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        solve([], 3)


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [
        ([], [], "q: costs .* are not two lists of one length"),
        ([1, 2], [1.0], "q: costs .* are not two lists of one length"),
        ([1, 2], [1.0, float("nan")], "q: a loss is not finite"),
        ([1, -2], [1.0, 2.0], "q: costs are whole numbers from 0"),
        ([1.5, 2], [1.0, 2.0], "q: costs are whole numbers from 0"),
    ],
)
def test_a_wrong_item_is_named(costs: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Item("q", np.array(costs), np.array(losses))
