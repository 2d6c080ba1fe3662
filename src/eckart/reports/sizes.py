"""Sizes: quality against stored bytes, perplexity and divergence, and scores of tasks against the share kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eckart.reports.charts import Chart, LinePanel, Point, View, line_figure, spread_demands_log
from eckart.reports.formats import amount, percent, with_error
from eckart.reports.palette import DENSE
from eckart.reports.rows import bytes_cell, dense_row, hover_text, id_columns, looks_of, name_run, run_row, scores_of
from eckart.reports.runs import Collection
from eckart.reports.tables import ARROWS, Column, Table, clashes, corpus_of, number_cell


def perplexity(collection: Collection) -> Chart | None:
    """Perplexity against stored bytes: a panel for each corpus, a line for each method."""
    names = collection.tasks("perplexity")
    return _against_bytes(
        collection,
        names,
        slug="perplexity",
        title="Perplexity against size",
        reading="Down and to the left is better: less surprise from fewer stored bytes. The star is the dense model, "
        "the dotted line its level; whiskers are standard errors.",
        axis="perplexity",
    )


def divergence(collection: Collection) -> Chart | None:
    """Divergence of the next-token distributions against stored bytes."""
    names = collection.tasks("divergence")
    return _against_bytes(
        collection,
        names,
        slug="divergence",
        title="Divergence from the dense model",
        reading="How far the next-token distribution has moved from the dense model's, in nats: zero is the dense "
        "model itself, and further left is smaller. The table also has the other scores, such as how often the most "
        "likely token stays the same.",
        axis="KL divergence, nats",
    )


def scores(collection: Collection) -> Chart | None:
    """Scores of tasks against the share kept, where a method has several (the probing paper's Figure 1 and Table 2)."""
    names = collection.tasks("tasks")
    looks = looks_of(collection)
    views, rows = [], []
    for model in collection.models:
        runs = collection.of(model)
        # What was asked for is the papers' own axis; where a budget was in other words, what became of the model.
        asked = all(run.keep is not None for run in runs if run.size is not None)
        shares = {run.name: run.keep if asked else run.share for run in runs if run.size is not None}
        if len({share for share in shares.values() if share is not None}) < 2:
            continue
        panels, notes = [], []
        for task in names:
            lines: dict[str, list[Point]] = {}
            for run in runs:
                result, share = run.compressed.get(task), shares.get(run.name)
                if result is None:
                    continue
                rows.append(run_row(run, task, result, (), size=number_cell(share, percent(share))))
                if share is None or not math.isfinite(result.value):
                    why = "without a share to keep" if share is None else "infinite"
                    notes.append(f"{name_run(run)} is {why} on {corpus_of(task)} and not drawn.")
                    continue
                lines.setdefault(run.series, []).append(
                    Point(100 * share, result.value, result.stderr, hover_text(run, result))
                )
            dense, level = collection.dense(model, task), None
            if dense is not None:
                rows.append(dense_row(model, task, dense, (), size=number_cell(1.0, percent(1.0))))
                level = (100.0, dense.value, f"dense\n{with_error(dense.value, dense.stderr, dense.metric)}")
            if lines:
                by_share = {name: sorted(points, key=lambda point: point.x) for name, points in lines.items()}
                first = next(run.compressed[task] for run in runs if task in run.compressed)
                panels.append(LinePanel(f"{corpus_of(task)}: {first.metric} {ARROWS[first.better]}", by_share, level))
        if panels:
            kept = "kept of each linear, %" if asked else "parameters of the model kept, %"
            figure = line_figure(panels, looks, dense=DENSE.light, axes=(kept, "score"), logarithmic=False)
            views.append(View((model,), figure, tuple(dict.fromkeys(notes))))
    if not views:
        return None
    reading = (
        "How a task's main score moves as less is kept; the arrow says which way is good. The star is the dense "
        "model, the dotted line its level, and whiskers are standard errors."
    )
    title = "Task scores against the share kept"
    columns = (*id_columns(task="Task"), Column("Kept"), Column("Score"), Column("Standard error"))
    table = Table("scores-numbers", title, columns, tuple(rows))
    warnings = tuple(note for task in names for note in clashes(collection, task))
    return Chart("scores", title, reading, ("Model",), tuple(views), table, lines=True, notes=warnings)


def _against_bytes(
    collection: Collection, names: Sequence[str], *, slug: str, title: str, reading: str, axis: str
) -> Chart | None:
    if not names:
        return None
    looks = looks_of(collection)
    views, rows = [], []
    inner = sorted({key for run in collection.runs for task in names for key in scores_of(run.compressed.get(task))})
    for model in collection.models:
        panels, notes, values = [], [], []
        for task in names:
            lines: dict[str, list[Point]] = {}
            for run in collection.of(model):
                result, size = run.compressed.get(task), run.counted("bytes", 1)
                if result is None:
                    continue
                rows.append(run_row(run, task, result, inner, size=bytes_cell(size)))
                if math.isinf(result.value) or size is None:
                    why = "infinite" if math.isinf(result.value) else "of unknown size"
                    notes.append(f"{name_run(run)} is {why} on {corpus_of(task)} and not drawn.")
                    continue
                values.append(result.value)
                lines.setdefault(run.series, []).append(
                    Point(size / 1e6, result.value, result.stderr, hover_text(run, result))
                )
            dense = collection.dense(model, task)
            sizes = [s for run in collection.of(model) if (s := run.counted("bytes", 0)) is not None]
            level = None
            if dense is not None:
                rows.append(dense_row(model, task, dense, inner, size=bytes_cell(sizes[0] if sizes else None)))
                if sizes and math.isfinite(dense.value):
                    values.append(dense.value)
                    text = f"dense\n{with_error(dense.value, dense.stderr, dense.metric)}\n{amount(sizes[0], 'B')}"
                    level = (sizes[0] / 1e6, dense.value, text)
            if lines or level:
                panels.append(
                    LinePanel(corpus_of(task), {k: sorted(v, key=lambda p: p.x) for k, v in lines.items()}, level)
                )
        if panels:
            figure = line_figure(
                panels,
                looks,
                dense=DENSE.light,
                axes=("stored bytes, MB", axis),
                logarithmic=spread_demands_log(values),
            )
            views.append(View((model,), figure, tuple(notes)))
    columns = (*id_columns(task="Corpus"), Column("Bytes"), Column(axis.partition(",")[0]), Column("Standard error"))
    columns += tuple(Column(key) for key in inner)
    notes_all = tuple(note for task in names for note in clashes(collection, task))
    table = Table(f"{slug}-numbers", title, columns, tuple(rows))
    if not views:
        return None
    return Chart(slug, title, reading, ("Model",), tuple(views), table, logs=True, lines=True, notes=notes_all)
