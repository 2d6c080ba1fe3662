"""Bars: scores of the dense model and of every method: tasks, StereoSet, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from eckart.evals.result import EvalResult
from eckart.reports.charts import Bar, BarPanel, Chart, View, bar_figure
from eckart.reports.formats import amount, score, times
from eckart.reports.palette import DENSE
from eckart.reports.rows import (
    dense_row,
    id_columns,
    looks_of,
    name_run,
    names_of,
    results_on,
    run_row,
    scores_of,
    tasks_of,
)
from eckart.reports.runs import Collection, base_of
from eckart.reports.tables import Column, Table, clashes, corpus_of

DOMAINS = ("gender", "profession", "race", "religion")
PARTS = ("intrasentence", "intersentence")
MEASURES = {
    "icat": "icat: of 100, high is good",
    "lms": "lms: language modelling, of 100",
    "ss": "ss: stereotypes preferred, 50 is even",
}
# What the cost section shows: score (None is the main value), title, how a number is written.
COSTS: tuple[tuple[str | None, str, Callable[[float | None], str]], ...] = (
    (None, "Parameters", amount),
    ("bytes.resident", "Bytes in memory", lambda value: amount(value, "B")),
    ("bytes.disk", "Bytes on disk", lambda value: amount(value, "B")),
    ("macs", "Multiply-accumulates per token", amount),
    ("prefill_speed", "Prefill speed, dense = 1", times),
    ("decode_speed", "Decode speed, dense = 1", times),
)
RATIOS = ("prefill_speed", "decode_speed")  # to the dense model, which has none of its own
SHARES = ("params.kept", "bytes.kept", "macs.kept")


def tasks(collection: Collection) -> Chart | None:
    """Scores of tasks with their errors: a panel for each task, a bar for the dense model and for each method."""
    names = tasks_of(collection, "tasks")
    measures = list(
        dict.fromkeys(
            key
            for task in names
            for result in results_on(collection, task)
            for key in [result.metric, *(name for name in result.scores if not _is_part(task, name))]
        )
    )
    reading = (
        "One bar for the dense model and one for each method, with its standard error; the dotted line is the dense "
        "model. Where whiskers overlap, the section on agreement has the finer test."
    )
    choices = {measure: [(corpus_of(task), task, measure) for task in names] for measure in measures}
    chart = _bars(collection, "tasks", "Tasks", reading, choices)
    parts = {
        task: {name for result in results_on(collection, task) for name in result.scores if _is_part(task, name)}
        for task in names
    }
    notes = tuple(
        f"{corpus_of(task)} has {len(scores)} parts; their scores are in its result files."
        for task, scores in parts.items()
        if scores
    )
    return None if chart is None else replace(chart, notes=(*chart.notes, *notes))


def _is_part(task: str, name: str) -> bool:
    """Whether a score is of one part of a task, as "mmlu_anatomy" is of MMLU."""
    return "." in name or name.startswith(f"{corpus_of(base_of(task))}_")


def stereoset(collection: Collection) -> Chart | None:
    """StereoSet's scores, overall and by domain."""
    names = tasks_of(collection, "stereoset")
    if not names:
        return None
    choices: dict[str, list[tuple[str, str, str]]] = {}
    for measure, title in MEASURES.items():
        entries = [("overall", measure)]
        entries += [(domain, f"{measure}.{domain}") for domain in DOMAINS]
        entries += [(part, f"{part}.{measure}") for part in PARTS]
        several = len(names) > 1
        choices[title] = [
            (f"{task}: {label}" if several else label, task, key) for task in names for label, key in entries
        ]
    reading = (
        "icat is 100 for a model that always prefers sense to nonsense and has no preference between stereotype and "
        "anti-stereotype, and 0 for one that always picks the stereotype. The dotted line is the dense model."
    )
    return _bars(collection, "stereoset", "StereoSet", reading, choices)


def cost(collection: Collection) -> Chart | None:
    """What running the models costs: sizes, multiply-accumulates, speeds."""
    names = tasks_of(collection, "cost")
    if not names:
        return None
    reading = (
        "What a model takes to store and to run, beside the dense model at the dotted line. Short is good for sizes "
        "and multiply-accumulates, long for speeds; speeds are those of the machine named at the end of the page."
    )
    formats = {title: show for _, title, show in COSTS}
    entries = [(title, task, key or "") for task in names for key, title, _ in COSTS]
    return _bars(collection, "cost", "Cost", reading, {"": entries}, formats=formats, extra=SHARES)


def _bars(
    collection: Collection,
    slug: str,
    title: str,
    reading: str,
    choices: Mapping[str, Sequence[tuple[str, str, str]]],
    *,
    formats: Mapping[str, Callable[[float | None], str]] | None = None,
    extra: Sequence[str] = (),
) -> Chart | None:
    """Bars of dense and compressed models.

    Args:
        choices: {what a view measures: [(panel title, task, score; "" is the main value)]}.
        formats: {panel title: how a number is written}.
        extra: further scores for the table.
    """
    formats = formats or {}
    looks = looks_of(collection)
    views = []
    for model in collection.models:
        for size in collection.sizes(model):
            runs = collection.at(model, size)
            called = names_of(runs)
            colors = {"dense": DENSE.light, **{called[run.name]: looks[run.series].color for run in runs}}
            for choice, entries in choices.items():
                panels = []
                for label, task, key in entries:
                    show = formats.get(label)
                    dense = _bar(collection.dense(model, task), key, "dense", show)
                    bars = {called[run.name]: _bar(run.compressed.get(task), key, name_run(run), show) for run in runs}
                    drawn = {name: bar for name, bar in {"dense": dense, **bars}.items() if bar is not None}
                    if drawn:
                        level = 1.0 if key in RATIOS else None if dense is None else dense.value
                        panels.append(BarPanel(label, drawn, level))
                if panels:
                    views.append(View((model, size, choice), bar_figure(panels, colors)))
    if not views:
        return None
    rows = []
    names = list(dict.fromkeys(task for entries in choices.values() for _, task, _ in entries))
    measured = {key for task in names for result in results_on(collection, task) for key in scores_of(result)}
    keys = [key for entries in choices.values() for _, _, key in entries] + list(extra)
    inner = [key for key in dict.fromkeys(keys) if key in measured]
    for model in collection.models:
        for task in names:
            before = collection.dense(model, task)
            rows += [] if before is None else [dense_row(model, task, before, inner)]
            rows += [
                run_row(run, task, run.compressed[task], inner)
                for run in collection.of(model)
                if task in run.compressed
            ]
    columns = (*id_columns(task="Task"), Column("Value"), Column("Standard error"), *(Column(key) for key in inner))
    notes = tuple(note for task in names for note in clashes(collection, task))
    table = Table(f"{slug}-numbers", title, columns, tuple(rows))
    return Chart(slug, title, reading, ("Model", "Size", "Measure"), tuple(views), table, notes=notes)


def _bar(result: EvalResult | None, key: str, who: str, show: Callable[[float | None], str] | None) -> Bar | None:
    """A bar for a score of a result; None where there is none."""
    if result is None:
        return None
    if key in ("", result.metric):
        value, stderr = result.value, result.stderr
    elif key in result.scores:
        value, stderr = result.scores[key].value, result.scores[key].stderr
    else:
        return None
    name = key or result.metric
    text = show(value) if show else score(value, name)
    error = "" if stderr is None else f" ± {show(stderr) if show else score(stderr, name)}"
    return Bar(value if math.isfinite(value) else None, stderr, text, f"{who}\n{name} {text}{error}\nn = {result.n:,}")
