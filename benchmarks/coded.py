"""Products of linears in few bits: time over the dense linear's, ours and torchao's, in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/coded.py [--shapes 576x576 4096x4096] [--json FILE]

For each shape, type and number of rows: how many times as long as the dense linear of that type takes a weight in 8, 4
or 3 bits by groups of 64; one in 4 bits with factors of rank 16 in 4 bits; and torchao's int8 (a scale a row) and
int4 (the baselines of a recipe, which unpack). Medians over rounds in which each is called once after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, write_json
from torch import Tensor, nn

from eckart.compression.baselines.packed import PackedInt4
from eckart.compression.baselines.quantization import import_torchao
from eckart.lowrank.codes import round_nearest
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage
from eckart.models.coded import CodedLinear

GROUP, RANK = 64, 16
# Rounds of short calls, and of those that take longer than LONG seconds.
ROUNDS, FEW, LONG = 31, 5, 0.05


def ours(weight: Tensor, storage: Storage, rank: int, dtype: torch.dtype) -> nn.Module:
    """A linear in few bits; its factors are random, as nobody looks at the result."""
    base = None if storage.base is None else round_nearest(weight, storage.base, (1, storage.group))
    left = right = None
    if rank:
        assert storage.factors is not None
        left = round_nearest(torch.randn(len(weight), rank), storage.factors, (storage.group, 1))
        right = round_nearest(torch.randn(rank, weight.shape[1]), storage.factors, (1, storage.group))
    coded = CodedFactors(storage, base, left, right)
    return CodedLinear.from_coded(coded, None, device=weight.device, dtype=dtype)


def torchaos(weight: Tensor, bits: int, dtype: torch.dtype) -> nn.Module:
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


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """{name: median seconds}, over rounds in which each is called once."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    longest = 0.0
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
            longest = max(longest, spent[name][-1])
        if longest > LONG and number >= FEW:
            break
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "2048x2048", "4096x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        d_out, d_in = map(int, shape.split("x"))
        weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)) / d_in**0.5
        for dtype in (torch.float32, torch.bfloat16):
            dense = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
            dense.weight.data.copy_(weight)
            ways = {
                "dense": dense,
                **{f"{bits} bits": ours(weight, Storage(bits, None, GROUP), 0, dtype) for bits in (8, 4, 3)},
                f"4 bits, rank {RANK}": ours(weight, Storage(4, 4, GROUP), RANK, dtype),
                "torchao 8": torchaos(weight, 8, dtype),
                "torchao 4": torchaos(weight, 4, dtype),
            }
            for count in arguments.rows:
                x = torch.randn(count, d_in).to(dtype)
                taken = in_turns({name: partial(module, x) for name, module in ways.items()})
                ratios = {name: round(seconds / taken["dense"], 2) for name, seconds in taken.items()}
                rows.append({"shape": shape, "dtype": str(dtype)[6:], "rows": count, "over dense": ratios})
                print(f"{shape:>10} {str(dtype)[6:]:8} {count:4} rows ", ratios, flush=True)
    write_json(arguments.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
