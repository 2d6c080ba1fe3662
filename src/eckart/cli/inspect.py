"""`eckart inspect`: a model's linears and ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from eckart.allocation import RankPlan, plan, summarise
from eckart.cli.options import AnyModel, Blocks, Exclude, Include, Json, RankMultiple, TrustRemoteCode
from eckart.cli.tables import remarks, sizes_table
from eckart.cli.terminal import console, megabytes, print_json, print_line, stdout_for_json, table
from eckart.lowrank.storage import PLAIN, Storage
from eckart.models.coded import CodedLinear, CompressedLinear
from eckart.models.loading import load_model, locate
from eckart.models.sites import find_sites, low_rank_modules
from eckart.models.weight_files import DIGESTS, verify
from eckart.runs.notices import uncompressed_parts
from eckart.support.files import write_whole
from eckart.support.sizes import num_bytes, num_params


def command(
    model: AnyModel,
    keep: Annotated[float | None, typer.Option(help="Show the plan that this share would make")] = None,
    include: Include = None,
    exclude: Exclude = None,
    blocks: Blocks = None,
    rank_multiple: RankMultiple = 1,
    layout: Annotated[str, typer.Option(help="plain or pivoted")] = "plain",
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan as JSON, to edit and give to compress")] = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Check every file by the digests that were written with it")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show a model's compressible linears, the ranks a plan would give them, or the ranks of a compressed model."""
    if save_plan is not None and save_plan.exists():
        raise FileExistsError(f"{save_plan} exists; give another place")
    checked = verify(locate(model)) if check else None
    with stdout_for_json(as_json):
        loaded = load_model(model, trust_remote_code=trust_remote_code)
    low_rank = low_rank_modules(loaded)
    if low_rank and keep is not None:
        raise ValueError(f"--keep {keep}: {model} is compressed already, and has its ranks")
    if save_plan is not None and (low_rank or keep is None):
        raise ValueError("--save-plan needs a dense model and --keep")
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
        if save_plan is not None:
            write_whole(save_plan, ranks.to_json())
    if as_json:
        print_json(_described(model, loaded, low_rank, ranks, checked))
        return
    if check:
        message = f"{checked} files are as they were written" if checked else f"no {DIGESTS} to check the files by"
        console.print(message)
    if low_rank:
        _show_compressed(model, loaded, low_rank)
    else:
        _show_dense(model, loaded, ranks)
    console.print(f"{num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))} in {loaded.dtype}")


def _show_compressed(name: str, model: PreTrainedModel, low_rank: Mapping[str, CompressedLinear]) -> None:
    coded = any(isinstance(m, CodedLinear) for m in low_rank.values())
    rows = [
        [
            place,
            f"{m.out_features} x {m.in_features}",
            str(m.rank),
            f"{_kept(m):.3f}",
            *([str(_storage(m))] if coded else []),
        ]
        for place, m in low_rank.items()
    ]
    columns = ["low-rank linear", "out x in", "rank", "kept", *(["stored"] if coded else [])]
    console.print(table(name, columns, rows))
    console.print(f"made by {json.dumps(_recipe(model), ensure_ascii=False)}")


def _show_dense(name: str, model: PreTrainedModel, ranks: RankPlan | None) -> None:
    rows, sites = [], find_sites(model)
    for site in sites:
        rank = ranks.rank(site) if ranks else None
        shown = "dense" if rank is None else str(rank)
        rows.append([site.name, site.part, f"{site.d_out} x {site.d_in}", str(site.break_even_rank), shown])
    console.print(table(name, ["linear", "part", "out x in", "break-even rank", "rank"], rows, text_columns=2))
    for line in uncompressed_parts(model, sites):
        print_line(line)
    if ranks is not None:
        console.print(sizes_table("The same share everywhere", summarise(ranks, model), ranks))
        for line in remarks(ranks):
            console.print(line)


def _described(
    name: str,
    model: PreTrainedModel,
    low_rank: Mapping[str, CompressedLinear],
    ranks: RankPlan | None,
    checked: int | None,
) -> dict[str, Any]:
    """What the tables have, as plain data. Of the files' digests: how many were right, None where nobody asked."""
    sites = () if low_rank else find_sites(model)
    compressed = [
        {
            "name": place,
            "d_out": module.out_features,
            "d_in": module.in_features,
            "rank": module.rank,
            "kept": _kept(module),
            "stored": None if _storage(module).is_plain else _storage(module).to_dict(),
        }
        for place, module in low_rank.items()
    ]
    dense = [
        {
            "name": site.name,
            "part": site.part,
            "block": site.block,
            "d_out": site.d_out,
            "d_in": site.d_in,
            "break_even_rank": site.break_even_rank,
            "rank": ranks.rank(site) if ranks else None,
        }
        for site in sites
    ]
    return {
        "model": name,
        "compressed": bool(low_rank),
        "dtype": str(model.dtype).removeprefix("torch."),
        "params": num_params(model),
        "bytes": num_bytes(model),
        "linears": compressed or dense,
        "made_by": _recipe(model) if low_rank else None,
        "plan": None if ranks is None else asdict(summarise(ranks, model)),
        "remarks": [*uncompressed_parts(model, sites), *(remarks(ranks) if ranks else ())] if sites else [],
        "verified_files": checked,
    }


def _recipe(model: PreTrainedModel) -> Any:
    return model.config.quantization_config.recipe


def _storage(module: CompressedLinear) -> Storage:
    return module.storage if isinstance(module, CodedLinear) else PLAIN


def _kept(module: CompressedLinear) -> float:
    """Numbers that it stores as a share of the dense ones; a shared right factor counts for all its readers alike.

    Of numbers in few bits it is their bytes, scales included, as a share of the dense ones in the model's type.
    """
    if isinstance(module, CodedLinear):
        size, d_out, d_in = module.weight.element_size(), module.out_features, module.in_features
        return module.storage.num_bytes(d_out, d_in, module.rank or None, size) / (d_out * d_in * size)
    readers = (module.lender or module).product.readers
    stored = module.left.weight.numel() + module.right.weight.numel() / max(readers, 1)
    return stored / (module.out_features * module.in_features)
