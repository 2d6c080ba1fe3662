"""Commands that measure: eval, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.app import CORES, Address, Batch, Data, Device, Dtype, EngineName, Force, Workers, app, console
from eckart.cli.terminal import TerminalTrack, number, table
from eckart.data.corpora import read_text
from eckart.data.tokens import sample_windows
from eckart.evals.result import EvalResult
from eckart.evals.similarity import read_activations
from eckart.evals.subject import Setup, Subject
from eckart.evals.tasks import Task, default_length, find_task
from eckart.models.loading import load_model, load_tokenizer
from eckart.models.sites import input_groups
from eckart.runs.engine.base import EvaluationRequest
from eckart.runs.engine.choose import DEFAULT, open_engine
from eckart.runs.experiment import write_result


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Dense or compressed: a Hugging Face directory, a hub name, or builtin")],
    task: Annotated[list[str], typer.Option(help="See `eckart evaluations`, such as perplexity:CORPUS (repeatable)")],
    out: Annotated[Path | None, typer.Option(help="Directory for one JSON file per task")] = None,
    split: Annotated[str, typer.Option(help="Split of the corpus; of a task sfsd-search, sfsd-evaluation")] = "test",
    column: Annotated[str | None, typer.Option(help="Field that holds the text")] = None,
    length: Annotated[int | None, typer.Option(help="Window length; default 2048 or the model's limit")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many windows or examples")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question; default the task's")] = None,
    seed: Annotated[int, typer.Option(help="Draws those examples, and the calibration windows")] = 0,
    leave_out_long: Annotated[
        bool, typer.Option("--leave-out-long", help="StereoSet: leave out what is past the model's positions")
    ] = False,
    reference: Annotated[
        str | None, typer.Option(help="The dense model, for divergence, and for cost's ratios")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="The calibration corpus, for similarity")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows, for similarity")] = 256,
    dtype: Dtype = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = DEFAULT,
    address: Address = None,
    force: Force = False,
) -> None:
    """Measure a model.

    \b
    eckart eval MODEL --task perplexity:wikitext2 --data DIR --limit 100 --out results/
    eckart eval MODEL --task lm-eval:piqa --task lm-eval:mmlu --shots 5
    eckart eval OUT --task stereoset --task divergence:wikitext2 --task cost --reference MODEL
    """
    tasks = [Task(name, split, column, length, limit, shots, seed, leave_out_long) for name in task]
    for item in tasks:
        find_task(item.name)
        if out is not None and (out / f"{item.slug}.json").exists() and not force:
            raise FileExistsError(f"{out / f'{item.slug}.json'} exists; give another --out, or --force")
    track = TerminalTrack(console)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    dense = None if reference is None else load_model(reference, dtype=dtype, device=device)
    activations = None
    if calibration is not None:
        text = read_text(calibration, data=data)
        tokens = sample_windows(text, tokenizer, samples=samples, length=length or default_length(loaded), seed=seed)
        activations = read_activations(loaded, tokens, input_groups(dense or loaded), track=track)
    results: list[EvalResult] = []
    with open_engine(engine, address=address, workers=workers) as runs:
        subject = Subject(loaded, tokenizer, Path(model) if Path(model).is_dir() else None, dense, activations)
        setup = Setup(data, batch_size, workers or CORES, track=track)
        outcomes = runs.outcomes(EvaluationRequest(subject, tasks, setup))
        for item, outcome in zip(tasks, outcomes, strict=True):
            if not isinstance(outcome, EvalResult):
                raise outcome
            results.append(outcome)
            if out is not None:
                write_result(outcome, out / f"{item.slug}.json")
    rows = [
        row
        for result in results
        for row in [
            _score_row(result.task, result.metric, result.value, result.stderr, result.n),
            *(_score_row("", name, score.value, score.stderr, score.n) for name, score in result.scores.items()),
        ]
    ]
    console.print(table(model, ["task", "metric", "value", "stderr", "n"], rows, text_columns=2))


def _score_row(task: str, metric: str, value: float, stderr: float | None, n: int) -> list[str]:
    return [task, metric, number(value), "" if stderr is None else number(stderr), f"{n:,}"]


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Run or study directories")],
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading")] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder for its tables as CSV and its line figures as SVG, for a paper")
    ] = None,
    force: Force = False,
) -> None:
    """Write one HTML page from run directories: tables and figures, no network, opens from disk."""
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; give another --out, or --force")
    if files is not None and files.exists() and any(files.iterdir()) and not force:
        raise FileExistsError(f"{files} is not empty; give another --files, or --force")
    from eckart.reports import write_report  # plotly takes a second to import

    console.print(f"{write_report(directories, out, title=title)}")
    if files is not None:
        console.print(tell_files(directories, files))


def tell_files(directories: Sequence[Path], folder: Path) -> str:
    """Write a report's tables and figures as files, and say in words where, and why there are no figures."""
    from eckart.reports import read_runs, why_no_drawings, write_files

    count = len(write_files(read_runs(directories), folder))
    why = why_no_drawings()
    return f"{count} files in {folder}" + (f"; {why}" if why else "")
