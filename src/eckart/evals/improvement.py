"""Improvement: how much better than a named baseline, on average over corpora, as the NSVD paper prints it."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def average_improvement(
    values: Mapping[str, float], baseline: Mapping[str, float], *, in_domain: Collection[str] = ()
) -> float:
    """The mean over tasks of 1 - value / baseline: the share by which perplexity fell ("Avg. Impro.").

    Positive is better, for numbers of which less is better. NSVD (Tables 1, 3-6) prints single changes without their
    sign and leaves the calibration's own corpus out of the mean.

    Args:
        values, baseline: {task: perplexity}.
        in_domain: tasks left out of the mean.

    Raises:
        ValueError: the baseline lacks a task, or no task remains.
    """
    tasks = [task for task in values if task not in in_domain]
    missing = [task for task in tasks if task not in baseline]
    if missing:
        raise ValueError(f"the baseline has no value for {', '.join(missing)}")
    if not tasks:
        raise ValueError("no task outside the calibration's domain to average over")
    return sum(1 - values[task] / baseline[task] for task in tasks) / len(tasks)
