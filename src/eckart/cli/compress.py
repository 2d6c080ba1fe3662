"""Commands that make models: demo, compress, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
from eckart.cli.demo import run_demo
from eckart.cli.tables import remarks, sizes_table
from eckart.cli.terminal import TerminalTrack, megabytes, table
from eckart.compression.baselines import BASELINES, baseline_options
from eckart.models.dense import export_dense
from eckart.models.loading import check_free, load_model, load_tokenizer, save
from eckart.models.sites import low_rank_modules
from eckart.runs.composition import composition_options
from eckart.runs.engine.choose import DEFAULT, open_engine
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from eckart.runs.workbench import How, make_checkpoint
from eckart.support.sizes import num_bytes, num_params


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Also write the table as JSON to this file")] = None,
) -> None:
    """Compress the built-in model by five methods at five sizes and print what it cost.

    Needs no network. Calibrated on Python's documentation (prose); code is the text it has not been calibrated on.
    """
    rows = []
    for row in run_demo(track=TerminalTrack(console)):
        rows.append(row)
        if not console.is_terminal:
            console.print(f"{row.method} {row.keep}: {row.in_domain:.2f} in domain, {row.out_of_domain:.2f} out of it")
    console.print(
        table(
            "Perplexity of held-out text after compression, calibrated on prose",
            ["method", "keep", "prose (in)", "code (out)", "parameters", "stored", "decode speed"],
            [
                [
                    row.method,
                    f"{row.keep:.1f}",
                    f"{row.in_domain:.2f}",
                    f"{row.out_of_domain:.2f}",
                    f"{row.params:,}",
                    megabytes(row.bytes),
                    f"{row.decode_speed:.2f} x",
                ]
                for row in rows
            ],
        )
    )
    console.print(
        "keep is the share of each linear kept; embeddings stay dense. Decode speed is against dense, same run."
    )
    if out is not None:
        out.write_text(json.dumps([row.to_dict() for row in rows], indent=1), encoding="utf-8")


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub name, or builtin")],
    out: Annotated[Path, typer.Argument(help="Directory for the compressed checkpoint")],
    method: Annotated[str, typer.Option(help="A composition or a method, see `eckart methods`")] = "best",
    option: Annotated[list[str] | None, typer.Option(help="Setting of the method, NAME=VALUE (repeatable)")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the chosen linears' numbers kept, in (0, 1]")] = None,
    keep_total: Annotated[float | None, typer.Option(help="Share of the whole model's numbers, embeddings too")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Largest size of the weight files, in bytes")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only these sites: a part (mlp), a role (q_proj) or a pattern (repeatable)"),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these sites (repeatable)")] = None,
    blocks: Annotated[str | None, typer.Option(help="Only these blocks: 'last 12', 'first 4', '8-19', '0,5,7'")] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Ranks from a plan.json instead of --keep; edit it by hand")
    ] = None,
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this; 32 is fast in bfloat16")] = 1,
    allocation: Annotated[
        str | None, typer.Option(help="Who gets which rank: uniform, effective-rank, global; others in a recipe")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="plain or pivoted")] = None,
    order: Annotated[str | None, typer.Option(help="one-shot, sequential or anchored")] = None,
    joint: Annotated[bool | None, typer.Option(help="Let linears that read one input share a right factor")] = None,
    refit: Annotated[bool | None, typer.Option(help="Fit left factors once more by least squares")] = None,
    refine: Annotated[int | None, typer.Option(min=0, help="Gradient steps on each block; 0 for none")] = None,
    calibration: Annotated[
        str, typer.Option(help="Corpus name, .txt or .jsonl(.gz) file, 'builtin', or hub data set owner/name")
    ] = "wikitext2",
    split: Annotated[str, typer.Option(help="Split of the calibration corpus")] = "train",
    column: Annotated[str | None, typer.Option(help="Field that holds the text")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows or documents")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens in each; default 2048 or the model's limit")] = None,
    seed: Annotated[int, typer.Option(help="Which windows are drawn")] = 0,
    fisher: Annotated[
        str, typer.Option(help="fwsvd's sums: gathered on this text, or recorded by `eckart finetune`")
    ] = "gathered",
    dtype: Dtype = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    workers: Workers = None,
    engine: EngineName = DEFAULT,
    address: Address = None,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    out_of_core: Annotated[
        bool, typer.Option("--out-of-core", help="One block in memory at a time: for models larger than memory")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="With --out-of-core: go on where a run was stopped")] = False,
    force: Force = False,
) -> None:
    """Factor a model's linears and write a checkpoint that stock transformers loads after `import eckart`.

    \b
    eckart compress MODEL OUT --keep 0.7 --calibration wikitext2
    eckart compress MODEL OUT --max-bytes 8000000000
    eckart compress MODEL OUT --method svd --keep 0.9 --include mlp
    eckart compress MODEL OUT --method sfsd --keep 0.46 --blocks "last 12"
    eckart compress MODEL OUT --method asvd-i --keep 0.7 --out-of-core --resume
    """
    chosen = {"include": include or [], "exclude": exclude or [], "blocks": blocks}
    recipe = parse_recipe(
        {
            "model": model,
            "dtype": dtype,
            "method": {"name": method, "options": parse_options(method, option or [])},
            "keep": keep,
            "keep_total": keep_total,
            "max_bytes": max_bytes,
            "plan": None if plan_file is None else str(plan_file),
            "sites": chosen,
            "allocation": allocation,
            "layout": layout,
            "order": order,
            "joint": joint,
            "refit": refit,
            "refine": None if refine is None else {"steps": refine},
            "rank_multiple": rank_multiple,
            "calibration": {
                "corpus": calibration,
                "split": split,
                "column": column,
                "samples": samples,
                "length": length,
                "seed": seed,
                "fisher": fisher,
            },
        },
        where="command line",
    )
    if resume and not out_of_core:
        raise ValueError("--resume goes with --out-of-core; other runs keep their moments in the cache")
    if out_of_core and engine != DEFAULT:
        raise ValueError("--out-of-core takes one block after another in this process: leave out --engine")
    check_free(out, force=force)  # before a cluster is started
    with open_engine(engine, address=address, workers=workers) as runs:
        how = How(device, batch_size, None if no_cache else cache, data, TerminalTrack(console), workers or CORES, runs)
        if out_of_core:
            outcome = compress_out_of_core(recipe, out, how, resume=resume, force=force)
        else:
            outcome = make_checkpoint(recipe, out, how, force=force)
    for line in remarks(outcome.plan):
        console.print(line)
    console.print(sizes_table(str(out), outcome.summary, outcome.plan))
    for what, name in (("refined", "refine"), ("distilled", "distil")):
        passes = [each for each in outcome.passes if each["name"] == name]
        undone = [each["place"] for each in passes if not each["kept"]]
        told = f"; undone, as it did not help on samples kept aside: {', '.join(undone)}" if undone else ""
        if passes:
            console.print(f"{what} {len(passes) - len(undone)} of {len(passes)}{told}")
    for done in outcome.passes:
        if done["name"] == "recover":
            console.print(f"fine-tuned after compression: loss {done['before']:.4f} before, {done['after']:.4f} after")
    console.print(", ".join(f"{stage} {value:.1f} s" for stage, value in outcome.seconds.items()))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A compressed checkpoint")],
    out: Annotated[Path, typer.Argument(help="Directory for the exported model")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors back: an ordinary model of full size")
    ] = False,
    force: Force = False,
) -> None:
    """Write a compressed model in another form. --dense is for people and programs without eckart."""
    if not dense:
        raise ValueError("say which form: --dense multiplies the factors back into an ordinary model")
    check_free(out, force=force)
    loaded = load_model(model)
    if not low_rank_modules(loaded):
        raise ValueError(f"{model} holds no low-rank linear: it is dense already")
    save(export_dense(loaded), out, load_tokenizer(model), force=force)
    console.print(f"{out}: {num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))}, loads without eckart")


def parse_options(method: str, pairs: list[str]) -> dict[str, object]:
    """{"alpha": 1.0} out of ["alpha=1"]: values become numbers where the method's default is one.

    Raises:
        ValueError: not NAME=VALUE, or not a number where one is needed.
    """
    defaults = baseline_options(method) if method in BASELINES else composition_options(method)
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} is not NAME=VALUE")
        if isinstance(defaults.get(key), bool):
            if value not in ("true", "false"):
                raise ValueError(f"--option {key}: {value!r} is neither true nor false")
            options[key] = value == "true"
            continue
        try:
            options[key] = float(value) if isinstance(defaults.get(key), float) else value
        except ValueError as error:
            raise ValueError(f"--option {key}: {value!r} is not a number") from error
    return options
