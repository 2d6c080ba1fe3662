"""Histograms: how like the calibration text each corpus is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import plotly.graph_objects as go

from eckart.evals.result import EvalResult
from eckart.reports.charts import Chart, View, panel_grid, place
from eckart.reports.formats import percent, score
from eckart.reports.palette import INK, ramp
from eckart.reports.rows import score_cells
from eckart.reports.runs import Collection
from eckart.reports.tables import Column, Table, corpus_of, number_cell, text_cell


def similarity(collection: Collection) -> Chart | None:
    """How like the calibration text the evaluation texts are, as the model sees them (NSVD Figure 1, Table 2)."""
    names = collection.tasks("similarity", where="dense")
    if not names:
        return None
    views, rows, seen = [], [], set()
    for run in collection.runs:
        results = {task: run.dense[task] for task in names if task in run.dense}
        calibrated = run.corpus or "unknown"
        if not results or (run.model, calibrated) in seen:
            continue
        seen.add((run.model, calibrated))
        drawn = {task: result for task, result in results.items() if _histogram(result)}
        if drawn:
            views.append(View((run.model, calibrated), _histograms(drawn)))
        rows += [
            (
                text_cell(run.model),
                text_cell(calibrated),
                text_cell(corpus_of(task)),
                number_cell(result.value, score(result.value, "cosine")),
                *score_cells(result, ("std", "calibration"), "cosine"),
            )
            for task, result in results.items()
        ]
    columns = (
        Column("Model", False),
        Column("Calibrated on", False),
        Column("Corpus", False),
        Column("Mean cosine"),
        Column("Deviation"),
        Column("The calibration's own"),
    )
    reading = (
        "How like the calibration text each corpus is, as the dense model's layers see it: near 1 the calibration "
        "speaks for the corpus, further left it does not. The line is the mean, printed above with the deviation."
    )
    table = Table("similarity-numbers", "Similarity to the calibration text", columns, tuple(rows))
    title = "Similarity to the calibration text"
    return Chart("similarity", title, reading, ("Model", "Calibrated on"), tuple(views), table) if views else None


def _histogram(result: EvalResult) -> tuple[list[float], list[float]] | None:
    """(edges, counts), where the result has them."""
    histogram = result.details.get("histogram")
    if not isinstance(histogram, Mapping) or len(histogram.get("edges", ())) != len(histogram.get("counts", ())) + 1:
        return None
    return list(histogram["edges"]), list(histogram["counts"])


def _histograms(results: Mapping[str, EvalResult]) -> go.Figure:
    titles = []
    for task, result in results.items():
        std = result.scores.get("std")
        spread = "" if std is None else f" ± {score(std.value, 'cosine')}"
        titles.append(f"{corpus_of(task)}: {score(result.value, 'cosine')}{spread}")
    figure = panel_grid(titles, row=120, least=230)
    lowest, highest = 1.0, -1.0
    for panel, result in enumerate(results.values()):
        edges, counts = _histogram(result) or ([], [])
        total = sum(counts) or 1
        filled = [place_of for place_of, count in enumerate(counts) if count]
        if filled:
            lowest, highest = min(lowest, edges[filled[0]]), max(highest, edges[filled[-1] + 1])
        widths = [high - low for low, high in pairwise(edges)]
        figure.add_trace(
            go.Bar(
                x=[low + width / 2 for low, width in zip(edges[:-1], widths, strict=True)],
                y=[count / total for count in counts],
                width=widths,
                marker={"color": ramp(0.2 + 0.7 * max(result.value, 0.0)), "line": {"width": 0}},
                hovertext=[
                    f"{percent(count / total)}<br>cosine {low:.2f} to {high:.2f}"
                    for count, (low, high) in zip(counts, pairwise(edges), strict=True)
                ],
                hoverinfo="text",
            ),
            **place(panel),
        )
        figure.add_vline(x=result.value, line={"color": INK.light, "width": 1.4}, **place(panel))
    room = 0.04 * max(highest - lowest, 0.1)
    figure.update_xaxes(range=[lowest - room, min(highest + room, 1.02)], nticks=5)
    figure.update_yaxes(tickformat=".0%", nticks=3, rangemode="tozero")
    figure.update_layout(bargap=0)
    return figure
