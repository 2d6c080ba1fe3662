"""Resampling: correlations and means with 95 % intervals from the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Enough that each end of a 95 % interval has 50 resamples beyond it.
RESAMPLES = 2000
# With fewer points a resample repeats the same two or three, and an interval from it would say nothing.
FEWEST = 4
# Spread below this share of the numbers themselves is rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: None where it cannot be computed.
        interval: 95 %, from the bootstrap, bias-corrected and accelerated; None where there is none.
        n: the points that it is of.
        why: why a value or an interval is missing; empty where none is.
    """

    value: float | None
    interval: tuple[float, float] | None
    n: int
    why: str = ""

    @property
    def sign(self) -> int:
        """1 where the whole interval is above 0, -1 where it is below, 0 where it holds 0 or there is none."""
        if self.interval is None:
            return 0
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)


def correlations(
    x: Sequence[float], y: Sequence[float], *, names: tuple[str, str] = ("x", "y"), seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Pearson's and Spearman's correlation of pairs, with intervals from resampling the pairs.

    Resamples in which a side does not vary have no correlation and are left out; where they are the majority, or
    there are fewer than 4 points, there is no interval, and with fewer than 3 no value.

    Args:
        x, y: as many finite numbers. names: of what they are, for the reason why there is no value.
        seed: of the resampling.

    Cost: 2000 resamples of both, vectorised.
    """
    pairs = np.array([x, y], dtype=np.float64)
    n = pairs.shape[1]
    if n < 3:
        return (Estimate(None, None, n, f"{_count(n, 'run')}: a correlation needs three"),) * 2
    flat = [name for name, values in zip(names, pairs, strict=True) if _is_flat(values)]
    if flat:
        return (Estimate(None, None, n, f"{' and '.join(flat)} the same in all {n} runs"),) * 2
    values = [float(correlate(pairs[:, None])[0]) for correlate in (lambda both: _correlate(*both), _rank_correlate)]
    if n < FEWEST:
        why = f"{_count(n, 'run')}: too few for an interval"
        return Estimate(values[0], None, n, why), Estimate(values[1], None, n, why)
    drawn = pairs[:, np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))]
    without = pairs[:, _all_but_one(n)]
    pearson = _estimate(values[0], _correlate(*drawn), _correlate(*without), n)
    spearman = _estimate(values[1], _rank_correlate(drawn), _rank_correlate(without), n)
    return pearson, spearman


def mean_of(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean, with an interval from resampling the values; fewer than 4 have none, equal ones one without width."""
    n = len(values)
    if n == 0:
        return Estimate(None, None, 0, "nothing to average")
    data = np.array(values, dtype=np.float64)
    if n < FEWEST:
        return Estimate(float(data.mean()), None, n, f"{_count(n, 'cell')}: too few for an interval")
    drawn = data[np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))].mean(1)
    return _estimate(float(data.mean()), drawn, data[_all_but_one(n)].mean(1), n)


def _correlate(x: Array, y: Array) -> Array:
    """(resamples,) correlations of (resamples, n) rows; nan where a side does not vary."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    spread = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    varies = spread > ROUNDING * (np.abs(x).max() * np.abs(y).max() * x.shape[1])
    return np.where(varies, (x * y).sum(1) / np.where(varies, spread, 1.0), np.nan)


def _rank_correlate(pairs: Array) -> Array:
    """The same of the ranks within each row, of (2, resamples, n)."""
    from scipy.stats import rankdata  # slow to import, and needed only here

    return _correlate(*rankdata(pairs, axis=2))


def _all_but_one(n: int) -> NDArray[np.intp]:
    """(n, n - 1) indices, in each row another one missing."""
    return np.array([[at for at in range(n) if at != out] for out in range(n)])


def _estimate(value: float, drawn: Array, without: Array, n: int) -> Estimate:
    """A value with its BCa interval (Efron 1987): for a dozen points plain percentiles cover 90 % and not 95 %.

    Args:
        drawn: of the resamples. without: of all points but one; both may hold nan.
    """
    from scipy.stats import norm  # slow to import, and needed only here

    good, others = (values[np.isfinite(values)] for values in (drawn, without))
    if 2 * len(good) < len(drawn):
        return Estimate(value, None, n, "most resamples do not vary")
    below = (np.mean(good < value - ROUNDING) + np.mean(good <= value + ROUNDING)) / 2
    bias = norm.ppf(np.clip(below, 1 / len(good), 1 - 1 / len(good)))
    pull = others.mean() - others
    spread = (pull**2).sum() ** 1.5
    acceleration = (pull**3).sum() / (6 * spread) if spread > ROUNDING**1.5 else 0.0
    ends = bias + norm.ppf([0.025, 0.975])
    scale = np.maximum(1 - acceleration * ends, ROUNDING)  # below 0 the end is that of all resamples
    low, high = np.percentile(good, 100 * norm.cdf(bias + ends / scale))
    return Estimate(value, (float(low), float(high)), n)


def _is_flat(values: Array) -> bool:
    return bool(np.ptp(values) <= ROUNDING * max(1.0, float(np.abs(values).max())))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
