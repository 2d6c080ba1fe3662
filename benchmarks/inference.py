"""Speed of low-rank linears and models against dense ones: reading a prompt, and generating a token.

    python benchmarks/inference.py [--widths 768 2048 4096] [--keeps 0.8 0.6 0.5 0.4] [--types bfloat16 float32]
        [--rows 1 16 512] [--rank-multiple 32] [--models] [--compile] [--device cuda] [--json FILE] [--quick]

First single linears, d x d and 2.75 d x d (the width of a Llama's MLP): at the largest rank whose plain factors hold
the share `keep` of the numbers, and at the larger one whose pivoted layout does. So both store as many bytes and take
as many multiplications. `rows` is tokens at a time: 1 and 16 are steps of generating with one and sixteen sequences,
512 is a prompt. With --models, random Llamas of that hidden size instead, two blocks and a small vocabulary, with every
linear of their blocks replaced: reading a prompt of 512 tokens, and a step behind 16 tokens in the cache.

The dense, the plain and the pivoted one run in turns; a speed is the median over the rounds of the dense one's time
over the other's in one round, so that what slows the machine for a while slows both. `limit` is what the speed would be
if it were all arithmetic, or all reading of weights: dense numbers over stored ones, 1 / keep but for rounded ranks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measuring import in_turns, machine, write_json
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eckart.lowrank import Layout, num_stored, pivoted_rank_for, rank_for
from eckart.models.linear import LowRankLinear
from eckart.models.sites import find_sites, replace_module

# Width of the MLP over the hidden size, about as in the Llamas.
WIDENING = 2.75
PROMPT, CACHED, VOCABULARY = 512, 16, 1000
LAYOUTS: tuple[Layout, ...] = ("plain", "pivoted")


def low_rank(d_out: int, d_in: int, rank: int, layout: Layout, where: dict[str, object]) -> LowRankLinear:
    """Random factors; pivoted, with random rows as pivots."""
    module = LowRankLinear(
        d_in,
        d_out,
        rank,
        bias=False,
        pivots=rank if layout == "pivoted" else None,
        **where,  # type: ignore[arg-type]
    )
    if module.order is not None:
        pivots = torch.zeros(d_out, dtype=torch.bool)
        pivots[torch.randperm(d_out)[:rank]] = True
        order = torch.where(pivots, pivots.cumsum(0) - 1, rank + (~pivots).cumsum(0) - 1)
        module.order.copy_(order)
    return module


def rank_of(d_out: int, d_in: int, keep: float, layout: Layout, multiple: int) -> int:
    """Of the share kept, rounded down as a plan rounds it."""
    rank = (rank_for if layout == "plain" else pivoted_rank_for)(keep, d_out, d_in)
    return max(rank - rank % multiple, 1)


def speeds(samples: dict[str, list[float]]) -> dict[str, float]:
    """{layout: the dense time over its own, median over the rounds}, and the dense time."""
    ratios = {
        layout: statistics.median(one / other for one, other in zip(samples["dense"], samples[layout], strict=True))
        for layout in LAYOUTS
    }
    return {
        "dense_us": round(1e6 * statistics.median(samples["dense"]), 1),
        **{k: round(v, 3) for k, v in ratios.items()},
    }


@torch.inference_mode()
def layers(arguments: argparse.Namespace, width: int, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """A row for each shape, share and number of rows."""
    device = torch.device(arguments.device)
    where: dict[str, object] = {"device": device, "dtype": dtype}
    for d_out in (width, round(WIDENING * width)):
        dense = nn.Linear(width, d_out, bias=False, device=device, dtype=dtype)
        for keep in arguments.keeps:
            ranks = {layout: rank_of(d_out, width, keep, layout, arguments.rank_multiple) for layout in LAYOUTS}
            modules: dict[str, nn.Module] = {"dense": dense}
            modules.update({layout: low_rank(d_out, width, rank, layout, where) for layout, rank in ranks.items()})
            if arguments.compile:
                modules = {name: torch.compile(module) for name, module in modules.items()}  # type: ignore[misc]
            for rows in arguments.rows:
                shape = (1, rows, width) if rows == PROMPT else (rows, 1, width)
                x = torch.randn(*shape, **where)  # type: ignore[call-overload]
                runs = {name: partial(module, x) for name, module in modules.items()}
                yield {
                    "what": f"{d_out} x {width}",
                    "rows": rows,
                    "keep": keep,
                    "ranks": ranks,
                    "limit": round(d_out * width / num_stored(d_out, width, ranks["plain"], "plain"), 3),
                    **speeds(in_turns(runs, arguments.rounds, device)),
                }


@torch.inference_mode()
def models(arguments: argparse.Namespace, width: int, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """A row for each share and number of rows: 1 and 16 are steps, 512 is a prompt."""
    device = torch.device(arguments.device)
    dense = llama(width, arguments.blocks, device, dtype)
    for keep in arguments.keeps:
        variants = {"dense": dense}
        limit = 0.0
        for layout in LAYOUTS:
            variants[layout], limit = replaced(width, arguments, keep, layout, device, dtype)
        for rows in arguments.rows:
            runs = {
                name: reading(model, rows) if rows == PROMPT else stepping(model, rows)
                for name, model in variants.items()
            }
            yield {
                "what": f"Llama {width}",
                "rows": rows,
                "keep": keep,
                "limit": round(limit, 3),
                **speeds(in_turns(runs, arguments.rounds, device)),
            }


def llama(width: int, blocks: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A random one of that hidden size."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=round(WIDENING * width),
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=PROMPT + CACHED,
    )
    with torch.device(device):
        # transformers has no other way to a type
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()  # noqa: SLF001


def replaced(
    width: int, arguments: argparse.Namespace, keep: float, layout: Layout, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, float]:
    """The model with low-rank linears in its blocks, and its limit: all numbers of the dense one's linears over its."""
    model = llama(width, arguments.blocks, device, dtype)
    before = after = VOCABULARY * width  # the head
    for site in find_sites(model):
        rank = rank_of(site.d_out, site.d_in, keep, layout, arguments.rank_multiple)
        module = low_rank(site.d_out, site.d_in, rank, layout, {"device": device, "dtype": dtype})
        replace_module(model, site.name, module)
        before += site.num_params
        after += num_stored(site.d_out, site.d_in, rank, layout)
    return model, before / after


