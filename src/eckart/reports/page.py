"""Page: everything a report shows, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from eckart.reports.charts import Chart, View
from eckart.reports.figures import all_figures
from eckart.reports.palette import DARK
from eckart.reports.runs import Collection, Run, naming_damage, read_runs
from eckart.reports.tables import Table, environments, incomplete, paper_table, repeats, summary, warnings
from eckart.reports.verdicts import pitfalls_of
from eckart.support.files import write_whole
from eckart.support.plain_data import finite

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    directories: Sequence[Path], out: Path, *, title: str | None = None, baseline: str | None = None
) -> Path:
    """Write one self-contained HTML page about run directories.

    The page holds its script, its styles and its numbers; it asks the network for nothing and opens from disk.
    Sections without data are left out; what a run lacks is listed.

    Args:
        directories: run directories, or folders of them (a study, perhaps with its study.json), in any mixture.
        out: the HTML file; its folder is created. It appears whole or not at all.
        title: of the page; None is the studies' titles, or the models' names.
        baseline: the method whose perplexity improvements are counted from (NSVD's "Avg. Impro."); None is asvd-i, and
            no improvement where there is none.

    Returns:
        `out`.

    Raises:
        ValueError: a folder that is not there or holds no run, a file that cannot be read (the message names it), or
            a baseline that no run has.
    """
    return write_whole(Path(out), render(read_runs(directories), title=title, baseline=baseline))


@naming_damage
def render(collection: Collection, *, title: str | None = None, baseline: str | None = None) -> str:
    """The page as text. Raises ValueError as `write_report` does."""
    charts = all_figures(collection)
    overview = summary(collection, baseline)
    studies = [(study, paper_table(study, place)) for place, study in enumerate(collection.studies, 1) if study.rows]
    data = {"dark": DARK, "charts": {chart.slug: _chart_data(chart) for chart in charts}}
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template("page.html").render(
        title=title or _title(collection),
        studies=[(study, table, repeats(overview, table)) for study, table in studies],
        facts=_facts(collection),
        when=_when(collection),
        summary=overview if any(isinstance(cell.value, float) for row in overview.rows for cell in row) else None,
        charts=charts,
        questions=pitfalls_of(collection),
        incomplete=incomplete(collection),
        warnings=warnings(collection),
        environments=environments(collection),
        runs=[(run, _settings_text(run)) for run in collection.runs],
        css=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        js=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        plotly=packed_plotly() if charts else None,
        data=script_json(data),
    )


@functools.cache
def packed_plotly() -> str:
    """plotly.js, which draws the figures, as base64 of gzip: 2 MB for 4.8. The page's own script unpacks it.

    It is the whole library, of which the page uses scatter, bar and heatmap: the Python package ships no smaller one.
    """
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def script_json(data: Any) -> str:
    """JSON that is safe inside a script element: null for NaN and infinity, nothing that ends the element."""
    text = json.dumps(finite(data), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _chart_data(chart: Chart) -> dict[str, Any]:
    options = [
        list(dict.fromkeys(view.choices[place] for view in chart.views)) for place in range(len(chart.selectors))
    ]
    return {
        "title": chart.title,
        "selectors": [{"name": name, "options": values} for name, values in zip(chart.selectors, options, strict=True)],
        "start": _start(chart),
        "views": [_view_data(view) for view in chart.views],
        "table": _table_data(chart.table),
    }


def _start(chart: Chart) -> int:
    """The view that is shown first: the first, at the middle one of its sizes, where methods differ visibly."""
    first = chart.views[0].choices
    if "Size" not in chart.selectors:
        return 0
    place = chart.selectors.index("Size")
    alike = [
        number
        for number, view in enumerate(chart.views)
        if all(a == b for at, (a, b) in enumerate(zip(view.choices, first, strict=True)) if at != place)
    ]
    return alike[len(alike) // 2]


def _view_data(view: View) -> dict[str, Any]:
    figure = view.figure.to_plotly_json()
    return {"choices": view.choices, "notes": view.notes, "data": figure["data"], "layout": figure["layout"]}


def _table_data(table: Table) -> dict[str, Any]:
    """The table for the script that builds it when it is opened; a cell's value only where it is not its text."""
    return {
        "slug": table.slug,
        "title": table.title,
        "groups": table.groups,
        "columns": [[column.label, column.numeric, column.group] for column in table.columns],
        "rows": [
            [[cell.text] if cell.value in (cell.text, None) else [cell.text, _plain(cell.value)] for cell in row]
            for row in table.rows
        ],
    }


def _plain(value: float | str | None) -> float | str | None:
    """The value as JSON and JavaScript's Number() both read it."""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _title(collection: Collection) -> str:
    if collection.studies:
        return "; ".join(dict.fromkeys(study.title for study in collection.studies))
    models = collection.models
    what = "measured" if all(run.is_dense for run in collection.runs) else "compressed"
    return f"{' and '.join(models[:3])}{' and others' if len(models) > 3 else ''}, {what}"


def _facts(collection: Collection) -> list[tuple[str, str, str]]:
    """(count, of what, names) for the head of the page, of what there is any."""
    runs = [run for run in collection.runs if not run.is_dense]
    methods = list(dict.fromkeys(run.method for run in runs))
    sizes = [f"{keep:g}" for keep in sorted({run.keep for run in runs if run.keep is not None}, reverse=True)]
    tasks = {task for run in collection.runs for results in (run.compressed, run.dense) for task in results}
    facts: list[tuple[Sized, str, str]] = [
        (collection.models, "model", ", ".join(collection.models)),
        (methods, "method", ", ".join(dict.fromkeys(run.series for run in runs))),
        (runs, "run", f"keeping {', '.join(sizes)} of the linears" if sizes else ""),
        (tasks, "evaluation", "of the dense and of the compressed models" if runs else "of the models as they are"),
    ]
    return [
        (f"{len(things)}", noun if len(things) == 1 else f"{noun}s", names) for things, noun, names in facts if things
    ]


def _when(collection: Collection) -> str:
    """The days on which the runs were made."""
    days = sorted({f"{run.when:%Y-%m-%d}" for run in collection.runs if run.when is not None})
    if not days:
        return "at an unknown time"
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _settings_text(run: Run) -> str:
    """The recipe, as it is in the run directory."""
    return yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)
