"""Forward time of the pivoted layout against two plain products at the same rank, and against the dense linear.

    python benchmarks/layouts.py [--widths 256 1024 4096] [--rows 1 512] [--keeps 0.5 0.7] [--device cuda] [--compile]

A square linear, at the rank whose pivoted layout holds the share `keep` of its numbers. The three modules run in turns;
a ratio is the median over the rounds of the quotient in one round, so that what slows the machine for a while slows
both. "operations" is the quotient of multiply-accumulates, (2 d - r) / 2 d: what the time would be if it were all
arithmetic.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eckart.lowrank import Factors, pivot, pivoted_rank_for
from eckart.models.linear import LowRankLinear

# Shortest stretch that is timed: a thousand times the clock's own resolution and cost.
STRETCH = 2e-3


def modules(width: int, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same random map of that rank in both layouts, and a dense linear of its shape."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q
    factors = Factors(left, torch.randn(rank, width, generator=generator, dtype=torch.float64))
    return {
        "dense": nn.Linear(width, width, bias=False, device=device, dtype=dtype),
        "plain": LowRankLinear.from_factors(factors, None, device=device, dtype=dtype),
        "pivoted": LowRankLinear.from_factors(pivot(factors), None, device=device, dtype=dtype),
    }


def seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call, over `times` of them."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


@torch.inference_mode()
def measure(candidates: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """{name: seconds of one forward pass in each round}, all of them in turns."""
    times = {}
    for name, module in candidates.items():
        seconds(lambda module=module: module(x), 3, x.device)  # type: ignore[misc]
        once = seconds(lambda module=module: module(x), 1, x.device)  # type: ignore[misc]
        times[name] = max(1, round(STRETCH / once))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, module in candidates.items():
            found[name].append(seconds(lambda module=module: module(x), times[name], x.device))  # type: ignore[misc]
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of the time of `one` over the time of `other`."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's version of each")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.dtype}")
    print("width  rows  keep  rank  plain (us)   pivoted / plain   operations   pivoted / dense   plain / dense")
    for width in arguments.widths:
        for keep in arguments.keeps:
            rank = pivoted_rank_for(keep, width, width)
            made = modules(width, rank, device, dtype)
            if arguments.compile:
                made = {name: torch.compile(module) for name, module in made.items()}  # type: ignore[misc]
            for rows in arguments.rows:
                x = torch.randn(rows, width, device=device, dtype=dtype)
                # A large product takes seconds, and its ratio is steady.
                rounds = arguments.rounds if rows * width < 2**20 else max(5, arguments.rounds // 4)
                found = measure(made, x, rounds)
                print(
                    f"{width:5d}  {rows:4d}  {keep:4.2f}  {rank:4d}  {1e6 * statistics.median(found['plain']):10.1f}   "
                    f"{ratio(found, 'pivoted', 'plain'):15.2f}   {1 - rank / (2 * width):10.2f}   "
                    f"{ratio(found, 'pivoted', 'dense'):15.2f}   {ratio(found, 'plain', 'dense'):13.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