def reading(model: PreTrainedModel, rows: int) -> Callable[[], object]:
    """Reads a prompt."""
    ids = torch.ones(1, rows, dtype=torch.int64, device=model.device)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)


def stepping(model: PreTrainedModel, batch: int) -> Callable[[], object]:
    """Reads one token of each sequence behind a short cache, which is then cut back to where it was."""
    ids = torch.ones(batch, CACHED, dtype=torch.int64, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def step() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.4])
    parser.add_argument(
        "--types", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, PROMPT])
    parser.add_argument("--rank-multiple", type=int, default=1, help="ranks are rounded down to multiples of this")
    parser.add_argument("--models", action="store_true", help="whole models instead of single linears")
    parser.add_argument("--blocks", type=int, default=2, help="of the models")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's version of each linear")
    parser.add_argument("--quick", action="store_true", help="one small width, one share, a few rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.widths, arguments.keeps, arguments.rounds = [256], [0.5], 3
    print(machine(arguments.device))
    print("type      what           keep  rows   dense (us)   plain x  pivoted x   limit x")
    rows: list[dict[str, object]] = []
    for name in arguments.types:
        for width in arguments.widths:
            torch.manual_seed(0)
            for row in (models if arguments.models else layers)(arguments, width, getattr(torch, name)):
                rows.append({"type": name, "threads": torch.get_num_threads(), **row})
                print(
                    f"{name:8s}  {row['what']:13s}  {row['keep']:.2f}  {row['rows']:4d}   {row['dense_us']:10.1f}   "
                    f"{row['plain']:7.2f}  {row['pivoted']:9.2f}   {row['limit']:7.2f}",
                    flush=True,
                )
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
