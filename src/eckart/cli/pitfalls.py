"""`eckart pitfalls`: the probing paper's three questions, answered from run directories. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as Drawn

from eckart.cli.options import Force
from eckart.cli.terminal import console, table
from eckart.reports.pitfalls import answer
from eckart.reports.runs import read_runs
from eckart.reports.tables import Table
from eckart.reports.verdicts import answers_data, sections
from eckart.support.files import write_whole

# Columns that belong to the number before them, and how they are written after it.
AFTER = {"from": " [{}", "to": ", {}]", "error": " ± {}"}


def command(
    directories: Annotated[list[Path], typer.Argument(help="Run or study directories, with probing results")],
    out: Annotated[Path | None, typer.Option(help="The answers as JSON, with every number in full")] = None,
    baseline: Annotated[str, typer.Option(help="The method that others are compared with")] = "svd",
    seed: Annotated[int, typer.Option(help="Of the resampling behind the intervals")] = 0,
    force: Force = False,
) -> None:
    """What compression does to what the layers know: the probing paper's three questions, from run directories.

    Does loss of quality go with loss of selectivity? How do methods differ at equal size? What does a short fine-tuning
    after the compression win back, and what is lost for good? Intervals are 95 %, from the bootstrap.

    \b
    eckart pitfalls runs/probing-table-3-small runs/probing-table-4-small --out answers.json
    """
    if out is not None and out.exists() and not force:
        raise FileExistsError(f"{out} exists; give another --out, or --force")
    answers = answer(read_runs(directories), baseline=baseline, seed=seed)
    for section in sections(answers):
        console.print(section.title, style="bold", highlight=False)
        for part in section.tables:
            console.print(_drawn(part, "" if part.title == section.title else part.title))
        for sentence in section.sentences:
            console.print(sentence, highlight=False)
        console.print()
    if not answers.relations:
        console.print("No run has both a probing and a score of a task: nothing to say on how they go together.")
    if not answers.recoveries:
        console.print("No two runs differ in `recover` alone: nothing to say on what is lost for good.")
    if out is not None:
        console.print(f"{write_whole(out, json.dumps(answers_data(answers), indent=2, ensure_ascii=False))}")


def _drawn(part: Table, title: str) -> Drawn:
    """A table for a terminal: a number is in one column with its interval or its error."""
    heads: list[str] = []
    rows: list[list[str]] = [[] for _ in part.rows]
    for place, column in enumerate(part.columns):
        if column.label in AFTER:
            for row, cells in zip(rows, part.rows, strict=True):
                row[-1] += AFTER[column.label].format(cells[place].text) if cells[place].value is not None else ""
            continue
        heads.append(column.group if column.label == "value" else column.label)
        for row, cells in zip(rows, part.rows, strict=True):
            row.append(cells[place].text)
    words = next((at for at, column in enumerate(part.columns) if column.numeric), len(heads))
    return table(title, heads, rows, text_columns=words)
