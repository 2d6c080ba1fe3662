"""`eckart inspect`: a model's linears and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from eckart.allocation import RankPlan, plan, summarise
from eckart.cli.options import AnyModel, Blocks, Exclude, Include, RankMultiple, TrustRemoteCode
from eckart.cli.tables import remarks, sizes_table
from eckart.cli.terminal import console, megabytes, print_line, table
from eckart.lowrank.storage import PLAIN
from eckart.models.coded import CodedLinear
from eckart.models.linear import LowRankLinear
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
) -> None:
    """Show a model's compressible linears, the ranks a plan would give them, or the ranks of a compressed model."""
    if save_plan is not None and save_plan.exists():
        raise FileExistsError(f"{save_plan} exists; give another place")
    if check:
        checked = verify(locate(model))
        message = f"{checked} files are as they were written" if checked else f"no {DIGESTS} to check the files by"
        console.print(message)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    low_rank = low_rank_modules(loaded)
    if save_plan is not None and (low_rank or keep is None):
        raise ValueError("--save-plan needs a dense model and --keep")
    if low_rank:
        coded = any(isinstance(m, CodedLinear) for m in low_rank.values())
        rows = [
            [
                name,
                f"{m.out_features} x {m.in_features}",
                str(m.rank),
                f"{_kept(m):.3f}",
                *([str(m.storage) if isinstance(m, CodedLinear) else str(PLAIN)] if coded else []),
            ]
            for name, m in low_rank.items()
        ]
        columns = ["low-rank linear", "out x in", "rank", "kept", *(["stored"] if coded else [])]
        console.print(table(model, columns, rows))
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
        rows, sites = [], find_sites(loaded)
        for site in sites:
            rank = ranks.rank(site) if ranks else None
            shown = "dense" if rank is None else str(rank)
            rows.append([site.name, site.part, f"{site.d_out} x {site.d_in}", str(site.break_even_rank), shown])
        console.print(table(model, ["linear", "part", "out x in", "break-even rank", "rank"], rows, text_columns=2))
        for line in uncompressed_parts(loaded, sites):
            print_line(line)
        if ranks is not None:
            console.print(sizes_table("The same share everywhere", summarise(ranks, loaded), ranks))
            for line in remarks(ranks):
                console.print(line)
            if save_plan is not None:
                write_whole(save_plan, ranks.to_json())
    console.print(f"{num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))} in {loaded.dtype}")


def _kept(module: LowRankLinear | CodedLinear) -> float:
    """Numbers that it stores as a share of the dense ones; a shared right factor counts for all its readers alike.

    Of numbers in few bits it is their bytes, scales included, as a share of the dense ones in the model's type.
    """
    if isinstance(module, CodedLinear):
        size, d_out, d_in = module.weight.element_size(), module.out_features, module.in_features
        return module.storage.num_bytes(d_out, d_in, module.rank or None, size) / (d_out * d_in * size)
    readers = (module.lender or module).product.readers
    stored = module.left.weight.numel() + module.right.weight.numel() / max(readers, 1)
    return stored / (module.out_features * module.in_features)
