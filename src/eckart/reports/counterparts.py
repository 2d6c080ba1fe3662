"""Counterparts: the run of a baseline that another run is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.reports.runs import Collection, Run

# What two runs have to have in common, beside model and size, for their difference to be the methods'.
ALIKE = ("dtype", "sites", "rank_multiple", "context")
# How numbers are stored: two shares of numbers are of one size where this is alike, and two of bytes in any case.
IN_BITS = ("bits", "group")
# What does not make two runs alike: it differs by what is asked, or is compared by itself.
APART = ("model", "method", "evaluate")
WHAT = "size, calibration, type, selected linears and fine-tuning"


def counterpart(collection: Collection, run: Run, method: str, tasks: Sequence[str] = ()) -> Run | None:
    """The baseline at the same size: the method's run of the same model, size, calibration, type, sites, rank multiple
    and fine-tuning; of several, the one with most in common. None where there is none.

    A baseline that read no text goes with every calibration.

    Args:
        tasks: that both must have measured, under the same settings.
    """
    others = [
        other
        for other in collection.of(run.model)
        if other.method == method and run.size is not None and _alike(run, other) and _both_have(run, other, tasks)
    ]
    return max(others, key=lambda other: _in_common(run, other), default=None)


def _alike(run: Run, base: Run) -> bool:
    keys = ALIKE if run.recipe.get("max_bytes") is not None else (*ALIKE, *IN_BITS)
    reads = (base.compression or {}).get("calibration") != []
    return (
        base.size == run.size
        and base.recovery == run.recovery
        and all(_said(base, key) == _said(run, key) for key in keys)
        and (not reads or _said(base, "calibration") == _said(run, "calibration"))
    )


def _said(run: Run, key: str) -> Any:
    """A key's value, without what is nothing in a section: {include: [], exclude: []} is no choice of linears."""
    value = run.recipe.get(key)
    if not isinstance(value, Mapping):
        return value
    return {name: each for name, each in value.items() if each not in ([], None)} or None


def _both_have(run: Run, base: Run, tasks: Sequence[str]) -> bool:
    pairs = [(run.compressed.get(task), base.compressed.get(task)) for task in tasks]
    return all(ours is not None and theirs is not None and ours.settings == theirs.settings for ours, theirs in pairs)


def _in_common(run: Run, other: Run) -> int:
    keys = {*run.recipe, *other.recipe}.difference(APART)
    return sum(_said(run, key) == _said(other, key) for key in keys)
