"""`eckart compress`: options to a recipe, a recipe to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import (
    CACHE,
    ENGINE,
    Address,
    Batch,
    Blocks,
    Cache,
    CalibrationSeed,
    CalibrationSplit,
    CalibrationText,
    Data,
    DenseModel,
    Device,
    Dtype,
    EngineName,
    Exclude,
    Force,
    Include,
    MethodOptions,
    NoCache,
    RankMultiple,
    RemoteCode,
    TargetColumn,
    TextColumn,
    TrustRemoteCode,
    Workers,
    open_run,
    parse_options,
)
from eckart.cli.tables import experts_table, remarks, sizes_table
from eckart.cli.terminal import console
from eckart.lowrank.storage import GROUP
from eckart.runs.card import describe_cache, describe_speed
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from eckart.support.files import check_replaceable


def command(
    model: DenseModel,
    out: Annotated[Path, typer.Argument(help="Directory for the compressed checkpoint")],
    method: Annotated[str, typer.Option(help="A composition or a method, see `eckart methods`")] = "best",
    option: MethodOptions = None,
    effort: Annotated[
        str | None, typer.Option(help="Of best: low, medium or high; more takes longer and loses less. Default medium")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the selected linears' numbers kept, in (0, 1]")] = None,
    keep_total: Annotated[float | None, typer.Option(help="Share of the whole model's numbers, embeddings too")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Largest size of the weight files, in bytes")] = None,
    speed: Annotated[
        float | None, typer.Option(help="Tokens per second over the dense model's, by a table of this machine: 1.5")
    ] = None,
    speed_rows: Annotated[
        int | None, typer.Option(help="With --speed: tokens at a time; 1 generates (default), 512 is a prompt")
    ] = None,
    keep_cache: Annotated[
        float | None,
        typer.Option(help="Share of the cache's numbers kept, by cutting keys and values; --keep is for other linears"),
    ] = None,
    cache_group: Annotated[
        int | None, typer.Option(min=1, help="With --keep-cache: key-value heads factored together; default up to 4")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    blocks: Blocks = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Ranks from a plan.json instead of --keep; edit it by hand")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Keep numbers in 8, 4, 3 or 2 bits; auto, with --max-bytes, chooses for each linear"),
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=8, help=f"With --bits: numbers that share a scale; default {GROUP}")
    ] = None,
    rank_multiple: RankMultiple = 1,
    allocation: Annotated[
        str | None, typer.Option(help="Who gets which rank: uniform, effective-rank, global; others in a recipe")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="plain or pivoted")] = None,
    order: Annotated[str | None, typer.Option(help="one-shot, sequential or anchored")] = None,
    joint: Annotated[bool | None, typer.Option(help="Let linears that read one input share a right factor")] = None,
    refit: Annotated[bool | None, typer.Option(help="Fit left factors once more by least squares")] = None,
    refine: Annotated[int | None, typer.Option(min=0, help="Gradient steps on each block; 0 for none")] = None,
    calibration: CalibrationText = None,
    split: CalibrationSplit = "train",
    column: TextColumn = None,
    target: TargetColumn = None,
    samples: Annotated[int, typer.Option(help="Calibration windows or documents")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens in each; default 2048 or the model's limit")] = None,
    seed: CalibrationSeed = 0,
    fisher: Annotated[
        str, typer.Option(help="fwsvd's sums: gathered on this text, or recorded by `eckart finetune`")
    ] = "gathered",
    dtype: Dtype = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = ENGINE,
    address: Address = None,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    out_of_core: Annotated[
        bool, typer.Option("--out-of-core", help="One block in memory at a time: for models larger than memory")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="With --out-of-core: go on where a run was stopped")] = False,
    trust_remote_code: TrustRemoteCode = False,
    remote_code: RemoteCode = False,
    force: Force = False,
) -> None:
    """Factor a model's linears and write a checkpoint that stock transformers loads after `import eckart`.

    \b
    eckart compress MODEL OUT --keep 0.7 --calibration 'broad*3+mydomain.jsonl'
    eckart compress MODEL OUT --max-bytes 8000000000 --bits auto
    eckart compress MODEL OUT --speed 1.5
    eckart compress MODEL OUT --keep 0.8 --keep-cache 0.5
    eckart compress MODEL OUT --method svd --keep 0.9 --include mlp
    eckart compress MODEL OUT --method sfsd --keep 0.46 --blocks "last 12"
    eckart compress MODEL OUT --keep 0.7 --out-of-core --resume
    """
    recipe = parse_recipe(
        {
            "model": model,
            "dtype": dtype,
            "method": {"name": method, "options": parse_options(method, option or [])},
            "effort": effort,
            "keep": keep,
            "keep_total": keep_total,
            "max_bytes": max_bytes,
            "speed": None if speed is None else {"times": speed, "rows": speed_rows},
            "keep_cache": keep_cache,
            "cache_group": cache_group,
            "plan": None if plan_file is None else str(plan_file),
            "sites": {"include": include or [], "exclude": exclude or [], "blocks": blocks},
            "allocation": allocation,
            "layout": layout,
            "order": order,
            "joint": joint,
            "refit": refit,
            "refine": None if refine is None else {"steps": refine},
            "bits": int(bits) if bits is not None and bits.isdigit() else bits,
            "group": group,
            "rank_multiple": rank_multiple,
            "calibration": {
                "corpus": calibration,
                "split": split,
                "column": column,
                "target": target,
                "samples": samples,
                "length": length,
                "seed": seed,
                "fisher": fisher,
            },
        },
        where="command line",
    )
    if speed_rows is not None and speed is None:
        raise ValueError("--speed-rows goes with --speed: leave it out")
    if resume and not out_of_core:
        raise ValueError("--resume is for --out-of-core; other runs go on from what is in the cache")
    if out_of_core and engine != ENGINE:
        raise ValueError("--out-of-core takes one block after another in this process: leave out --engine")
    check_replaceable(out, force=force, reads=recipe.reads)  # and claimed, before a cluster is started
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
        remote_code=remote_code,
        claims=out,
    ) as how:
        if out_of_core:
            outcome = compress_out_of_core(recipe, out, how, resume=resume, force=force)
        else:
            outcome = make_checkpoint(recipe, out, how, force=force)
    for line in remarks(outcome.plan, outcome.report):
        console.print(line)
    console.print(sizes_table(str(out), outcome.summary, outcome.plan))
    if (experts := experts_table(outcome.report)) is not None:
        console.print(experts)
    if "speed" in outcome.allocation:
        console.print(describe_speed(outcome.allocation["speed"]))
    if "cache" in outcome.allocation:
        console.print(describe_cache(outcome.allocation["cache"]))
    for what, name in (("refined", "refine"), ("distilled", "distil")):
        passes = [each for each in outcome.passes if each.name == name]
        undone = [each.place for each in passes if not each.kept]
        note = f"; undone, as it did not help on held-out samples: {', '.join(undone)}" if undone else ""
        if passes:
            console.print(f"{what} {len(passes) - len(undone)} of {len(passes)}{note}")
    for report in outcome.passes:
        if report.name == "recover":
            console.print(f"fine-tuned after compression: loss {report.before:.4f} before, {report.after:.4f} after")
    console.print(", ".join(f"{stage} {value:.1f} s" for stage, value in outcome.seconds.items()))
