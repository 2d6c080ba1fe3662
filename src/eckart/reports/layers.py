"""Layers: scores of probes of every layer and of their control task (the probing paper's Figures 2 to 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from eckart.evals.result import CHECK, EvalResult, Score
from eckart.reports.charts import Chart, View, panel_grid, place
from eckart.reports.formats import plain, score, with_error
from eckart.reports.palette import DENSE, QUIET, Look, ramp
from eckart.reports.profiles import Layer, check_of, layers_of, probings
from eckart.reports.rows import id_columns, looks_of, name_run, names_of
from eckart.reports.runs import Collection, Run
from eckart.reports.tables import Cell, Column, Table, clashes, corpus_of, number_cell, text_cell

F1_AND_CONTROL, SELECTIVITY = "F1 and control", "selectivity"
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down")


@dataclass(frozen=True)
class Series:
    """A line: a name in the legend, how it is drawn, and its run; None is the dense model."""

    name: str
    look: Look
    run: Run | None


def probing(collection: Collection) -> Chart | None:
    """Probes of every layer: a panel for each task, and a line for each size of a method or each method of a size."""
    names = probings(collection)
    if not names:
        return None
    views = []
    for model in collection.models:
        for label, series in _groups(collection, model):
            results = {task: _results(collection, model, task, series) for task in names}
            drawn = {task: lines for task, lines in results.items() if lines}
            if drawn:
                views += [
                    View((model, label, measure), _figure(drawn, measure)) for measure in (F1_AND_CONTROL, SELECTIVITY)
                ]
    if not views:
        return None
    reading = (
        "Solid with marks: weighted F1 of a probe on the hidden states of each layer, 0 being the embeddings; dotted "
        "in the same colour: the same probe on the control task, random labels. The level line is the F1 of always "
        f"answering the commonest class. Selectivity is the difference; below {CHECK:g}, its level line, a layer fails "
        "the check. Whiskers are standard errors over seeds."
    )
    notes = tuple(note for task in names for note in clashes(collection, task))
    title = "What each layer knows"
    table = Table("probing-numbers", title, _columns(), tuple(_rows(collection, names)))
    return Chart("probing", title, reading, ("Model", "Compare", "Show"), tuple(views), table, lines=True, notes=notes)


def _groups(collection: Collection, model: str) -> list[tuple[str, list[Series]]]:
    """The sets of lines of a model: one for every method with several sizes, one for every size of several methods."""
    dense = Series("dense", Look(DENSE.light, "star", "solid"), None)
    looks = looks_of(collection)
    runs = [run for run in collection.of(model) if any(task in run.compressed for task in probings(collection))]
    sizes = {
        size: [run for run in runs if run.size in (size, None)]
        for size in dict.fromkeys(run.size for run in runs if run.size is not None)
    } or {"all": runs}
    sizes = {size: same_size for size, same_size in sizes.items() if len({run.series for run in same_size}) > 1}
    shown = {run.name for same_size in sizes.values() for run in same_size}
    groups = []
    for name in dict.fromkeys(run.series for run in runs):
        own = [run for run in runs if run.series == name]
        if len(own) > 1:  # from much kept to little, the ramp's light end being the page
            tones = [0.45 + 0.55 * at / (len(own) - 1) for at in range(len(own))]
            lines = [
                Series(run.size or run.name, Look(ramp(tone), MARKS[at % len(MARKS)], "solid"), run)
                for at, (tone, run) in enumerate(zip(tones, own, strict=True))
            ]
            groups.append((f"sizes of {name}", [dense, *lines]))
        elif own[0].name not in shown:
            groups.append((name_run(own[0]), [dense, Series(name_run(own[0]), looks[name], own[0])]))
    for size, same_size in sizes.items():
        called = names_of(same_size)
        lines = [Series(called[run.name], looks[run.series], run) for run in same_size]
        groups.append((f"methods, {size}", [dense, *lines]))
    return groups or [("dense", [dense])]


def _results(
    collection: Collection, model: str, task: str, series: Sequence[Series]
) -> list[tuple[Series, EvalResult]]:
    results = [
        (one, collection.dense(model, task) if one.run is None else one.run.compressed.get(task)) for one in series
    ]
    return [(one, result) for one, result in results if result is not None]


def _figure(panels: dict[str, list[tuple[Series, EvalResult]]], measure: str) -> go.Figure:
    figure = panel_grid([corpus_of(task) for task in panels], row=250, least=320)
    named: set[str] = set()
    for number, lines in enumerate(panels.values()):
        for series, result in lines:
            layers = layers_of(result)
            if measure == F1_AND_CONTROL:
                control = _line(series, layers, lambda layer: layer.control, ["control " + _text(x) for x in layers])
                control.update(mode="lines", opacity=0.8, showlegend=False, meta="control")
                control.line.update(width=1.4, dash="dot")
                figure.add_trace(control, **place(number))
            hovers = [_hover(series, layer) for layer in layers]
            line = _line(series, layers, lambda x: x.f1 if measure == F1_AND_CONTROL else x.selectivity, hovers)
            line.showlegend = series.name not in named
            figure.add_trace(line, **place(number))
            named.add(series.name)
        majorities = [result.details.get("majority") for _, result in lines]
        checks = [check_of(result) for _, result in lines]
        level = checks[0] if measure == SELECTIVITY else next((m for m in majorities if m is not None), None)
        if level is not None:
            figure.add_hline(y=level, line={"color": QUIET.light, "width": 1, "dash": "dash"}, **place(number))
        title = "weighted F1" if measure == F1_AND_CONTROL else "selectivity"
        figure.update_xaxes(title={"text": "layer", "standoff": 6, "font": {"size": 12}}, **place(number))
        figure.update_yaxes(title={"text": title, "standoff": 8, "font": {"size": 12}}, **place(number))
    figure.update_xaxes(tickformat="d", nticks=8)
    figure.update_yaxes(nticks=6)
    return figure


def _line(
    series: Series, layers: Sequence[Layer], value: Callable[[Layer], Score], hovers: Sequence[str]
) -> go.Scatter:
    scores = [value(layer) for layer in layers]
    return go.Scatter(
        x=[layer.number for layer in layers],
        y=[point.value for point in scores],
        mode="lines+markers",
        name=plain(series.name),
        legendgroup=plain(series.name),
        line={"color": series.look.color, "width": 2, "dash": series.look.dash},
        marker={"color": series.look.color, "size": 7, "symbol": series.look.mark},
        error_y={
            "type": "data",
            "array": [point.stderr or 0 for point in scores],
            "color": series.look.color,
            "thickness": 1,
            "width": 2,
            "visible": any(point.stderr for point in scores),
        },
        hovertext=[plain(text).replace("\n", "<br>") for text in hovers],
        hoverinfo="text",
    )


def _text(layer: Layer) -> str:
    return with_error(layer.control.value, layer.control.stderr, "control")


def _hover(series: Series, layer: Layer) -> str:
    where = "embeddings" if layer.number == 0 else f"layer {layer.number}"
    f1 = with_error(layer.f1.value, layer.f1.stderr, "f1")
    gap = with_error(layer.selectivity.value, layer.selectivity.stderr, "selectivity")
    verdict = "passes" if layer.passes else "fails"
    return f"{series.name}, {where}\nF1 {f1}, control {_text(layer)}\nselectivity {gap}, {verdict}"


def _columns() -> tuple[Column, ...]:
    pairs = [Column(label, group=group) for group in ("F1", "Control", "Selectivity") for label in ("value", "error")]
    last = (Column("Passes", False), Column("Accuracy"), Column("Matthews"))
    return (*id_columns(task="Task"), Column("Layer"), *pairs, *last)


def _rows(collection: Collection, names: Sequence[str]) -> list[tuple[Cell, ...]]:
    rows = []
    for model in collection.models:
        for task in names:
            before = collection.dense(model, task)
            results = [] if before is None else [("dense", "", before)]
            results += [
                (run.series, run.size or "", run.compressed[task])
                for run in collection.of(model)
                if task in run.compressed
            ]
            for series, size, result in results:
                who = tuple(text_cell(text) for text in (model, series, size, corpus_of(task)))
                rows += [(*who, *_cells(layer)) for layer in layers_of(result)]
    return rows


def _cells(layer: Layer) -> tuple[Cell, ...]:
    pairs = (layer.f1, layer.control, layer.selectivity)
    numbers = [value for measured in pairs for value in (measured.value, measured.stderr)]
    return (
        number_cell(layer.number, str(layer.number)),
        *(number_cell(value, score(value, "f1")) for value in numbers),
        text_cell("yes" if layer.passes else "no"),
        *(number_cell(value, score(value, "mcc")) for value in (layer.accuracy, layer.mcc)),
    )
