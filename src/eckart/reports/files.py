"""Files: a report's tables as CSV and its line figures as SVG, for papers and for spreadsheets."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import TypeVar

from eckart.reports.drawings import draw_lines, why_no_drawings
from eckart.reports.figures import all_figures
from eckart.reports.formats import MISSING
from eckart.reports.runs import Collection, naming_damage
from eckart.reports.tables import Cell, Table, paper_table, summary
from eckart.reports.verdicts import pitfalls_of
from eckart.support.files import write_whole

T = TypeVar("T")


@naming_damage
def write_files(collection: Collection, folder: Path) -> list[Path]:
    """Write every table of a report as CSV, and its line figures as SVG where matplotlib is installed.

    The tables: the summary, each study's next to its paper's, the numbers of every chart, and the answers to the
    questions about probing. Values are in full, nothing is an empty field. Figures are those of the page, one file for
    each choice of its selectors. `drawings.why_no_drawings` says why there are none.

    Returns:
        the files, in that order. Each appears whole or not at all; what else is in the folder stays.

    Raises:
        ValueError: as `page.render` does.
    """
    charts = all_figures(collection)
    tables = [("summary", summary(collection))]
    tables += [
        (study.title, paper_table(study, place)) for place, study in enumerate(collection.studies, 1) if study.rows
    ]
    tables += [(chart.slug, chart.table) for chart in charts]
    for section in pitfalls_of(collection):
        tables += [(f"pitfalls-{table.slug}", table) for table in (*section.tables, *section.long)]
    files = {name: table_csv(table) for name, table in _named(tables, "csv")}
    if why_no_drawings() is None:
        drawn = [
            (
                " ".join([chart.slug, *view.choices]),
                (view.figure, ", ".join([chart.title, *filter(None, view.choices)])),
            )
            for chart in charts
            if chart.lines
            for view in chart.views
        ]
        files |= {name: draw_lines(figure, title) for name, (figure, title) in _named(drawn, "svg")}
    return [write_whole(Path(folder) / name, text) for name, text in files.items()]


def table_csv(table: Table) -> str:
    """A table as CSV: a head of "group label", then a line for each row, numbers as Python's `float` reads them.

    A cell of text that a spreadsheet would take for a formula gets an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_safe(" ".join(filter(None, (column.group, column.label)))) for column in table.columns])
    for row in table.rows:
        writer.writerow([_field(cell) for cell in row])
    return buffer.getvalue()


def slug(text: str) -> str:
    """A name for a file: words of small letters, digits and dots, joined by dashes; at most 100 characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:100].rstrip("-.") or "untitled"


def _named(things: list[tuple[str, T]], end: str) -> list[tuple[str, T]]:
    """The things with names of files, each its own."""
    used: dict[str, int] = {}
    named = []
    for title, thing in things:
        name = slug(title)
        used[name] = used.get(name, 0) + 1
        named.append((f"{name}.{end}" if used[name] == 1 else f"{name}-{used[name]}.{end}", thing))
    return named


def _field(cell: Cell) -> str:
    if isinstance(cell.value, int | float):
        return repr(cell.value)
    text = cell.text if cell.value is None else cell.value
    return "" if text == MISSING else _safe(text)


def _safe(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
