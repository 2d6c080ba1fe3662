"""Experts: of a mixture's layers, how much each expert is used against its rank and its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go

from eckart.reports.charts import Chart, View, panel_grid, place
from eckart.reports.formats import number, percent, plain
from eckart.reports.palette import MARKS, METHODS
from eckart.reports.rows import id_columns
from eckart.reports.runs import Collection
from eckart.reports.site_facts import SiteFacts
from eckart.reports.tables import Column, Table, number_cell, text_cell

# {what a view shows: (of a linear, how it is written)}.
SHOWN: Mapping[str, tuple[Callable[[SiteFacts], float | None], Callable[[float], str]]] = {
    "rank": (lambda site: min(site.shape) if site.rank is None else site.rank, number),
    "relative error": (lambda site: site.relative_error, number),
}


def experts(collection: Collection) -> Chart | None:
    """Rank and error of every expert's linear against the share of tokens that the expert is given, layer by layer."""
    views, rows = [], []
    for run in collection.runs:
        sites = [site for site in run.sites if site.expert is not None and site.tokens is not None]
        for shown, (value, _) in SHOWN.items():
            drawn = [site for site in sites if value(site) is not None]
            if drawn:
                choices = (run.model, run.series, run.size or "as it is", shown)
                views.append(View(choices, _figure(drawn, shown)))
        rows += [
            (
                text_cell(run.model),
                text_cell(run.series),
                text_cell(run.size or ""),
                text_cell(site.expert[1]),
                number_cell(site.block, str(site.block)),
                number_cell(site.expert[0], str(site.expert[0])),
                number_cell(site.tokens, percent(site.tokens)),
                number_cell(site.rank, "dense" if site.rank is None else str(site.rank)),
                number_cell(site.relative_error, number(site.relative_error)),
            )
            for site in sites
            if site.expert is not None
        ]
    if not views:
        return None
    reading = (
        "A panel for each layer, and in it a mark for each linear of each expert: to the right the share of the "
        "calibration text's tokens that the router gives to the expert, upwards the rank of its factors, or the share "
        "of its output's energy that they lose on the tokens it is given. An expert that is used more is worth more "
        "rank where the ranks are chosen by loss."
    )
    columns = (
        *id_columns(task="Linear"),
        *(Column("Block"), Column("Expert")),
        *(Column("Tokens given"), Column("Rank"), Column("Relative error")),
    )
    table = Table("experts-numbers", "Experts by their use", columns, tuple(rows))
    selectors = ("Model", "Method", "Size", "Show")
    return Chart("experts", "Experts by their use", reading, selectors, tuple(views), table, logs=True)


def _figure(sites: Sequence[SiteFacts], shown: str) -> go.Figure:
    value, write = SHOWN[shown]
    blocks = sorted({site.block for site in sites})
    linears = list(dict.fromkeys(site.expert[1] for site in sites if site.expert is not None))
    figure = panel_grid([f"layer {block}" for block in blocks], row=170, least=220)
    for at, block in enumerate(blocks):
        for number_of, linear in enumerate(linears):
            own = [
                site for site in sites if site.block == block and site.expert is not None and site.expert[1] == linear
            ]
            figure.add_trace(
                go.Scatter(
                    x=[site.tokens for site in own],
                    y=[value(site) for site in own],
                    mode="markers",
                    name=plain(linear),
                    legendgroup=plain(linear),
                    showlegend=at == 0,
                    marker={"color": METHODS[number_of].light, "size": 8, "symbol": MARKS[number_of], "opacity": 0.8},
                    hovertext=[_hover(site, f"{shown} {write(value(site) or 0.0)}") for site in own],
                    hoverinfo="text",
                ),
                **place(at),
            )
    figure.update_xaxes(
        tickformat=".0%", rangemode="tozero", title={"text": "tokens given", "standoff": 6, "font": {"size": 12}}
    )
    figure.update_xaxes(nticks=5)
    figure.update_yaxes(nticks=5, tickformat="~g", title={"text": shown, "standoff": 8, "font": {"size": 12}})
    return figure


def _hover(site: SiteFacts, what: str) -> str:
    lines = (f"{site.role}, block {site.block}", f"given {percent(site.tokens)} of the tokens", what, site.way)
    return plain("\n".join(lines)).replace("\n", "<br>")
