"""Blocks: the error after every block of a compressed model, what of it is the block's own, and what it inherits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from eckart.evals.result import EvalResult, Score
from eckart.reports.charts import Chart, LinePanel, Point, View, line_figure, spread_demands_log
from eckart.reports.formats import number, with_error
from eckart.reports.palette import DENSE, Look
from eckart.reports.rows import id_columns, looks_of, name_run, names_of
from eckart.reports.runs import Collection, Run
from eckart.reports.tables import Cell, Column, Table, clashes, corpus_of, number_cell, text_cell

# The scores of a block, with the titles of their panels.
PARTS = {"error": "error after the block", "own": "the block's own part", "inherited": "the inherited part"}


@dataclass(frozen=True)
class BlockError:
    """The error after one block.

    Attributes:
        block: its number, from 1.
        parts: {name in PARTS: the score}, relative to the dense state's squared norm.
        overlap: what own and inherited parts lack of the error; None where the result does not say.
        growth: how many times the error that the block was given it passes on; None also where it was given none.
    """

    block: int
    parts: Mapping[str, Score]
    overlap: float | None
    growth: float | None


def errors_of(result: EvalResult) -> tuple[BlockError, ...]:
    """The blocks of a result of `accumulation`, in order.

    Raises:
        ValueError: no block, or one without its own or its inherited part; the message names the task.
    """
    numbers = sorted(int(name.partition(".")[2]) for name in result.scores if name.startswith("error."))
    if not numbers:
        raise ValueError(f"{result.task} has no scores error.1, error.2, ...: it has no errors of blocks")
    details = {row.get("block"): row for row in result.details.get("blocks") or ()}
    blocks = []
    for block in numbers:
        lacking = next((name for name in PARTS if f"{name}.{block}" not in result.scores), None)
        if lacking is not None:
            raise ValueError(f"{result.task} has no score '{lacking}.{block}', though it has the error of that block")
        row = details.get(block, {})
        parts = {name: result.scores[f"{name}.{block}"] for name in PARTS}
        blocks.append(BlockError(block, parts, row.get("overlap"), row.get("growth")))
    return tuple(blocks)


def accumulation(collection: Collection) -> Chart | None:
    """How errors accumulate over the blocks: a panel for the error and for each part of it, a line for each method."""
    names = collection.tasks("accumulation")
    looks = looks_of(collection)
    views, rows = [], []
    for model in collection.models:
        for size in collection.sizes(model):
            for task in names:
                measured = [
                    (run, errors_of(run.compressed[task]))
                    for run in collection.at(model, size)
                    if task in run.compressed
                ]
                if measured:
                    views.append(View((model, size, corpus_of(task)), _figure(measured, looks)))
        for run in collection.of(model):
            for task in names:
                if task in run.compressed:
                    rows += _rows(run, task)
    if not views:
        return None
    reading = (
        "How far the hidden states after each block are from the dense model's, as a share of their squared norm; what "
        "of it the block adds by itself, given the dense model's states; and what it makes of the error before it. The "
        "two parts do not add up where they overlap: the table has the overlap, and the growth, how many times the "
        "error that a block is given it passes on. Whiskers are standard errors over windows."
    )
    title = "How errors accumulate"
    notes = tuple(note for task in names for note in clashes(collection, task))
    table = Table("accumulation-numbers", title, _columns(), tuple(rows))
    selectors = ("Model", "Size", "Text")
    return Chart("accumulation", title, reading, selectors, tuple(views), table, logs=True, lines=True, notes=notes)


def _figure(measured: Sequence[tuple[Run, Sequence[BlockError]]], looks: Mapping[str, Look]) -> go.Figure:
    panels = []
    called = names_of([run for run, _ in measured])
    for name, title in PARTS.items():
        lines = {
            called[run.name]: [
                Point(each.block, each.parts[name].value, each.parts[name].stderr, _hover(run, each)) for each in blocks
            ]
            for run, blocks in measured
        }
        panels.append(LinePanel(title, lines))
    values = [part.value for _, blocks in measured for each in blocks for part in each.parts.values()]
    # The first block inherits nothing: on a logarithmic axis its zero is a gap.
    logarithmic = spread_demands_log([value for value in values if value > 0])
    axes = ("block", "share of the squared norm")
    own = {called[run.name]: looks[run.series] for run, _ in measured}
    figure = line_figure(panels, own, dense=DENSE.light, axes=axes, logarithmic=logarithmic)
    figure.update_xaxes(tickformat="d", nticks=8)
    return figure


def _hover(run: Run, each: BlockError) -> str:
    parts = [f"{name} {with_error(part.value, part.stderr)}" for name, part in each.parts.items()]
    rest = f"overlap {number(each.overlap)}, growth {number(each.growth)}"
    return "\n".join([f"{name_run(run)}, block {each.block}", *parts, rest])


def _columns() -> tuple[Column, ...]:
    pairs = [Column(label, group=name.capitalize()) for name in PARTS for label in ("value", "error")]
    return (*id_columns(task="Text"), Column("Block"), *pairs, Column("Overlap"), Column("Growth"))


def _rows(run: Run, task: str) -> list[tuple[Cell, ...]]:
    who = tuple(text_cell(text) for text in (run.model, run.series, run.size or "", corpus_of(task)))
    return [
        (
            *who,
            number_cell(each.block, str(each.block)),
            *(number_cell(value) for part in each.parts.values() for value in (part.value, part.stderr)),
            number_cell(each.overlap),
            number_cell(each.growth),
        )
        for each in errors_of(run.compressed[task])
    ]
