"""`eckart run`: a recipe in a file to a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from eckart.cli.terminal import console, number, print_warnings, table
from eckart.runs.experiment import run
from eckart.runs.recipe import load_recipe


def command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe")],
    out: Annotated[Path, typer.Option(help="Run directory; a killed run goes on there")],
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
    """Carry out a recipe: evaluate the dense model, compress it, evaluate the result.

    \b
    model: meta-llama/Llama-2-7b-hf
    method: {name: nsvd-i, options: {share: 0.95}}
    keep: 0.7
    calibration: {corpus: wikitext2, samples: 256, length: 2048, seed: 0}
    evaluate: ["perplexity:wikitext2", {task: "perplexity:c4", limit: 100}]
    """
    whole = load_recipe(recipe)
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
        measured = run(whole, out, how, force=force)
    rows = []
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
    print_warnings(item.compressed for item in measured if item.compressed is not None)
