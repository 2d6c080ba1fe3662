"""Correlations and means with their intervals: against numpy and scipy, on planted and on independent data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eckart.reports.resampling import FEWEST, correlations, mean_of


def planted(rho: float, n: int, seed: int) -> tuple[list[float], list[float]]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=n)
    return x.tolist(), (rho * x + np.sqrt(1 - rho**2) * draw.normal(size=n)).tolist()


def test_the_values_are_numpys_and_scipys() -> None:
    x, y = planted(0.5, 15, 3)
    x[2], y[4] = x[3], y[7]  # ties share their rank
    pearson, spearman = correlations(x, y)
    assert pearson.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pearson.interval is not None
    assert spearman.interval is not None
    assert pearson.interval[0] < pearson.value < pearson.interval[1]
    assert correlations(x, y) == (pearson, spearman)  # the seed decides
    assert correlations(x, y, seed=1) != (pearson, spearman)


def test_a_planted_correlation_is_in_its_interval_and_none_holds_zero() -> None:
    estimates = [correlations(*planted(0.8, 30, seed))[0] for seed in range(40)]
    assert sum(f.interval[0] <= 0.8 <= f.interval[1] for f in estimates if f.interval) >= 34
    assert all(f.sign == 1 for f in estimates)
    none = [correlations(*planted(0.0, 30, seed)) for seed in range(40)]
    for which in (0, 1):
        assert sum(pair[which].sign == 0 for pair in none) >= 34
    opposite = [-value for value in planted(0.9, 30, 0)[1]]
    assert correlations(planted(0.9, 30, 0)[0], opposite)[0].sign == -1


@pytest.mark.parametrize(
    ("x", "y", "value", "why"),
    [
        ([], [], None, "0 runs: a correlation needs three"),
        ([1.0, 2.0], [1.0, 2.0], None, "2 runs: a correlation needs three"),
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0, "3 runs: too few for an interval"),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], None, "x the same in all 4 runs"),
        ([0.1] * 5, [0.3] * 5, None, "x and y the same in all 5 runs"),
    ],
)
def test_what_cannot_be_said_says_why(x: list[float], y: list[float], value: float | None, why: str) -> None:
    for estimate in correlations(x, y):
        assert estimate.interval is None
        assert estimate.sign == 0
        assert estimate.why == why
        assert estimate.value == (None if value is None else pytest.approx(value))


def test_resamples_that_do_not_vary_are_left_out() -> None:
    # half of the resamples of four points miss or repeat the one that differs
    pearson, _ = correlations([0.0, 0.0, 0.0, 1.0], [0.0, 0.1, 0.2, 1.0])
    assert pearson.interval is not None
    assert np.isfinite(pearson.interval).all()
    alone = [0.0] * 3 + [1e-9]
    assert correlations(alone, [1.0, 2.0, 3.0, 4.0])[0].interval is not None  # small is not nothing


def test_a_mean_and_its_interval() -> None:
    draw = np.random.default_rng(0).normal(0.1, 0.05, size=40)
    estimate = mean_of(draw.tolist())
    assert estimate.value == pytest.approx(draw.mean())
    assert estimate.interval is not None
    normal = 1.96 * draw.std(ddof=1) / np.sqrt(40)
    assert estimate.interval == pytest.approx((draw.mean() - normal, draw.mean() + normal), abs=0.15 * normal)
    assert estimate.sign == 1
    assert mean_of([0.5] * FEWEST).interval == (0.5, 0.5)
    few = mean_of([1.0, 2.0])
    assert (few.value, few.interval, few.why) == (1.5, None, "2 cells: too few for an interval")
    assert mean_of([]).value is None
