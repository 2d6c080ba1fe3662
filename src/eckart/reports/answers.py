"""Answers: which of them changed when the model was compressed."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from eckart.evals.result import EvalResult
from eckart.reports.charts import Chart, View, panel_grid, place
from eckart.reports.formats import number, percent, plain, score
from eckart.reports.palette import GAIN, INK, LOSS, QUIET, SURFACE
from eckart.reports.rows import id_columns, names_of, run_row
from eckart.reports.runs import Collection, Run
from eckart.reports.tables import Column, Table, corpus_of


def agreement(collection: Collection) -> Chart | None:
    """Which answers changed: learned and unlearned, and how many differ in all."""
    names = collection.tasks(where="agreement")
    if not names:
        return None
    views, rows = [], []
    for model in collection.models:
        for size in collection.sizes(model):
            runs = [run for run in collection.at(model, size) if run.agreement]
            panels = [task for task in names if any(task in run.agreement for run in runs)]
            if panels:
                views.append(View((model, size), _flips(runs, panels)))
        for task in names:
            rows += [
                run_row(run, task, run.agreement[task], _flip_scores(collection))
                for run in collection.of(model)
                if task in run.agreement
            ]
    columns = (
        *id_columns(task="Task"),
        Column("Disagreement"),
        Column("Standard error"),
        *(Column(key) for key in _flip_scores(collection)),
    )
    reading = (
        "Answers that were wrong and are now right point to the right (learned), those that were right and are now "
        "wrong to the left (unlearned), as shares of all examples; the diamond is the share of answers that differ at "
        "all. Equal arms mean that accuracy stayed the same while answers moved."
    )
    table = Table("agreement-numbers", "Agreement with the dense model", columns, tuple(rows))
    return Chart("agreement", "Agreement with the dense model", reading, ("Model", "Size"), tuple(views), table)


def _flip_scores(collection: Collection) -> list[str]:
    return list(dict.fromkeys(key for run in collection.runs for r in run.agreement.values() for key in r.scores))


def _flips(runs: Sequence[Run], names: Sequence[str]) -> go.Figure:
    called = names_of(runs)
    order = [called[run.name] for run in runs if any(task in run.agreement for task in names)]
    figure = panel_grid(
        [corpus_of(corpus_of(task)) for task in names], row=28 * len(order) + 8, least=270, shared_rows=True
    )
    for panel, task in enumerate(names):
        results = {called[run.name]: run.agreement[task] for run in runs if task in run.agreement}
        # Every row is named in every panel, so that rows line up.
        for name, sign, tone in (("learned", 1, GAIN), ("unlearned", -1, LOSS)):
            shares = {who: _flip_share(result, name) for who, result in results.items()}
            figure.add_trace(
                go.Bar(
                    orientation="h",
                    y=[plain(who) for who in order],
                    x=[None if shares.get(who) is None else 100 * sign * (shares[who] or 0) for who in order],
                    name=name,
                    legendgroup=name,
                    marker={"color": tone.light, "cornerradius": 2},
                    hovertext=[_flip_hover(who, results[who], name) if who in results else "" for who in order],
                    hoverinfo="text",
                    showlegend=panel == 0,
                ),
                **place(panel),
            )
        figure.add_trace(
            go.Scatter(
                y=[plain(who) for who in results],
                x=[100 * result.value for result in results.values()],
                mode="markers",
                name="answers that differ",
                legendgroup="differ",
                marker={
                    "color": SURFACE.light,
                    "size": 9,
                    "symbol": "diamond",
                    "line": {"color": INK.light, "width": 1.6},
                },
                error_x={
                    "type": "data",
                    "array": [100 * (result.stderr or 0) for result in results.values()],
                    "color": QUIET.light,
                    "thickness": 1,
                    "width": 2,
                },
                hovertext=[_flip_hover(who, result, "disagreement") for who, result in results.items()],
                hoverinfo="text",
                showlegend=panel == 0,
            ),
            **place(panel),
        )
        figure.add_vline(x=0, line={"color": QUIET.light, "width": 1}, **place(panel))
    figure.update_layout(barmode="relative")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_xaxes(ticksuffix=" %", nticks=6)
    return figure


def _flip_share(result: EvalResult, name: str) -> float | None:
    """Learned or unlearned examples as a share of all."""
    count = result.scores.get(name)
    return None if count is None else count.value / result.n


def _flip_hover(who: str, result: EvalResult, name: str) -> str:
    if name == "disagreement":
        first = f"{percent(result.value)} of answers differ"
        first += "" if result.stderr is None else f" ± {percent(result.stderr)}"
    else:
        first = f"{name} {percent(_flip_share(result, name))}, {number(result.scores[name].value)} of {result.n:,}"
    lines = [who, first]
    if "delta" in result.scores:
        delta = result.scores["delta"]
        error = "" if delta.stderr is None else f" ± {score(delta.stderr, 'acc')}"
        lines.append(f"accuracy {delta.value:+.3f}{error}")
    return plain("\n".join(lines)).replace("\n", "<br>")
