"""Drawings: line figures of the page as SVG files, drawn without a browser."""

from __future__ import annotations

import html
import io
import math
from typing import Any

import plotly.graph_objects as go

from eckart.reports.palette import AXIS, GRID, INK, QUIET, SURFACE

# Panels in a row, at most.
COLUMNS = 3
MARKS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "x": "X",
    "cross": "P",
    "triangle-down": "v",
    "star": "*",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK.light,
    "axes.labelcolor": QUIET.light,
    "axes.edgecolor": AXIS.light,
    "axes.facecolor": SURFACE.light,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID.light,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET.light,
    "ytick.color": QUIET.light,
    "figure.facecolor": SURFACE.light,
    "svg.fonttype": "none",  # text stays text: it can be searched and edited
    "svg.hashsalt": "eckart",  # the same figure is the same file
}


def why_no_drawings() -> str | None:
    """Why no figure can be drawn; None where it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "figures as SVG need matplotlib: pip install 'eckart[figures]'"
    return None


def draw_lines(figure: go.Figure, title: str) -> str:
    """A figure of lines, as `charts.panel_grid` lays it out, as SVG: light, its legend below.

    Args:
        figure: of scatter traces and level lines only; its titles, colours, marks, dashes, errors and axes are kept.

    Raises:
        ValueError: a trace that is no line.
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = int(figure.layout.meta["panels"])
    columns = min(panels, COLUMNS)
    rows = math.ceil(panels / columns)
    legend: dict[str, Any] = {}
    for trace in figure.data:
        if trace.legendgroup and trace.meta != "control":
            legend.setdefault(trace.legendgroup, trace)
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(max(4.2 * columns, 5.6), 3.2 * rows + 0.9), layout="constrained")
        grid = drawing.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[panels:]:
            axes.set_axis_off()
        for number, axes in enumerate(grid[:panels]):
            _draw_panel(axes, figure, number)
        drawing.suptitle(_text(title), fontsize=11, x=0.01, ha="left")
        handles = [_handle(trace) for trace in legend.values()]
        if any(trace.meta == "control" for trace in figure.data):
            handles.append(
                _handle(go.Scatter(name="control task", mode="lines", line={"color": QUIET.light, "dash": "dot"}))
            )
        drawing.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)) or 1, frameon=False)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_panel(axes: Any, figure: go.Figure, number: int) -> None:
    end = str(number + 1) if number else ""
    x, y = figure.layout[f"xaxis{end}"], figure.layout[f"yaxis{end}"]
    for trace in figure.data:
        if trace.type != "scatter" or trace.mode == "text":
            raise ValueError(f"a trace of type {trace.type} is no line")
        if (trace.yaxis or "y") == f"y{end}":
            _draw_trace(axes, trace, above=0 if y.type == "log" else -math.inf)
    for shape in figure.layout.shapes:
        if shape.yref == f"y{end}" and shape.y0 == shape.y1:
            style = DASHES[shape.line.dash or "solid"]
            axes.axhline(shape.y0, color=shape.line.color, linewidth=shape.line.width, linestyle=style)
    axes.set_title(_text(figure.layout.annotations[number].text), fontsize=10, loc="left")
    axes.set_xlabel(_text(x.title.text or ""))
    axes.set_ylabel(_text(y.title.text or ""))
    if y.type == "log":
        axes.set_yscale("log")
    if x.tickformat == "d":
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_trace(axes: Any, trace: go.Scatter, above: float) -> None:
    """Draw a line; it has a gap where y is not above that number: a logarithmic axis has no place for zero."""
    errors = trace.error_y.array if trace.error_y.visible else None
    axes.errorbar(
        trace.x,
        [y if y is not None and y > above else math.nan for y in trace.y],
        yerr=errors,
        ecolor=trace.line.color,
        elinewidth=0.8,
        capsize=1.5,
        alpha=trace.opacity,
        **_looks(trace),
        **_marked(trace),
    )


def _looks(trace: go.Scatter) -> dict[str, Any]:
    """How a line is drawn, in matplotlib's words; sizes are in points, which are 4/3 of a pixel."""
    size = trace.marker.size
    drawn = "markers" in trace.mode
    return {
        "color": trace.line.color,
        "linestyle": DASHES[trace.line.dash or "solid"] if "lines" in trace.mode else "",
        "linewidth": 0.75 * (trace.line.width or 2),
        "marker": MARKS.get(trace.marker.symbol or "circle", "o") if drawn else "",
        "markersize": 0.75 * (max(size) if isinstance(size, tuple | list) else size or 6),
    }


def _marked(trace: go.Scatter) -> dict[str, Any]:
    """Which points have a mark, if some marks have size 0."""
    size = trace.marker.size
    return {"markevery": [at for at, one in enumerate(size) if one]} if isinstance(size, tuple | list) else {}


def _handle(trace: go.Scatter) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=_text(trace.name), **_looks(trace))


def _text(text: str) -> str:
    """Text as it is: no tags, and no formulas between dollars."""
    return html.unescape(text).replace("$", r"\$")
