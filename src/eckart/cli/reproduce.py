"""`eckart reproduce`: a study to run directories, a table and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eckart.cli.options import (
    CACHE,
    ENGINE,
    Address,
    Batch,
    Cache,
    Data,
    Device,
    EngineName,
    Force,
    NoCache,
    TrustRemoteCode,
    Workers,
    open_run,
)
from eckart.cli.report import tell_files
from eckart.cli.terminal import console, table
from eckart.reports import write_report
from eckart.runs.reproduction import Line, run_study
from eckart.runs.study import Study, load_study, studies
from eckart.support.plain_data import parse_yaml

# Columns of a study that a terminal shows side by side.
WIDEST = 10


def command(
    study: Annotated[str | None, typer.Argument(help="A study's name, or a YAML file; none lists them")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory; default runs/<study>-<scale>; resumed there")] = None,
    scale: Annotated[str, typer.Option(help="paper, small (your model and data), builtin (no network)")] = "paper",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE over every run: model=DIR, models=[A,B], keep=0.7, limits.windows=12, data=DIR",
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the compressed models' weights, and not their results alone")
    ] = False,
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = ENGINE,
    address: Address = None,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Run a table or figure of a paper again: its numbers next to ours, with the difference, and a report.

    \b
    eckart reproduce nsvd-table-1 --scale builtin
    eckart reproduce nsvd-table-1 --scale small --set model=DIR --data DIR
    eckart reproduce nsvd-table-1 --device cuda
    """
    if study is None:
        rows = [[name, load_study(name).title] for name in studies()]
        console.print(table("Studies", ["name", "what it repeats"], rows, text_columns=2))
        return
    changes = parse_changes(set_ or [])
    data = Path(changes.pop("data")) if "data" in changes else data
    out = out or Path("runs") / f"{Path(study).stem}-{scale}"
    scaled = load_study(study).at(scale, changes)
    with open_run(
        engine,
        address=address,
        workers=workers,
        device=device,
        batch_size=batch_size,
        data=data,
        cache=cache,
        no_cache=no_cache,
        trust_remote_code=trust_remote_code,
        claims=out,
    ) as how:
        lines = run_study(scaled, out, how, force=force, keep_weights=keep_models)
    console.print(study_table(scaled, lines))
    for note in study_notes(lines):
        console.print(note, highlight=False)
    refused: dict[str, list[str]] = {}
    for line in lines:
        for task, why in (line.refusals or {}).items():
            refused.setdefault(why, []).append(f"{task} of {line.label}")
    for why, what in refused.items():
        others = f" and {len(what) - 1} more" if len(what) > 1 else ""
        console.print(f"not measured: {what[0]}{others}: {why}", style="yellow", highlight=False)
    page = write_report([out], out / "report.html")
    console.print(f"{out / 'study.json'}, {page}")
    console.print(tell_files([out], out / "files"))
    if not any(value is not None for line in lines for value in line.ours):
        raise ValueError(f"{scaled.title}: nothing was measured, for the reasons above")


def study_table(study: Study, lines: Sequence[Line]) -> Table:
    """A study's lines: our numbers, and below them the paper's and the difference where there is one.

    A study with more than `WIDEST` columns is transposed.
    """
    improved = any(line.improvement is not None for line in lines)
    rows = []
    for line in lines:
        rows.append([line.label, *map(_cell, line.ours), *([_share(line.improvement)] if improved else [])])
        if any(value is not None for value in line.published):
            extra = [_share(line.published_improvement)] if improved else []
            rows.append(["    paper", *map(_cell, line.published), *extra])
            rows.append(["    ours - paper", *map(_cell, line.difference), *([""] if improved else [])])
    kinds = {column.partition(":")[0] for column in study.columns}
    heads = [(column.partition(":")[2] or column) if len(kinds) == 1 else column for column in study.columns]
    grid = [["", *heads, *(["improvement"] if improved else [])], *rows]
    if len(heads) > WIDEST:
        grid = [list(column) for column in zip(*grid, strict=True)]
    return table(study.title, grid[0], grid[1:])


def study_notes(lines: Sequence[Line]) -> list[str]:
    """What a table does not say: which numbers a line's average improvement lacks."""
    return [
        f"{line.label}: no average improvement, for {', '.join(line.unmeasured)} was not measured"
        for line in lines
        if line.unmeasured
    ]


def _cell(value: float | None) -> str:
    """Four digits that say something."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e10 else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """{"calibration.samples": 64} out of ["calibration.samples=64"]; values are YAML.

    Raises:
        ValueError: not KEY=VALUE, or a value that is not YAML.
    """
    changes = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r} is not KEY=VALUE")
        changes[key] = parse_yaml(value, f"--set {key}: {value!r}")
    return changes
