"""Linears: what became of every linear of a model: kept shares, errors, spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from eckart.reports.charts import Chart, View, panel_grid, place
from eckart.reports.formats import number, percent, plain
from eckart.reports.palette import INK, SURFACE, ramp, ramp_scale
from eckart.reports.runs import Collection
from eckart.reports.site_facts import SiteFacts
from eckart.reports.tables import Column, Table, number_cell, text_cell

# Ranks, as shares of the largest, at which the table of spectra reads the loss.
READ_AT = (0.1, 0.25, 0.5, 0.75)


def kept_share(collection: Collection) -> Chart | None:
    """Kept share of every site, block by role (SFSD Figure 3), and the error that it costs."""
    views, rows = [], []
    for run in collection.runs:
        sites = run.sites
        if not sites:
            continue
        rows += [
            (
                text_cell(run.model),
                text_cell(run.series),
                text_cell(run.size or ""),
                number_cell(site.block, str(site.block)),
                text_cell(site.role),
                number_cell(site.rank, "dense" if site.rank is None else str(site.rank)),
                text_cell(site.way),
                number_cell(site.kept, percent(site.kept)),
                number_cell(site.relative_error, number(site.relative_error)),
            )
            for site in sites
        ]
        choices = (run.model, run.series, run.size or "as it is")
        if any(site.kept is not None for site in sites):
            views.append(View((*choices, "kept share"), _heat_map(sites, lambda site: site.kept, (0.0, 1.0), percent)))
        errors = [site.relative_error for site in sites if site.relative_error is not None]
        if errors:
            top = max([*(error for error in errors if math.isfinite(error)), 1e-12])
            heat = _heat_map(
                sites, lambda site: 0.0 if site.way == "dense" else site.relative_error, (0.0, top), number
            )
            views.append(View((*choices, "relative error"), heat))
    columns = tuple(
        Column(label, numeric)
        for label, numeric in (
            ("Model", False),
            ("Method", False),
            ("Size", False),
            ("Block", True),
            ("Role", False),
            ("Rank", True),
            ("Kept as", False),
            ("Kept share", True),
            ("Relative error", True),
        )
    )
    reading = (
        "Each cell is one linear of the model: its block from left to right, its role from top to bottom. The further "
        "its colour is from the page's, the more of its numbers it keeps (in few bits, of its bytes; where linears "
        "share a right factor, of those of all of them); 100 % is left dense. Relative error is the share of the "
        "layer's output energy that what is stored loses on the calibration text, before any steps."
    )
    table = Table("kept-numbers", "Kept share of every linear", columns, tuple(rows))
    title = "Where the parameters stay"
    return Chart("kept", title, reading, ("Model", "Method", "Size", "Show"), tuple(views), table) if views else None


def _heat_map(
    sites: Sequence[SiteFacts],
    value: Callable[[SiteFacts], float | None],
    span: tuple[float, float],
    show: Callable[[float], str],
) -> go.Figure:
    blocks = sorted({site.block for site in sites})
    roles = list(dict.fromkeys(site.role for site in sites))
    at = {(site.role, site.block): site for site in sites}
    grid: list[list[float | None]] = []
    hovers: list[list[str]] = []
    labels: list[list[str]] = []
    for role in roles:
        in_row = [at.get((role, block)) for block in blocks]
        values = [None if site is None else value(site) for site in in_row]
        grid.append([v if v is None or math.isfinite(v) else None for v in values])
        hovers.append(["" if site is None else _site_hover(site) for site in in_row])
        labels.append([_short(v, show) for v in values])
    figure = panel_grid([""], row=max(34 * len(roles), 90), least=200)
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=[str(block) for block in blocks],
            y=[plain(role) for role in roles],
            zmin=span[0],
            zmax=span[1],
            colorscale=ramp_scale(),
            xgap=2,
            ygap=2,
            hovertext=hovers,
            hoverinfo="text",
            colorbar={
                "thickness": 10,
                "outlinewidth": 0,
                "len": 0.96,
                "tickformat": ".0%" if show is percent else ".2~g",
                "nticks": 5,
                "x": 1.0,
                "xpad": 8,
            },
        )
    )
    if len(blocks) <= 8:
        figure.add_trace(_cell_labels(figure.data[0], labels, span))
    figure.update_layout(margin={"t": 10, "r": 4})
    figure.update_xaxes(
        title={"text": "block", "standoff": 6, "font": {"size": 12}},
        type="category",
        showgrid=False,
        ticks="",
        nticks=0,
    )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def _cell_labels(heat: go.Heatmap, labels: Sequence[Sequence[str]], span: tuple[float, float]) -> go.Scatter:
    """The numbers on the cells, each in the tone that stands out from its cell on a light page and on a dark one."""
    cells = [
        (x, y, text, INK.light if z is None or z < span[0] + 0.45 * (span[1] - span[0]) else SURFACE.light)
        for y, values, texts in zip(heat.y, heat.z, labels, strict=True)
        for x, z, text in zip(heat.x, values, texts, strict=True)
    ]
    return go.Scatter(
        x=[x for x, *_ in cells],
        y=[y for _, y, *_ in cells],
        text=[text for *_, text, _ in cells],
        mode="text",
        textfont={"color": [color for *_, color in cells], "size": 12},
        hoverinfo="skip",
    )


def _short(value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if show is percent else show(value)


def _site_hover(site: SiteFacts) -> str:
    lines = [
        f"{site.role}, block {site.block}",
        site.way if site.kept is None else f"{percent(site.kept)} kept, {site.way}",
        f"{site.shape[0]} by {site.shape[1]}",
    ]
    if site.relative_error is not None:
        lines.append(f"relative error {number(site.relative_error)}")
    return plain("\n".join(lines)).replace("\n", "<br>")


def spectra(collection: Collection) -> Chart | None:
    """Share of the loss that remains at every rank: a panel for each role, a line for each block."""
    views, rows, seen = [], [], set()
    for run in collection.runs:
        sites = [site for site in run.sites if len(site.spectrum) > 1]
        if not sites or (run.model, run.series) in seen:  # a method's spectrum is the same at every size
            continue
        seen.add((run.model, run.series))
        views.append(View((run.model, run.series), _spectrum_figure(sites)))
        rows += [
            (
                text_cell(run.model),
                text_cell(run.series),
                number_cell(site.block, str(site.block)),
                text_cell(site.role),
                *(number_cell(_read_spectrum(site, share)) for share in READ_AT),
            )
            for site in sites
        ]
    columns = (
        Column("Model", False),
        Column("Method", False),
        Column("Block"),
        Column("Role", False),
        *(Column(f"{share:.0%} of ranks", group="Loss left at") for share in READ_AT),
    )
    reading = (
        "How much of the loss is left when a share of the ranks is kept, in the metric of the method: the sooner a "
        "line falls, the more low-rank the layer is. One line for each block, coloured by its depth."
    )
    table = Table("spectra-numbers", "Loss left by rank", columns, tuple(rows))
    return Chart("spectra", "Spectra", reading, ("Model", "Method"), tuple(views), table, logs=True) if views else None


def _read_spectrum(site: SiteFacts, share: float) -> float:
    """The loss that remains at a share of the ranks, interpolated linearly between known ranks."""
    position = share * (len(site.spectrum) - 1)
    low = min(int(position), len(site.spectrum) - 2)
    return site.spectrum[low] + (site.spectrum[low + 1] - site.spectrum[low]) * (position - low)


def _spectrum_figure(sites: Sequence[SiteFacts]) -> go.Figure:
    roles = list(dict.fromkeys(site.role for site in sites))
    blocks = sorted({site.block for site in sites})
    figure = panel_grid(roles, row=150, least=180)
    for number_of, role in enumerate(roles):
        for site in (site for site in sites if site.role == role):
            depth = blocks.index(site.block) / max(len(blocks) - 1, 1)
            steps = len(site.spectrum) - 1
            figure.add_trace(
                go.Scatter(
                    x0=0,
                    dx=1 / steps,
                    y=[float(f"{loss:.4g}") for loss in site.spectrum],
                    mode="lines",
                    line={"color": ramp(0.3 + 0.7 * depth), "width": 1.6},
                    hovertemplate=f"block {site.block}<br>%{{x:.0%}} of ranks: %{{y:.3g}} left<extra></extra>",
                ),
                **place(number_of),
            )
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            hoverinfo="skip",
            marker={
                "color": [blocks[0]],
                "cmin": blocks[0],
                "cmax": max(blocks[-1], blocks[0] + 1),
                "colorscale": ramp_scale(0.3),
                "showscale": True,
                "colorbar": {
                    "thickness": 8,
                    "outlinewidth": 0,
                    "title": {"text": "block", "side": "right", "font": {"size": 12}},
                    "nticks": 5,
                    "tickformat": "d",
                    "x": 1.0,
                    "xpad": 18,
                    "lenmode": "pixels",
                    "len": 170,
                    "y": 1,
                    "yanchor": "top",
                },
            },
        ),
        **place(0),
    )
    figure.update_xaxes(
        tickformat=".0%", range=[0, 1], title={"text": "ranks kept", "standoff": 6, "font": {"size": 12}}, nticks=5
    )
    figure.update_yaxes(rangemode="tozero", tickformat="~g", nticks=5)
    return figure
