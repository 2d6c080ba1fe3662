"""Formats: numbers as people read them."""

from __future__ import annotations

import html
import math

MISSING = "\u2013"  # a dash
MINUS = "\u2212"
# Metrics between -1 and 1.
SHARES = ("acc", "top1", "disagreement", "cosine", "f1", "mcc", "control", "selectivity", "passed")


def number(value: float | None) -> str:
    """A number with the digits that matter: 20,083 and 91.85 and 0.0421; "inf" for infinity, a dash for nothing."""
    if value is None or math.isnan(value):
        return MISSING
    if value < 0:
        return MINUS + number(-value)
    if math.isinf(value):
        return "inf"
    size = value
    if size >= 1e7:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 0.01:
        return f"{value:.3f}"
    return "0" if value == 0 else f"{value:.2g}"


def score(value: float | None, metric: str = "") -> str:
    """The value of a metric: shares with three decimals, scores of a hundred with one, anything else by `number`."""
    if value is None or not math.isfinite(value):
        return number(value)
    if metric.split(".")[0] in {"icat", "lms", "ss"} or ".icat" in metric or ".lms" in metric or ".ss" in metric:
        return f"{value:.1f}".replace("-", MINUS)
    if metric.startswith(SHARES):
        return f"{value:.3f}".replace("-", MINUS)
    return number(value)


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share as per cent with one decimal."""
    if value is None or not math.isfinite(value):
        return number(value)
    digits = 1 if abs(value) < 10 else 0
    return f"{100 * value:{'+' if signed else ''},.{digits}f} %".replace("-", MINUS)


def amount(value: float | None, unit: str = "") -> str:
    """A count with its thousand: 6.74 G, 18.9 M."""
    if value is None or not math.isfinite(value):
        return number(value)
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            digits = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
            return f"{scaled:.{digits}f} {prefix}{unit}".replace("-", MINUS)
    return f"{value:g} {unit}".strip() if value == int(value) else f"{value:.3g} {unit}".strip()


def times(value: float | None) -> str:
    """A ratio: 1.24 times."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:.2f} times"


def with_error(value: float | None, stderr: float | None, metric: str = "") -> str:
    """A value and its standard error: 0.412 ± 0.011."""
    return score(value, metric) if stderr is None else f"{score(value, metric)} ± {score(stderr, metric)}"


def plain(text: object) -> str:
    """Text for a figure, in which plotly would otherwise read tags."""
    return html.escape(str(text), quote=False)
