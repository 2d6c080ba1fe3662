"""Commands that search: search, the ranks of every linear by measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    CalibrationText,
    Data,
    Device,
    Dtype,
    EngineName,
    Force,
    NoCache,
    TrustRemoteCode,
    Workers,
    open_run,
    parse_options,
)
from eckart.cli.terminal import console, number, table
from eckart.runs.recipe import parse_recipe
from eckart.runs.search import search_ranks
from eckart.support.files import write_whole

# Rows of the printed curve; all of it is in the file.
ROWS = 10


def command(
    model: Annotated[str, typer.Argument(help="Dense: a Hugging Face directory, a hub name, or builtin")],
    plan: Annotated[Path, typer.Argument(help="Where the ranks go, as JSON; `compress --plan` takes it")],
    method: Annotated[str, typer.Option(help="See `eckart methods`")] = "sfsd",
    option: Annotated[list[str] | None, typer.Option(help="Setting of the method, NAME=VALUE (repeatable)")] = None,
    score: Annotated[
        str, typer.Option(help="perplexity:CORPUS, lm-eval:TASK, stereoset, probing:SET or classification:SET")
    ] = "perplexity:wikitext2",
    score_split: Annotated[
        str | None, typer.Option(help="Split of the score's corpus, of which 20 % are searched on; default test")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Windows or questions at most, of what is searched on and of the rest")
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(help="'0.5% per linear' (default of perplexity), '5%', '0.01', '0' (default of tasks)"),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Shares to try (repeatable); default 0.1 ... 0.9")] = None,
    keep: Annotated[
        float | None, typer.Option(help="Stop once this share of the selected linears' numbers is kept")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    blocks: Annotated[str | None, typer.Option(help="As in compress")] = None,
    layout: Annotated[str, typer.Option(help="plain or pivoted")] = "plain",
    rank_multiple: Annotated[int, typer.Option(min=1, help="As in compress")] = 1,
    calibration: CalibrationText = None,
    split: Annotated[str, typer.Option(help="Split of the calibration corpus")] = "train",
    samples: Annotated[int, typer.Option(help="Calibration windows")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens in each window, of both texts; default 2048")] = None,
    seed: Annotated[int, typer.Option(help="Which calibration windows are drawn")] = 0,
    dtype: Dtype = "auto",
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
    """Find the ranks by measuring: SFSD's surgical search, with any method.

    From the last linear to the first, each gets the smallest budget at which the score is still within the tolerance.
    The search sees 20 % of the score's data; both models are measured on the rest. Of labelled sets it sees the train
    split, and test is the rest; of probing the score is the mean selectivity of the layers. Next to PLAN are written
    a journal of the trials (a killed search goes on after the last) and the curve of sizes and scores.

    \b
    eckart search MODEL plan.json --method sfsd --score perplexity:wikitext2
    eckart search MODEL plan.json --score lm-eval:piqa --tolerance 0.01 --keep 0.8
    eckart compress MODEL OUT --method sfsd --plan plan.json
    """
    if plan.exists() and not force:
        raise FileExistsError(f"{plan} exists; give another place, or --force")
    recipe = parse_recipe(
        {
            "model": model,
            "dtype": dtype,
            "method": {"name": method, "options": parse_options(method, option or [])},
            "keep": keep,
            "sites": {"include": include or [], "exclude": exclude or [], "blocks": blocks},
            "allocation": {
                "name": "surgical",
                "score": score,
                "split": score_split,
                "limit": limit,
                "tolerance": tolerance,
                "budgets": budget or None,
            },
            "layout": layout,
            "rank_multiple": rank_multiple,
            "context": length,
            "calibration": {
                "corpus": calibration,
                "split": split,
                "samples": samples,
                "length": length,
                "seed": seed,
            },
        },
        where="command line",
    )
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
        claims=plan,
    ) as how:
        report = search_ranks(recipe, how, journal=_beside(plan, ".trials.jsonl"))
        write_whole(_beside(plan, ".search.json"), json.dumps(report.facts, indent=1))
        write_whole(plan, report.plan.to_json())
    console.print(_curve(report.facts["curve"]))
    console.print(
        f"{plan}: keeps {report.kept:.1%} of the selected linears; on the data not searched on {number(report.dense)} "
        f"dense, {number(report.compressed)} with these ranks; {report.facts['evaluations']} evaluations"
    )
    if keep is not None and report.kept > keep:
        console.print(f"every linear was looked at before keep {keep} was reached; a larger tolerance goes further")


def _beside(plan: Path, what: str) -> Path:
    """The file that belongs to a plan: plan.trials.jsonl of plan.json, plan-0.8.trials.jsonl of plan-0.8."""
    return plan.with_name(plan.name.removesuffix(".json") + what)


def _curve(points: Sequence[Mapping[str, Any]]) -> Table:
    """Some of the points, evenly over the linears."""
    places = sorted({round(step * (len(points) - 1) / ROWS) for step in range(ROWS + 1)})
    rows = [
        [
            f"{points[place]['sites']}",
            f"{points[place]['keep']:.3f}",
            number(points[place]["score"]),
            f"{points[place]['evaluations']}",
        ]
        for place in places
    ]
    return table("The search", ["linears decided", "keep", "score", "evaluations"], rows, text_columns=0)
