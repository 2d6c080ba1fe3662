"""The command line: one command a verb. It says how and where; what is computed is in the recipe."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from eckart.allocation import RankPlan, plan, summarise
from eckart.demo import run_demo
from eckart.evals.result import EvalResult
from eckart.evals.tasks import Task, evaluate, find_task
from eckart.lowrank import METHODS, DecompositionError, build_method, method_options
from eckart.models.dense import export_dense
from eckart.models.loading import check_free, load_model, load_tokenizer, save
from eckart.models.sites import find_sites, low_rank_modules, num_bytes, num_params
from eckart.pipeline import How, make_checkpoint, run, write_result
from eckart.recipe import load_recipe, parse_recipe
from eckart.terminal import TerminalTrack, megabytes, table

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Low-rank compression of Hugging Face language models.

    Start with [bold]eckart demo[/bold] (the built-in model, no network), then [bold]eckart compress[/bold] and
    [bold]eckart eval[/bold] on your own. "keep" is always the share of parameters kept, not removed.""",
)
console = Console()

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")]
Data = Annotated[Path | None, typer.Option(help="Folder with local copies of known corpora; default: ask the hub")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there, once the new one is complete")]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "eckart"
Cache = Annotated[Path, typer.Option(help="Folder for calibration moments, reused by content; safe to delete")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no moments on disk")]
Batch = Annotated[int, typer.Option(min=1, help="Calibration rows at a time: memory and speed only")]


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
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name")],
    out: Annotated[Path, typer.Argument(help="Directory for the compressed checkpoint")],
    method: Annotated[str, typer.Option(help="See `eckart methods`")] = "nsvd-i",
    option: Annotated[list[str] | None, typer.Option(help="Setting of the method, NAME=VALUE (repeatable)")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of each chosen linear kept, in (0, 1]")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only these sites: a part (mlp), a role (q_proj) or a pattern (repeatable)"),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these sites (repeatable)")] = None,
    blocks: Annotated[str | None, typer.Option(help="Only these blocks: 'last 12', 'first 4', '8-19', '0,5,7'")] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Ranks from a plan.json instead of --keep; edit it by hand")
    ] = None,
    rank_multiple: Annotated[int, typer.Option(help="Round ranks down to a multiple; 8 (CPU), 16 or 64 (GPU)")] = 1,
    calibration: Annotated[
        str, typer.Option(help="Corpus name, .txt or .jsonl(.gz) file, 'builtin', or hub data set owner/name")
    ] = "wikitext2",
    split: Annotated[str, typer.Option(help="Split of the calibration corpus")] = "train",
    column: Annotated[str | None, typer.Option(help="Field that holds the text")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows or documents")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens in each; default 2048 or the model's limit")] = None,
    seed: Annotated[int, typer.Option(help="Which windows are drawn")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16")] = "auto",
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    force: Force = False,
) -> None:
    """Factor a model's linears and write a checkpoint that stock transformers loads after `import eckart`.

    \b
    eckart compress MODEL OUT --method nsvd-i --keep 0.7 --calibration wikitext2
    eckart compress MODEL OUT --method svd --keep 0.9 --include mlp
    eckart compress MODEL OUT --method sfsd --keep 0.46 --blocks "last 12"
    """
    if (keep is None) == (plan_file is None):
        raise ValueError("give --keep (the share kept, such as 0.7) or --plan FILE")
    if plan_file is not None and (include or exclude or blocks):
        raise ValueError("--plan says which sites are compressed; leave out --include, --exclude and --blocks")
    chosen = {"keep": keep, "include": include or [], "exclude": exclude or [], "blocks": blocks}
    narrowed = bool(include or exclude or blocks)
    recipe = parse_recipe(
        {
            "model": model,
            "dtype": dtype,
            "method": {"name": method, "options": parse_options(method, option or [])},
            "keep": None if narrowed else keep,
            "rules": [chosen] if narrowed else None,
            "plan": None if plan_file is None else str(plan_file),
            "rank_multiple": rank_multiple,
            "calibration": {
                "corpus": calibration,
                "split": split,
                "column": column,
                "samples": samples,
                "length": length,
                "seed": seed,
            },
        },
        where="command line",
    )
    how = How(device, batch_size, None if no_cache else cache, data, TerminalTrack(console))
    outcome = make_checkpoint(recipe, out, how, force=force)
    for name, note in outcome.plan.notes.items():
        console.print(f"{name}: {note}")
    report = outcome.report
    console.print(
        table(
            f"{out}",
            ["", "dense", "compressed", "kept"],
            [
                ["parameters", *_pair(report.params_before, report.params_after)],
                ["MB", *_pair(report.bytes_before / 1e6, report.bytes_after / 1e6)],
                ["in the linears", *_pair(outcome.plan.dense_params, outcome.plan.kept_params)],
            ],
        )
    )
    console.print(", ".join(f"{stage} {value:.1f} s" for stage, value in outcome.seconds.items()))


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Dense or compressed: a Hugging Face directory or hub name")],
    task: Annotated[list[str], typer.Option(help="perplexity:CORPUS, where CORPUS is a name or a file (repeatable)")],
    out: Annotated[Path | None, typer.Option(help="Directory for one JSON file per task")] = None,
    split: Annotated[str, typer.Option(help="Split of the corpus")] = "test",
    column: Annotated[str | None, typer.Option(help="Field that holds the text")] = None,
    length: Annotated[int | None, typer.Option(help="Window length; default 2048 or the model's limit")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many windows")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16")] = "auto",
    data: Data = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Measure a model.

    \b
    eckart eval MODEL --task perplexity:wikitext2 --data DIR --limit 100 --out results/
    eckart eval MODEL --task perplexity:builtin/prose --task perplexity:notes.txt --length 256
    """
    tasks = [Task(name, split, column, length, limit) for name in task]
    for item in tasks:
        find_task(item.name)
        if out is not None and (out / f"{item.slug}.json").exists() and not force:
            raise FileExistsError(f"{out / f'{item.slug}.json'} exists; give another --out, or --force")
    track = TerminalTrack(console)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    results: list[EvalResult] = []
    for item in tasks:
        results += evaluate(loaded, tokenizer, [item], data=data, track=track)
        if out is not None:
            write_result(results[-1], out / f"{item.slug}.json")
    console.print(
        table(
            model,
            ["task", "metric", "value", "stderr", "length", "windows", "tokens scored"],
            [
                [
                    result.task,
                    result.metric,
                    f"{result.value:.4f}",
                    "" if result.stderr is None else f"{result.stderr:.4f}",
                    str(result.settings.get("length", "")),
                    str(result.n),
                    f"{result.settings.get('scored_tokens', ''):,}",
                ]
                for result in results
            ],
            text_columns=2,
        )
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Dense or compressed: a Hugging Face directory or hub name")],
    keep: Annotated[float | None, typer.Option(help="Show the plan that this share would make")] = None,
    include: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    blocks: Annotated[str | None, typer.Option(help="As in compress")] = None,
    rank_multiple: Annotated[int, typer.Option(help="As in compress")] = 1,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan as JSON, to edit and give to compress")] = None,
) -> None:
    """Show a model's compressible linears, the ranks a plan would give them, or the ranks of a compressed model."""
    if save_plan is not None and save_plan.exists():
        raise FileExistsError(f"{save_plan} exists; give another place")
    loaded = load_model(model)
    low_rank = low_rank_modules(loaded)
    if save_plan is not None and (low_rank or keep is None):
        raise ValueError("--save-plan needs a dense model and --keep")
    if low_rank:
        rows = [
            [
                name,
                f"{m.out_features} x {m.in_features}",
                str(m.rank),
                f"{_kept(m.rank, m.out_features, m.in_features):.3f}",
            ]
            for name, m in low_rank.items()
        ]
        console.print(table(model, ["low-rank linear", "out x in", "rank", "kept"], rows))
        recipe = loaded.config.quantization_config.recipe
        console.print(f"made by {json.dumps(recipe, ensure_ascii=False)}")
    else:
        ranks: RankPlan | None = None
        if keep is not None:
            ranks = plan(
                loaded,
                keep,
                include=include or (),
                exclude=exclude or (),
                blocks=blocks,
                rank_multiple=rank_multiple,
            )
        rows = []
        for site in find_sites(loaded):
            rank = ranks.rank(site) if ranks else None
            shown = "dense" if rank is None else str(rank)
            rows.append([site.name, site.part, f"{site.d_out} x {site.d_in}", str(site.break_even_rank), shown])
        console.print(table(model, ["linear", "part", "out x in", "break-even rank", "rank"], rows, text_columns=2))
        if ranks is not None:
            summary = summarise(ranks, loaded)
            console.print(
                f"keeps {summary['keep_of_linears']:.1%} of the block linears, "
                f"{summary['keep_of_model']:.1%} of the model"
            )
            for name, note in ranks.notes.items():
                console.print(f"{name}: {note}")
            if save_plan is not None:
                save_plan.write_text(ranks.to_json(), encoding="utf-8")
    console.print(f"{num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))} in {loaded.dtype}")


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


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method whole")] = None,
) -> None:
    """List the published methods, or show one: its paper, equation, assumptions and settings."""
    if name is None:
        rows = [
            [
                entry,
                (METHODS[entry].__doc__ or "").splitlines()[0],
                ", ".join(f"{key}={value}" for key, value in method_options(entry).items()),
            ]
            for entry in METHODS
        ]
        console.print(table("Methods", ["name", "what it is", "settings"], rows, text_columns=3))
        return
    method = build_method(name)
    settings = ", ".join(f"{key} = {value}" for key, value in method_options(name).items())
    facts = {
        "": METHODS[name].__doc__ or "",
        "paper": method.paper,
        "equation": method.equation,
        "assumes": method.assumes,
        "fails": method.fails,
        "needs": ", ".join(sorted(method.needs)) or "no calibration",
        "settings": settings or "none",
    }
    console.print(table(name, ["", ""], [[key, value] for key, value in facts.items()], text_columns=2))


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe")],
    out: Annotated[Path, typer.Option(help="Run directory; a killed run goes on there")],
    data: Data = None,
    device: Device = "cpu",
    batch_size: Batch = 8,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
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
    how = How(device, batch_size, None if no_cache else cache, data, TerminalTrack(console))
    results = run(load_recipe(recipe), out, how, force=force)
    rows = [
        [
            dense.task,
            dense.metric,
            f"{dense.value:.4f}",
            f"{after.value:.4f}",
            f"{after.value / dense.value:.3f} x",
        ]
        for dense, after in results
    ]
    console.print(table(str(out), ["task", "metric", "dense", "compressed", "change"], rows, text_columns=2))


def parse_options(method: str, pairs: list[str]) -> dict[str, object]:
    """{"alpha": 1.0} out of ["alpha=1"]: values become numbers where the method's default is one.

    Raises:
        ValueError: not NAME=VALUE, or not a number where one is needed.
    """
    defaults = method_options(method)
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} is not NAME=VALUE")
        try:
            options[key] = float(value) if isinstance(defaults.get(key), float) else value
        except ValueError as error:
            raise ValueError(f"--option {key}: {value!r} is not a number") from error
    return options


def _pair(before: float, after: float) -> list[str]:
    return [f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}"]


def _kept(rank: int, d_out: int, d_in: int) -> float:
    return rank * (d_out + d_in) / (d_out * d_in)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and status 2; ECKART_DEBUG=1 shows the traceback."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except (ValueError, OSError, DecompositionError) as error:
        if os.environ.get("ECKART_DEBUG"):
            raise
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
