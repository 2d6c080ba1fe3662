"""`eckart eval`: a model and tasks to results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import (
    ENGINE,
    Address,
    AnyModel,
    Batch,
    Data,
    Device,
    Dtype,
    EngineName,
    Force,
    TextColumn,
    Workers,
    open_run,
)
from eckart.cli.terminal import TerminalTrack, console, number, table
from eckart.data.corpora import read_text
from eckart.data.tokens import sample_windows
from eckart.evals.result import EvalResult, write_result
from eckart.evals.similarity import read_activations
from eckart.evals.subject import Setup, Subject
from eckart.evals.tasks import Task, default_length, find_task
from eckart.models.loading import load_model, load_tokenizer
from eckart.models.sites import input_groups
from eckart.runs.engine.base import EvaluationRequest


def command(
    model: AnyModel,
    task: Annotated[list[str], typer.Option(help="See `eckart evaluations`, such as perplexity:CORPUS (repeatable)")],
    out: Annotated[Path | None, typer.Option(help="Directory for one JSON file per task")] = None,
    split: Annotated[str, typer.Option(help="Split of the corpus; of a task sfsd-search, sfsd-evaluation")] = "test",
    column: TextColumn = None,
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
    engine: EngineName = ENGINE,
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
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    dense = None if reference is None else load_model(reference, dtype=dtype, device=device)
    activations = None
    if calibration is not None:
        text = read_text(calibration, data=data, tokenizer=tokenizer)
        tokens = sample_windows(text, tokenizer, samples=samples, length=length or default_length(loaded), seed=seed)
        groups = input_groups(dense or loaded)
        activations = read_activations(loaded, tokens, groups, track=TerminalTrack(console))
    results: list[EvalResult] = []
    with open_run(engine, address=address, workers=workers, device=device, batch_size=batch_size, data=data) as how:
        subject = Subject(loaded, tokenizer, Path(model) if Path(model).is_dir() else None, dense, activations)
        setup = Setup(how.data, how.batch_size, how.workers, track=how.track)
        outcomes = how.engine.outcomes(EvaluationRequest(subject, tasks, setup))
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
