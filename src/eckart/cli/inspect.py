"""Commands that look: inspect, methods, evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from eckart.allocation import RankPlan, plan, summarise
from eckart.cli.app import app, console
from eckart.cli.tables import remarks, sizes_table
from eckart.cli.terminal import megabytes, table
from eckart.compression.baselines import BASELINES, baseline_options, build_baseline
from eckart.data.corpora import CORPORA
from eckart.data.labelled import LABELLED
from eckart.evals.harness_tasks import LOCAL_TASKS
from eckart.evals.tasks import EVALUATIONS
from eckart.lowrank import METHODS, build_method, method_options
from eckart.models.linear import LowRankLinear
from eckart.models.loading import load_model
from eckart.models.sites import find_sites, low_rank_modules
from eckart.runs.composition import COMPOSITIONS, composition_options
from eckart.support.files import write_whole
from eckart.support.sizes import num_bytes, num_params


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Dense or compressed: a Hugging Face directory, a hub name, or builtin")],
    keep: Annotated[float | None, typer.Option(help="Show the plan that this share would make")] = None,
    include: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As in compress")] = None,
    blocks: Annotated[str | None, typer.Option(help="As in compress")] = None,
    rank_multiple: Annotated[int, typer.Option(help="As in compress")] = 1,
    layout: Annotated[str, typer.Option(help="plain or pivoted")] = "plain",
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
                f"{_kept(m):.3f}",
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
                layout=layout,  # type: ignore[arg-type]
            )
        rows = []
        for site in find_sites(loaded):
            rank = ranks.rank(site) if ranks else None
            shown = "dense" if rank is None else str(rank)
            rows.append([site.name, site.part, f"{site.d_out} x {site.d_in}", str(site.break_even_rank), shown])
        console.print(table(model, ["linear", "part", "out x in", "break-even rank", "rank"], rows, text_columns=2))
        if ranks is not None:
            console.print(sizes_table("The same share everywhere", summarise(ranks, loaded), ranks))
            for line in remarks(ranks):
                console.print(line)
            if save_plan is not None:
                write_whole(save_plan, ranks.to_json())
    console.print(f"{num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))} in {loaded.dtype}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method whole")] = None,
) -> None:
    """List compositions, methods and baselines, or show one: its paper, equation, assumptions and settings."""
    if name is None:
        made = {entry: compose() for entry, compose in COMPOSITIONS.items()}
        rows = [
            [entry, f"{one.method.name}. {one.describe()}", _settings(composition_options(entry))]
            for entry, one in made.items()
        ]
        console.print(
            table("Compositions: the first is the default", ["name", "what it is", "settings"], rows, text_columns=3)
        )
        rows = [[entry, _first_line(METHODS[entry]), _settings(method_options(entry))] for entry in METHODS]
        console.print(table("Methods", ["name", "what it is", "settings"], rows, text_columns=3))
        rows = [[entry, _first_line(BASELINES[entry]), _settings(baseline_options(entry))] for entry in BASELINES]
        console.print(table("Baselines, for `run`", ["name", "what it is", "settings"], rows, text_columns=3))
        return
    if name in BASELINES:
        baseline = build_baseline(name)
        facts = {
            "": BASELINES[name].__doc__ or "",
            "paper": baseline.paper,
            "does": baseline.about,
            "size": "keep" if baseline.needs_keep else "one",
            "needs": "calibration text" if baseline.needs_tokens else "no calibration",
            "settings": _settings(baseline_options(name)) or "none",
        }
    else:
        settings = composition_options(name)  # refuses an unknown name, with what there is
        composed = COMPOSITIONS[name]() if name in COMPOSITIONS else None
        method = composed.method if composed else build_method(name)
        facts = {
            "": (COMPOSITIONS[name] if composed else METHODS[name]).__doc__ or "",
            **({"method": method.name, "around it": composed.describe()} if composed else {}),
            "paper": method.paper,
            "equation": method.equation,
            "assumes": method.assumes,
            "fails": method.fails,
            "needs": ", ".join(sorted(method.needs)) or "no calibration",
            "settings": _settings(settings) or "none",
        }
    console.print(table(name, ["", ""], [[key, value] for key, value in facts.items()], text_columns=2))


def _first_line(entry: Callable[..., object]) -> str:
    return (entry.__doc__ or "").splitlines()[0]


def _settings(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


@app.command()
def evaluations() -> None:
    """List what can be measured: evaluations, the corpora and labelled sets that they read, the local tasks."""
    rows = [
        [f"{name}:{row.argument.upper()}" if row.argument else name, row.about] for name, row in EVALUATIONS.items()
    ]
    console.print(table("Evaluations", ["name", "what it measures"], rows, text_columns=2))
    rows = [[name, corpus.hub or "", ", ".join(corpus.files)] for name, corpus in CORPORA.items()]
    console.print(
        table("Corpora (or a file, or a hub data set)", ["name", "hub", "local splits"], rows, text_columns=3)
    )
    rows = [[name, f"{known.hub}:{known.config}", ", ".join(known.splits)] for name, known in LABELLED.items()]
    console.print(
        table("Labelled sets (or a file, or a hub data set)", ["name", "hub", "splits"], rows, text_columns=3)
    )
    console.print(f"lm-eval tasks that local files serve: {', '.join(LOCAL_TASKS)}; any other is read from the hub")


def _kept(module: LowRankLinear) -> float:
    """Numbers that it stores as a share of the dense ones; a shared right factor counts for all its readers alike."""
    readers = (module.lender or module).product.readers
    stored = module.left.weight.numel() + module.right.weight.numel() / max(readers, 1)
    return stored / (module.out_features * module.in_features)
