"""Charts: what surrounds a figure on the page, and grids of panels that fold to the width of the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eckart.reports.formats import plain
from eckart.reports.palette import AXIS, GRID, INK, QUIET, SURFACE, Look
from eckart.reports.tables import Table

FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class View:
    """One of a chart's figures.

    Attributes:
        choices: the selectors' values that show it.
        figure: in the light tones; `figure.layout.meta` says how its panels may be folded.
        notes: what this view cannot show.
    """

    choices: tuple[str, ...]
    figure: go.Figure
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A section with a figure.

    Attributes:
        reading: one sentence on how to read it.
        selectors: names of the choices between views.
        table: the numbers behind all views.
        logs: its y axes can be logarithmic.
        lines: it is of lines, and so worth a file of its own; others are for a screen.
    """

    slug: str
    title: str
    reading: str
    selectors: tuple[str, ...]
    views: tuple[View, ...]
    table: Table
    logs: bool = False
    lines: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One mark: a place, its error, and what a hover says."""

    x: float
    y: float
    error: float | None
    text: str


@dataclass(frozen=True)
class Bar:
    """One bar: a length (None: nothing was measured), its error, the number on it, and what a hover says."""

    value: float | None
    error: float | None = None
    label: str = ""
    text: str = ""


@dataclass(frozen=True)
class BarPanel:
    """Bars of one kind.

    Attributes:
        bars: {row: bar}; rows that another panel of the grid has stay empty.
        line: where a vertical line is drawn, for comparison.
    """

    title: str
    bars: Mapping[str, Bar]
    line: float | None = None


@dataclass(frozen=True)
class LinePanel:
    """Lines of one kind.

    Attributes:
        lines: {series: points in order}.
        level: (x, y, hover) of the dense model, drawn as a mark and a level line.
    """

    title: str
    lines: Mapping[str, Sequence[Point]]
    level: tuple[float, float, str] | None = None
    axes: tuple[str, str] = field(default=("", ""))


def panel_grid(titles: Sequence[str], *, row: int, least: int, shared_rows: bool = False) -> go.Figure:
    """An empty figure with one panel for every title, one below the other; the page folds them into columns.

    Args:
        row: height of a panel in pixels.
        least: width in pixels below which panels go below each other.
        shared_rows: every panel has the same categories on y, so that only the leftmost shows them.
    """
    figure = make_subplots(
        rows=len(titles),
        cols=1,
        subplot_titles=[plain(title) or " " for title in titles],
        vertical_spacing=min(0.08, 0.4 / len(titles)),
    )
    figure.layout.template = go.layout.Template()
    figure.update_annotations(font={"size": 13, "color": INK.light}, xanchor="left", x=0, align="left")
    figure.update_layout(
        font={"family": FONT, "size": 12, "color": QUIET.light},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 52, "r": 12, "t": 30, "b": 44},
        height=74 + len(titles) * row + (len(titles) - 1) * 70,
        hovermode="closest",
        hoverlabel={
            "bgcolor": SURFACE.light,
            "bordercolor": AXIS.light,
            "font": {"family": FONT, "size": 12, "color": INK.light},
            "align": "left",
        },
        showlegend=False,
        bargap=0.28,
        meta={"panels": len(titles), "row": row, "least": least, "sharedRows": shared_rows},
    )
    line = {"gridcolor": GRID.light, "linecolor": AXIS.light, "zerolinecolor": GRID.light, "automargin": True}
    figure.update_xaxes(**line, showline=True, ticks="outside", tickcolor=AXIS.light, ticklen=4, nticks=6)
    figure.update_yaxes(**line, showline=False, ticks="outside", ticklen=5, tickcolor="rgba(0,0,0,0)")
    return figure


def place(panel: int) -> dict[str, int]:
    """Where the grid puts a panel."""
    return {"row": panel + 1, "col": 1}


def bar_figure(panels: Sequence[BarPanel], colors: Mapping[str, str], *, suffix: str = "") -> go.Figure:
    """Horizontal bars with errors: a panel for each kind, a row for each of `colors`, in order from the top."""
    rows = [name for name in colors if any(name in panel.bars for panel in panels)]
    figure = panel_grid([p.title for p in panels], row=26 * len(rows) + 8, least=250, shared_rows=True)
    for number, panel in enumerate(panels):
        bars = [panel.bars.get(name, Bar(None)) for name in rows]
        longest = max((abs(bar.value) for bar in bars if bar.value is not None), default=0.0)
        figure.add_trace(
            go.Bar(
                orientation="h",
                y=[plain(name) for name in rows],
                x=[bar.value for bar in bars],
                error_x={
                    "type": "data",
                    "array": [bar.error or 0 for bar in bars],
                    "color": INK.light,
                    "thickness": 1.2,
                    "width": 3,
                    "visible": any(bar.error for bar in bars),
                },
                marker={"color": [colors[name] for name in rows], "cornerradius": 2},
                text=[plain(bar.label) for bar in bars],
                textposition=[
                    "inside" if bar.value is not None and longest and abs(bar.value) > 0.3 * longest else "outside"
                    for bar in bars
                ],
                insidetextanchor="start",
                textangle=0,
                insidetextfont={"color": SURFACE.light, "size": 11},
                outsidetextfont={"color": QUIET.light, "size": 11},
                constraintext="none",
                hovertext=[plain(bar.text).replace("\n", "<br>") for bar in bars],
                hoverinfo="text",
                cliponaxis=False,
            ),
            **place(number),
        )
        if panel.line is not None:
            figure.add_vline(
                x=panel.line, line={"color": INK.light, "width": 1, "dash": "dot"}, layer="above", **place(number)
            )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_xaxes(ticksuffix=suffix, nticks=5, rangemode="tozero")
    return figure


def line_figure(
    panels: Sequence[LinePanel], looks: Mapping[str, Look], *, dense: str, axes: tuple[str, str], logarithmic: bool
) -> go.Figure:
    """Lines with marks and errors: a panel for each kind; a series looks the same in all of them.

    Args:
        dense: colour of the level of the dense model.
        axes: what x and y are.
    """
    figure = panel_grid([panel.title for panel in panels], row=230, least=300)
    named: set[str] = set()
    for number, panel in enumerate(panels):
        if panel.level is not None:
            x, y, text = panel.level
            start = min([x, *(point.x for points in panel.lines.values() for point in points)])
            figure.add_trace(
                go.Scatter(
                    x=[start, x],
                    y=[y, y],
                    mode="lines+markers",
                    name="dense",
                    legendgroup="dense",
                    line={"color": dense, "width": 1.5, "dash": "dot"},
                    marker={"color": dense, "size": [0, 11], "symbol": "star", "opacity": 1, "line": {"width": 0}},
                    hovertext=["", plain(text).replace("\n", "<br>")],
                    hoverinfo=["skip", "text"],
                    showlegend="dense" not in named,
                ),
                **place(number),
            )
            named.add("dense")
        for name, points in panel.lines.items():
            look = looks[name]
            figure.add_trace(
                go.Scatter(
                    x=[point.x for point in points],
                    y=[point.y for point in points],
                    mode="lines+markers" if len(points) > 1 else "markers",
                    name=plain(name),
                    legendgroup=plain(name),
                    line={"color": look.color, "width": 2, "dash": look.dash},
                    marker={"color": look.color, "size": 8, "symbol": look.mark},
                    error_y={
                        "type": "data",
                        "array": [point.error or 0 for point in points],
                        "color": look.color,
                        "thickness": 1,
                        "width": 2,
                        "visible": any(point.error for point in points),
                    },
                    hovertext=[plain(point.text).replace("\n", "<br>") for point in points],
                    hoverinfo="text",
                    showlegend=name not in named,
                ),
                **place(number),
            )
            named.add(name)
        figure.update_xaxes(title={"text": axes[0], "standoff": 6, "font": {"size": 12}}, **place(number))
        figure.update_yaxes(title={"text": axes[1], "standoff": 8, "font": {"size": 12}}, **place(number))
    if logarithmic:
        figure.update_yaxes(type="log")
    figure.update_yaxes(nticks=6, exponentformat="power", tickformat="~g" if logarithmic else None)
    return figure


def spread_demands_log(values: Sequence[float]) -> bool:
    """Whether numbers are so far apart that a straight axis would hide the small ones."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return len(positive) == len(values) > 1 and max(positive) > 12 * min(positive)
