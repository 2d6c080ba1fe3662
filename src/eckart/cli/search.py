"""Commands that search: search, the ranks of every linear by measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation.search.criteria import Criterion, accuracy_score, labelled_score, perplexity_score, split_windows
from eckart.allocation.search.surgical import SearchResult, Tolerance, search
from eckart.allocation.search.trials import SHARES, planned
from eckart.calibration.moments import calibration_digest
from eckart.cli.app import (
    CACHE,
    CORES,
    Address,
    Batch,
    Cache,
    Data,
    Device,
    Dtype,
    EngineName,
    Force,
    NoCache,
    Workers,
    app,
    console,
)
from eckart.cli.compress import parse_options
from eckart.cli.terminal import TerminalTrack, number, table
from eckart.compression.spectra import spectra_on_demand
from eckart.data.corpora import read_text
from eckart.data.tokens import encode, sample_windows
from eckart.evals.tasks import Task, default_length, find_task
from eckart.evals.windows import cut_windows
from eckart.lowrank import build_method
from eckart.models.loading import load_model, load_tokenizer
from eckart.models.sites import find_sites, select_sites
from eckart.runs.composition import Allocation
from eckart.runs.engine.base import CalibrationRequest, SearchRequest
from eckart.runs.engine.choose import DEFAULT, open_engine

# Rows of the printed curve; all of it is in the file.
ROWS = 10


@app.command("search")
def search_command(
    model: Annotated[str, typer.Argument(help="Dense: a Hugging Face directory, a hub name, or builtin")],
    plan: Annotated[Path, typer.Argument(help="Where the ranks go, as JSON; `compress --plan` takes it")],
    method: Annotated[str, typer.Option(help="See `eckart methods`")] = "sfsd",
    option: Annotated[list[str] | None, typer.Option(help="Setting of the method, NAME=VALUE (repeatable)")] = None,
    score: Annotated[str, typer.Option(help="perplexity:CORPUS, lm-eval:TASK or probing:SET")] = "perplexity:wikitext2",
    score_split: Annotated[
        str, typer.Option(help="Split of the score's corpus, of which 20 % are searched on")
    ] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Windows or questions at most, before the split")] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(help="'0.5% per linear' (default of perplexity), '5%', '0.01', '0' (default of tasks)"),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Shares to try (repeatable); default 0.1 ... 0.9")] = None,
    keep: Annotated[float | None, typer.Option(help="Stop once this share of all linears is reached")] = None,
    include: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    blocks: Annotated[str | None, typer.Option(help="As in compress")] = None,
    layout: Annotated[str, typer.Option(help="plain or pivoted")] = "plain",
    rank_multiple: Annotated[int, typer.Option(min=1, help="As in compress")] = 1,
    calibration: Annotated[str, typer.Option(help="As in compress")] = "wikitext2",
    split: Annotated[str, typer.Option(help="Split of the calibration corpus")] = "train",
    samples: Annotated[int, typer.Option(help="Calibration windows")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens in each window, of both texts; default 2048")] = None,
    seed: Annotated[int, typer.Option(help="Which calibration windows are drawn")] = 0,
    dtype: Dtype = "auto",
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
    """Find the ranks by measuring: SFSD's surgical search, with any method.

    From the last linear to the first, each gets the smallest budget at which the score is still within the tolerance.
    The search sees 20 % of the score's data; both models are measured on the rest. Of probing, whose score is the mean
    selectivity of the layers, it sees the train split, and test is left. Beside PLAN stand a journal of the trials (a
    killed search goes on after the last) and the curve that was walked.

    \b
    eckart search MODEL plan.json --method sfsd --score perplexity:wikitext2
    eckart search MODEL plan.json --score lm-eval:piqa --tolerance 0.01 --keep 0.8
    eckart compress MODEL OUT --method sfsd --plan plan.json
    """
    if plan.exists() and not force:
        raise FileExistsError(f"{plan} exists; give another place, or --force")
    if layout not in ("plain", "pivoted"):
        raise ValueError(f"layout {layout!r} is none of plain, pivoted")
    task, track = Task(score, score_split, length=length, limit=limit), TerminalTrack(console)
    find_task(score)
    if task.kind not in ("perplexity", "lm-eval", "probing"):
        raise ValueError(f"{score!r} is no score to search by; there are perplexity:CORPUS, lm-eval:TASK, probing:SET")
    default = Allocation(name="surgical", score=score).allowed
    allowed = default if tolerance is None else Tolerance.parse(tolerance)
    built = build_method(method, parse_options(method, option or []))
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    searched, reported = _scores(task, loaded, tokenizer, data, batch_size)
    sites = find_sites(loaded)
    text = read_text(calibration, split=split, data=data)
    tokens = sample_windows(text, tokenizer, samples=samples, length=length or default_length(loaded), seed=seed)
    kept = None if no_cache else cache
    with open_engine(engine, address=address, workers=workers) as runs:
        request = CalibrationRequest(loaded, tokens, built, cache=kept, batch_size=batch_size, track=track)
        moments = tuple(runs.calibrate_by_block(request))
        spectra = spectra_on_demand(loaded, built, moments if built.needs else ())
        total = sum(site.num_params for site in sites)
        with runs.team(SearchRequest(loaded, built, lambda: moments if built.needs else ()), searched) as team:
            found = search(
                loaded,
                spectra,
                searched,
                better=searched.better,
                tolerance=allowed,
                sites=select_sites(sites, include=include or (), exclude=exclude or (), blocks=blocks),
                budgets=budget or SHARES,
                layout=layout,  # type: ignore[arg-type]
                rank_multiple=rank_multiple,
                stop=None if keep is None else int(keep * total),
                journal=plan.with_suffix(".trials.jsonl"),
                identity={
                    "model": model,
                    "dtype": str(loaded.dtype),
                    "calibration": calibration_digest(loaded, tokens, built.needs, sites),
                    "method": {"name": built.name, "options": built.options},
                    "score": searched.about,
                },
                team=team,
                track=track,
            )
    dense = reported(loaded)
    with planned(loaded, found.plan, spectra):
        compressed = reported(loaded)
    plan.with_suffix(".search.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    plan.write_text(found.plan.to_json(), encoding="utf-8")
    console.print(_curve(found))
    ends = found.curve[-1]
    console.print(
        f"{plan}: keeps {ends.keep:.1%} of the linears; on the data not searched on {number(dense)} dense, "
        f"{number(compressed)} with these ranks; {found.evaluations} evaluations"
    )
    if keep is not None and ends.keep > keep:
        console.print(f"every linear was looked at before keep {keep} was reached; a larger tolerance goes further")


def _scores(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path | None, batch_size: int
) -> tuple[Criterion, Criterion]:
    """The score on the data to search on, and on the data to report on."""
    if task.kind == "perplexity":
        text = read_text(task.argument, split=task.split, data=data)
        length = task.length or default_length(model)
        rows = cut_windows(model, encode(text.joined, tokenizer), length=length, limit=task.limit)
        chosen, others = split_windows(rows)
        return perplexity_score(chosen), perplexity_score(others)
    if task.kind == "probing":  # rows that everybody may train on are searched on, the others are reported on
        if Path(task.argument).is_file():
            raise ValueError(
                f"{task.argument} has one split, which would be searched and reported on; give a known set"
            )
        first, second = (
            labelled_score(task, tokenizer, split=split, data=data, batch_size=batch_size, workers=CORES)
            for split in ("train", "test")
        )
        return first, second
    first, second = (
        accuracy_score(replace(task, split=split, length=None), tokenizer, data=data, batch_size=batch_size)
        for split in ("sfsd-search", "sfsd-evaluation")
    )
    return first, second


def _curve(found: SearchResult) -> Table:
    """Some of the points, evenly over the linears."""
    points = found.curve
    chosen = sorted({round(step * (len(points) - 1) / ROWS) for step in range(ROWS + 1)})
    rows = [
        [f"{points[i].sites}", f"{points[i].keep:.3f}", number(points[i].score), f"{points[i].evaluations}"]
        for i in chosen
    ]
    return table("The way there", ["linears decided", "keep", "score", "evaluations"], rows, text_columns=0)
