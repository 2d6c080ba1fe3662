"""Figures: all sections of a report that are drawn, in the order of the page."""

from __future__ import annotations

from eckart.reports.answers import agreement
from eckart.reports.bars import cost, stereoset, tasks
from eckart.reports.blocks import accumulation
from eckart.reports.charts import Chart
from eckart.reports.experts import experts
from eckart.reports.histograms import similarity
from eckart.reports.layers import probing
from eckart.reports.linears import kept_share, spectra
from eckart.reports.runs import Collection
from eckart.reports.sizes import divergence, perplexity, scores


def all_figures(collection: Collection) -> list[Chart]:
    """The figures that there is something to draw for, in the order of the page."""
    makers = (
        *(perplexity, kept_share, experts, spectra, tasks, scores, stereoset),
        *(agreement, divergence, accumulation, probing, similarity, cost),
    )
    charts = [maker(collection) for maker in makers]
    return [chart for chart in charts if chart is not None and chart.views]
