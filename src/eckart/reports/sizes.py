"""Sizes: quality against stored bytes, perplexity and divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eckart.reports.charts import Chart, LinePanel, Point, View, line_figure, spread_demands_log
from eckart.reports.formats import amount, with_error
from eckart.reports.palette import DENSE
from eckart.reports.rows import bytes_cell, dense_row, hover_text, id_columns, looks_of, name_run, run_row, scores_of
from eckart.reports.runs import Collection, kind_of
from eckart.reports.tables import Column, Table, clashes, corpus_of


def perplexity(collection: Collection) -> Chart | None:
    """Perplexity against stored bytes: a panel for each corpus, a line for each method."""
    names = collection.tasks(lambda task: kind_of(task) == "perplexity")
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
    names = collection.tasks(lambda task: kind_of(task) == "divergence")
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
    return Chart(slug, title, reading, ("Model",), tuple(views), table, logs=True, notes=notes_all) if views else None
