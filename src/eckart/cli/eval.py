"""`eckart eval`: a model and tasks to results."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    Json,
    TextColumn,
    TrustRemoteCode,
    Workers,
    open_run,
)
from eckart.cli.terminal import (
    TerminalTrack,
    console,
    number,
    print_json,
    print_line,
    print_warnings,
    stdout_for_json,
    table,
)
from eckart.data.mixtures import parts_of
from eckart.data.pairs import is_encoder_decoder
from eckart.data.samples import Cutting, read_tokens
from eckart.evals.catalogue import find_task
from eckart.evals.result import EvalResult
from eckart.evals.similarity import read_activations
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.evals.texts import default_length, windows_of
from eckart.models.loading import load_model, load_tokenizer, weights_on_disk
from eckart.models.sites import common_blocks, input_groups
from eckart.runs.calibration_errors import calibration_errors, recorded_recipe
from eckart.runs.engine.base import EvaluationRequest
from eckart.runs.results import open_results


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
        str | None, typer.Option(help="The dense model, for divergence, distance, accumulation, cost's ratios")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="The calibration corpus, for similarity; of distance, default its own")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of that corpus")] = 256,
    dtype: Dtype = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = ENGINE,
    address: Address = None,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure a model.

    \b
    eckart eval MODEL --task perplexity:wikitext2 --data DIR --limit 100 --out results/
    eckart eval MODEL --task lm-eval:piqa --task lm-eval:mmlu --shots 5
    eckart eval OUT --task stereoset --task divergence:wikitext2 --task cost --reference MODEL
    eckart eval OUT --task distance:notes.txt --reference MODEL
    """
    tasks = [Task(name, split, column, length, limit, shots, seed, leave_out_long) for name in task]
    needs = frozenset[str]().union(*(find_task(item.name).needs for item in tasks))
    texts = [] if calibration is None else [calibration]
    if "errors" in needs and calibration is None:
        texts = [recorded_recipe(Path(model)).calibration.corpus]
    settings = {"model": model, "dtype": dtype, "reference": reference, "calibration": calibration, "samples": samples}
    with (
        stdout_for_json(as_json),
        open_results(
            out,
            tasks,
            settings,
            models=[model] if reference is None else [model, reference],
            texts=[part for text in texts for part in parts_of(text)],
            data=data,
            force=force,
        ) as (results, kept),
    ):
        missing = [item for item in tasks if item.slug not in kept]
        if len(missing) < len(tasks):
            print_line(f"{len(tasks) - len(missing)} of {len(tasks)} are there already")
        if missing:
            trust = trust_remote_code
            loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust)
            tokenizer = load_tokenizer(model, trust_remote_code=trust)
            dense, activations, errors, tokens = None, None, None, None
            if reference is not None:
                dense = load_model(reference, dtype=dtype, device=device, trust_remote_code=trust)
            if calibration is not None:
                window = length or default_length(loaded)
                cut: Cutting = "halves" if is_encoder_decoder(loaded) else "windows"
                given: dict[str, Any] = {"samples": samples, "length": window, "seed": seed, "cut": cut}
                tokens = read_tokens(calibration, tokenizer, **given, data=data)
            for item in missing:  # what is wrong with a text is said before a pass over the calibration's is paid for
                if find_task(item.name).needs & {"activations", "errors"}:
                    windows_of(loaded, tokenizer, item, data=data)
            track = TerminalTrack(console)
            if "activations" in needs and tokens is not None:
                activations = read_activations(loaded, tokens, input_groups(dense or loaded), track=track)
            if "errors" in needs and dense is not None:
                errors = calibration_errors(
                    Path(model),
                    loaded,
                    dense,
                    tokenizer,
                    text=calibration,
                    tokens=tokens,
                    length=length,
                    limit=limit,
                    data=data,
                    track=track,
                )
            with open_run(
                engine, address=address, workers=workers, device=device, batch_size=batch_size, data=data
            ) as how:
                blocks = common_blocks(loaded, dense) if dense is not None and "blocks" in needs else ()
                subject = Subject(loaded, tokenizer, weights_on_disk(model), dense, activations, errors, blocks)
                setup = Setup(how.data, how.batch_size, how.workers, track=how.track)
                outcomes = how.engine.outcomes(EvaluationRequest(subject, missing, setup))
                for item, outcome in zip(missing, outcomes, strict=True):
                    if not isinstance(outcome, EvalResult):
                        raise outcome
                    results.write(item, outcome)
                    kept[item.slug] = outcome
    measured = [kept[item.slug] for item in tasks]
    if as_json:
        print_json({"model": model, "results": [_as_data(result) for result in measured]})
    else:
        rows = [
            row
            for result in measured
            for row in [
                _score_row(result.task, result.metric, result.value, result.stderr, result.n),
                *(_score_row("", name, score.value, score.stderr, score.n) for name, score in result.scores.items()),
            ]
        ]
        console.print(table(model, ["task", "metric", "value", "stderr", "n"], rows, text_columns=2))
    print_warnings(measured)


def _as_data(result: EvalResult) -> dict[str, Any]:
    """A result without what there is of each example, which is in the files of --out."""
    whole = asdict(result)
    return {
        **{key: whole[key] for key in ("task", "metric", "value", "stderr", "n", "better", "scores", "settings")},
        "warning": result.warning,
    }


def _score_row(task: str, metric: str, value: float, stderr: float | None, n: int) -> list[str]:
    return [task, metric, number(value), "" if stderr is None else number(stderr), f"{n:,}"]
