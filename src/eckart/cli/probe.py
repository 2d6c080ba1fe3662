"""`eckart probe`: what each layer of a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from eckart.cli.options import (
    CACHE,
    CORES,
    AnyModel,
    Batch,
    Cache,
    Data,
    Device,
    Dtype,
    Force,
    NoCache,
    TrustRemoteCode,
    Workers,
)
from eckart.cli.terminal import TerminalTrack, console, table
from eckart.evals.catalogue import find_task
from eckart.evals.hidden_states import Pooling
from eckart.evals.probing import Control
from eckart.evals.result import EvalResult, Score
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.models.loading import load_model, load_tokenizer
from eckart.runs.results import open_results


def command(
    model: AnyModel,
    task: Annotated[
        list[str],
        typer.Option(help="cola, sst2, truthfulqa, a .jsonl, .csv or .tsv file, or a hub data set (repeatable)"),
    ],
    reference: Annotated[str | None, typer.Option(help="The dense model: what the layers lost is shown too")] = None,
    split: Annotated[str, typer.Option(help="test (what nobody trains on) or train")] = "test",
    column: Annotated[
        str | None, typer.Option(help="Field of a file that holds the text; 'label' is the class")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, drawn at random")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text read at most; default the model's limit")] = None,
    pooling: Annotated[
        Pooling, typer.Option(help="mean over a text's tokens, its last one, or its first (cls)")
    ] = "mean",
    control: Annotated[
        Control, typer.Option(help="What has one random label in the control task: the text, or its last-word")
    ] = "text",
    seeds: Annotated[int, typer.Option(min=1, help="Probes of each layer, each with a split of its own")] = 3,
    seed: Annotated[int, typer.Option(help="The first of them; draws the rows too")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for one JSON file per task")] = None,
    dtype: Dtype = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Probe every layer of a model: can its hidden states tell the classes of a task apart, beyond chance?

    A two-layer network is trained on 80 % of the rows and scored on the rest, and again on random labels, the control.
    A layer whose weighted F1 is not 0.2 above its control's fails the check.

    \b
    eckart probe MODEL --task cola --task sst2 --data DIR --out probes/
    eckart probe OUT --reference MODEL --task truthfulqa --pooling last
    eckart probe MODEL --task rows.csv --column sentence --control last-word
    """
    tasks = [
        Task(
            f"probing:{name}",
            split,
            column,
            length,
            limit,
            seed=seed,
            pooling=pooling,
            control=control,
            seeds=seeds,
        )
        for name in task
    ]
    for item in tasks:
        find_task(item.name)

    def measure(name: str, some: list[Task]) -> list[EvalResult]:
        if not some:
            return []
        return evaluate(
            load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code),
            load_tokenizer(name, trust_remote_code=trust_remote_code),
            some,
            data=data,
            batch_size=batch_size,
            workers=workers or CORES,
            cache=None if no_cache else cache,
            track=TerminalTrack(console),
        )

    with open_results(out, tasks, {"model": model, "dtype": dtype}, models=[model], data=data, force=force) as (
        results,
        kept,
    ):
        missing = [item for item in tasks if item.slug not in kept]
        for item, measured in zip(missing, measure(model, missing), strict=True):
            results.write(item, measured)
            kept[item.slug] = measured
    of_reference = [] if reference is None else measure(reference, tasks)
    for place, item in enumerate(tasks):
        result, before = kept[item.slug], of_reference[place] if of_reference else None
        console.print(layers_table(f"{model}: {item.label}", result, before))
        cut = result.details["truncated"]
        note = f"; {cut:,} texts were cut at {result.settings['length']} tokens" if cut else ""
        console.print(
            f"{result.n:,} texts, a fifth of them for the test, {seeds} seeds, states pooled by {pooling}; always "
            f"answering the commonest class has F1 {result.details['majority']:.3f}{note}"
        )


def layers_table(title: str, result: EvalResult, before: EvalResult | None = None) -> Table:
    """A row for every layer: score, control, selectivity with their errors over seeds, and whether it passes."""
    heads = ["layer", "weighted F1", "control", "selectivity", "check", *(["selectivity lost"] if before else [])]
    rows = []
    for layer in result.details["layers"]:
        number = layer["layer"]
        names = [f"{name}.{number}" for name in ("f1", "control", "selectivity")]
        rows.append(
            [
                "embeddings" if number == 0 else str(number),
                *_cells(result, names),
                "passes" if layer["passes"] else "fails",
                *([] if before is None else [_lost(result, before, names[-1])]),
            ]
        )
    means = ["", "control", "selectivity"]
    passed = f"{result.scores['passed'].value:.0%} pass {result.details['check']:g}"
    lost = [] if before is None else [_lost(result, before, means[-1])]
    rows.append(["mean of layers", *_cells(result, means), passed, *lost])
    return table(title, heads, rows)


def _cells(result: EvalResult, names: Sequence[str]) -> list[str]:
    scores = [result.scores[name] if name else Score(result.value, result.stderr) for name in names]
    return [f"{one.value:.3f}" + ("" if one.stderr is None else f" ± {one.stderr:.3f}") for one in scores]


def _lost(result: EvalResult, before: EvalResult, name: str) -> str:
    if name not in before.scores:
        return ""
    return f"{before.scores[name].value - result.scores[name].value:+.3f}"
