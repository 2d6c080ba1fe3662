"""`eckart correct`: a quantised model and its reference to an adapter that corrects it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import (
    CACHE,
    ENGINE,
    Batch,
    Blocks,
    Cache,
    CalibrationSeed,
    CalibrationSplit,
    CalibrationText,
    Data,
    Device,
    Exclude,
    Force,
    Include,
    MethodOptions,
    NoCache,
    TargetColumn,
    TextColumn,
    TrustRemoteCode,
    open_run,
    parse_options,
)
from eckart.cli.terminal import console, number, table
from eckart.runs.correction import make_correction, parse_correction
from eckart.support.files import check_replaceable


def command(
    quantised: Annotated[
        str,
        typer.Argument(
            metavar="QUANTISED_MODEL", help="A torchao or compressed-tensors checkpoint, or a quantised .gguf file"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the adapter")],
    reference: Annotated[str, typer.Option(help="The dense model that it was quantised from")],
    rank: Annotated[int, typer.Option(help="Rank of each linear's correction")] = 32,
    method: Annotated[str, typer.Option(help="A method without a bias: asvd-i, kfac, svd, see `eckart methods`")] = (
        "asvd-i"
    ),
    option: MethodOptions = None,
    order: Annotated[
        str, typer.Option(help="anchored, on the quantised model's inputs; or one-shot, on the reference's")
    ] = "anchored",
    allocation: Annotated[
        str, typer.Option(help="uniform, or global: as many numbers, shared out by a knapsack")
    ] = "uniform",
    include: Include = None,
    exclude: Exclude = None,
    blocks: Blocks = None,
    calibration: CalibrationText = None,
    split: CalibrationSplit = "train",
    column: TextColumn = None,
    target: TargetColumn = None,
    samples: Annotated[int, typer.Option(help="Calibration windows or documents")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens in each; default 2048 or the model's limit")] = None,
    seed: CalibrationSeed = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the adapter: auto (the reference's 16-bit type, else bfloat16), float32, ...")
    ] = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Correct a quantised model by low-rank terms, written as a LoRA adapter that PEFT puts on it.

    \b
    eckart correct QUANTISED_MODEL OUT --reference MODEL --rank 16
    eckart correct model-Q4_K_M.gguf OUT --reference MODEL --include mlp
    eckart correct QUANTISED_MODEL OUT --reference MODEL --method kfac --allocation global
    """
    recipe = parse_correction(
        {
            "quantised": quantised,
            "model": reference,
            "rank": rank,
            "method": method,
            "options": parse_options(method, option or []),
            "order": order,
            "allocation": allocation,
            "dtype": dtype,
            "sites": {"include": include or [], "exclude": exclude or [], "blocks": blocks},
            "calibration": {
                "corpus": calibration,
                "split": split,
                "column": column,
                "target": target,
                "samples": samples,
                "length": length,
                "seed": seed,
            },
        },
        where="command line",
    )
    check_replaceable(out, force=force, reads=recipe.reads)
    with open_run(
        ENGINE,
        address=None,
        workers=None,
        device=device,
        batch_size=batch_size,
        data=data,
        cache=cache,
        no_cache=no_cache,
        trust_remote_code=trust_remote_code,
        claims=out,
    ) as how:
        outcome = make_correction(recipe, out, how, force=force)
    correction = outcome.correction
    ranks = sorted({each.rank for each in correction.sites})
    before, after = correction.errors
    what = "output" if outcome.parts else "weight"
    console.print(
        table(
            f"{out}",
            ["", "value"],
            [
                ["quantised by", outcome.kind],
                [
                    "linears corrected",
                    f"{len(correction.factors):,} of {len(correction.sites):,} quantised ones that were selected",
                ],
                ["rank", f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"],
                ["numbers in the adapter", f"{correction.num_params:,}"],
                ["bytes of its weights file", f"{outcome.file_bytes:,}"],
                ["bits added to a weight of these linears", f"{correction.bits_a_weight:.3f}"],
                [f"relative squared {what} error, mean", f"{number(before)} before, {number(after)} after"],
            ],
        )
    )
    console.print(
        table(
            "with the largest error",
            ["", "rank", "before", "after"],
            [[each.name, f"{each.rank}", number(each.before), number(each.after)] for each in outcome.worst],
        )
    )
    if correction.unchanged:
        names = ", ".join(site.name for site in correction.unchanged[:3])
        more = ", ..." if len(correction.unchanged) > 3 else ""
        console.print(f"not quantised, and left as they are: {len(correction.unchanged)} linears ({names}{more})")
    console.print(f"{outcome.seconds:.1f} s")
