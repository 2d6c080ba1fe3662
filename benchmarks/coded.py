"""Products of linears in few bits: time over the dense linear's, ours and torchao's, in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/coded.py [--shapes 576x576 4096x4096] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/coded.py --model smollm2 [--types bfloat16]

For each shape, type and number of rows: how many times as long as the dense linear of that type takes a weight in 8, 4
or 3 bits by groups of 64; one in 4 bits with factors of rank 16 in 4 bits; and torchao's int8 (a scale a row) and
int4 (the baselines of a recipe, which unpack). Medians over rounds in which each is called once after the other.
With --model all linears of its blocks are of one kind: a step of one sequence and of sixteen behind a short cache, a
prompt of 512 tokens, and the bytes of the model over the dense one's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inference import PROMPT, reading, stepping
from measuring import in_turns, machine, write_json
from real_models import add_model_option
from torch import Tensor, nn

from eckart.compression.baselines.packed import PackedInt4
from eckart.compression.baselines.quantization import import_torchao
from eckart.lowrank.codes import round_nearest
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage
from eckart.models.coded import CodedLinear
from eckart.models.loading import load_model
from eckart.models.sites import find_sites, read_weight, replace_module
from eckart.support.sizes import num_bytes

GROUP, RANK = 64, 16
STEPS = (1, 16)
ROUNDS = 31


def ours(weight: Tensor, dtype: torch.dtype, storage: Storage, rank: int) -> nn.Module:
    """A linear in few bits; its factors are random, as nobody looks at the result."""
    base = None if storage.base is None else round_nearest(weight, storage.base, (1, storage.group))
    left = right = None
    if rank:
        assert storage.factors is not None
        left = round_nearest(torch.randn(len(weight), rank), storage.factors, (storage.group, 1))
        right = round_nearest(torch.randn(rank, weight.shape[1]), storage.factors, (1, storage.group))
    coded = CodedFactors(storage, base, left, right)
    return CodedLinear.from_coded(coded, None, device=weight.device, dtype=dtype)


def torchaos(weight: Tensor, dtype: torch.dtype, bits: int) -> nn.Module:
    """torchao's, as the baselines have it."""
    torchao = import_torchao()
    linear = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=dtype)
    linear.weight.data.copy_(weight)
    if bits == 8:
        torchao.quantize_(linear, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        return linear
    mapping, int4 = torchao.quant_primitives.MappingType.ASYMMETRIC, torch.int4  # type: ignore[attr-defined]
    torchao.quantize_(linear, torchao.IntxWeightOnlyConfig(int4, torchao.PerGroup(GROUP), mapping))
    linear.weight = nn.Parameter(PackedInt4.pack(linear.weight), requires_grad=False)
    return linear


# What takes a weight (d_out, d_in) and a type, and gives the linear that stands for it.
WAYS: dict[str, Callable[[Tensor, torch.dtype], nn.Module]] = {
    **{f"{bits} bits": partial(ours, storage=Storage(bits, None, GROUP), rank=0) for bits in (8, 4, 3)},
    f"4 bits, rank {RANK}": partial(ours, storage=Storage(4, 4, GROUP), rank=RANK),
    "torchao 8": partial(torchaos, bits=8),
    "torchao 4": partial(torchaos, bits=4),
}


def whole_models(model: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row for each number of rows."""
    models = {"dense": load_model(model, dtype=str(dtype)[6:]).eval()}
    for name, make in WAYS.items():
        models[name] = load_model(model, dtype=str(dtype)[6:]).eval()
        for site in find_sites(models[name]):
            replace_module(models[name], site.name, make(read_weight(models[name].get_submodule(site.name)), dtype))
    held = {name: num_bytes(each) for name, each in models.items()}
    shares = {name: round(each / held["dense"], 3) for name, each in held.items()}
    print(f"{Path(model).name:>10} {str(dtype)[6:]:8}  bytes    ", shares, flush=True)
    for rows, use in (*((steps, stepping) for steps in STEPS), (PROMPT, reading)):
        calls = {name: use(each, rows) for name, each in models.items()}
        yield {"shape": Path(model).name, "dtype": str(dtype)[6:], "rows": rows, **over_dense(calls), "bytes": shares}


def single_linears(shape: str, dtype: torch.dtype, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of rows."""
    d_out, d_in = map(int, shape.split("x"))
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)) / d_in**0.5
    dense = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
    dense.weight.data.copy_(weight)
    ways = {"dense": dense, **{name: make(weight, dtype) for name, make in WAYS.items()}}
    for count in counts:
        x = torch.randn(count, d_in).to(dtype)
        calls = {name: partial(module, x) for name, module in ways.items()}
        yield {"shape": shape, "dtype": str(dtype)[6:], "rows": count, **over_dense(calls)}


def over_dense(calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """{"over dense": {name: time over the dense one's}}."""
    taken = {name: statistics.median(times) for name, times in in_turns(calls, ROUNDS).items()}
    return {"over dense": {name: round(seconds / taken["dense"], 2) for name, seconds in taken.items()}}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "2048x2048", "4096x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, PROMPT])
    parser.add_argument("--types", nargs="+", choices=["bfloat16", "float32"], default=["float32", "bfloat16"])
    add_model_option(parser, default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in (getattr(torch, name) for name in arguments.types):
        if arguments.model is not None:
            rows += shown(whole_models(arguments.model, dtype))
            continue
        for shape in arguments.shapes:
            rows += shown(single_linears(shape, dtype, arguments.rows))
    write_json(arguments.json, {"machine": machine(), "rows": rows})


def shown(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows, each printed as it comes."""
    for row in rows:
        print(f"{row['shape']:>10} {row['dtype']:8} {row['rows']:4} rows ", row["over dense"], flush=True)
        yield row


if __name__ == "__main__":
    main()
