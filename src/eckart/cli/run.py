"""Commands that carry out recipes and studies: run, reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from eckart.cli.app import (
    CACHE,
    CORES,
    Address,
    Batch,
    Cache,
    Data,
    Device,
    EngineName,
    Force,
    NoCache,
    Workers,
    app,
    console,
)
from eckart.cli.eval import tell_files
from eckart.cli.terminal import TerminalTrack, number, table
from eckart.runs.engine.choose import DEFAULT, open_engine
from eckart.runs.experiment import run
from eckart.runs.recipe import load_recipe
from eckart.runs.reproduction import Line, run_study
from eckart.runs.study import Study, load_study, studies
from eckart.runs.workbench import How

# Columns of a study that a terminal shows side by side.
WIDEST = 10


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe")],
    out: Annotated[Path, typer.Option(help="Run directory; a killed run goes on there")],
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = DEFAULT,
    address: Address = None,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    force: Force = False,
) -> None:
    """Carry out a recipe: evaluate the dense model, compress it, evaluate the result.

    \b
    model: meta-llama/Llama-2-7b-hf
    method: {name: nsvd-i, options: {share: 0.95}}
    keep: 0.7
    calibration: {corpus: wikitext2, samples: 256, length: 2048, seed: 0}
    evaluate: ["perplexity:wikitext2", {task: "perplexity:c4", limit: 100}]
    """
    rows, chosen = [], load_recipe(recipe)
    with open_engine(engine, address=address, workers=workers) as runs:
        how = How(device, batch_size, None if no_cache else cache, data, TerminalTrack(console), workers or CORES, runs)
        measured = run(chosen, out, how, force=force)
    for item in measured:
        before, after = item.dense, item.compressed
        change = "" if before is None or after is None else number(after.value - before.value)
        shown = before or after
        assert shown is not None
        rows.append(
            [
                shown.task,
                shown.metric,
                "" if before is None else number(before.value),
                "" if after is None else number(after.value),
                change,
            ]
        )
    console.print(table(str(out), ["task", "metric", "dense", "compressed", "change"], rows, text_columns=2))


@app.command()
def reproduce(
    study: Annotated[str | None, typer.Argument(help="A study's name, or a YAML file; none lists them")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory; default runs/<study>-<scale>; resumed there")] = None,
    scale: Annotated[str, typer.Option(help="paper, small (your model and data), builtin (no network)")] = "paper",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE over every run: model=DIR, models=[A,B], calibration.samples=64, data=DIR"
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the compressed models' weights, and not their results alone")
    ] = False,
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = DEFAULT,
    address: Address = None,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    force: Force = False,
) -> None:
    """Run a table or figure of a paper again: its numbers beside ours, with the difference, and a report.

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
    chosen = load_study(study).at(scale, changes)
    with open_engine(engine, address=address, workers=workers) as runs:
        how = How(device, batch_size, None if no_cache else cache, data, TerminalTrack(console), workers or CORES, runs)
        lines = run_study(chosen, out, how, force=force, keep_weights=keep_models)
    console.print(study_table(chosen, lines))
    refused: dict[str, list[str]] = {}
    for line in lines:
        for task, why in (line.refusals or {}).items():
            refused.setdefault(why, []).append(f"{task} of {line.label}")
    for why, what in refused.items():
        others = f" and {len(what) - 1} more" if len(what) > 1 else ""
        console.print(f"[yellow]not measured[/yellow] {what[0]}{others}: {escape(why)}", highlight=False)
    from eckart.reports import write_report  # plotly takes a second to import

    page = write_report([out], out / "report.html")
    console.print(f"{out / 'study.json'}, {page}")
    console.print(tell_files([out], out / "files"))


def study_table(study: Study, lines: Sequence[Line]) -> Table:
    """A study's lines: ours, and beside it the paper's number and the difference where there is one.

    A study of few rows and many columns is laid on its side.
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
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: {value!r} is not YAML") from error
    return changes
