"""How seconds grow with the width, the number of blocks and the number of calibration tokens.

    python benchmarks/growth.py [--rounds 3] [--quick] [--json FILE]

Random Llamas in bfloat16, compressed in memory by asvd-i at keep 0.7. One of the three is doubled at a time; printed
are the best seconds of some rounds, over those of the series' first, and the exponent of the last doubling, log2 of the
quotient. Moments grow with the
square of the width and factors with its cube (less where small linears leave the cores waiting); both stages grow with
the blocks, and calibration alone with the tokens. Workers: see workers.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from measuring import lap, write_json
from transformers import LlamaConfig, LlamaForCausalLM

from eckart import build_method, calibrate, compress, plan
from eckart.data.tokens import Tokens

LENGTH = 256
# {what grows: ((hidden, blocks, samples), ...)}.
SERIES = {
    "width": [(256, 2, 16), (512, 2, 16), (1024, 2, 16), (2048, 2, 16)],
    "blocks": [(512, 2, 16), (512, 4, 16), (512, 8, 16)],
    "tokens": [(512, 2, 16), (512, 2, 32), (512, 2, 64)],
}


def make_model(hidden: int, blocks: int) -> LlamaForCausalLM:
    """A Llama with an MLP of 2.75 times its width, grouped-query attention and few words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def measure(hidden: int, blocks: int, samples: int, rounds: int) -> dict[str, float]:
    """Best seconds of calibration and factorisation."""
    method, best = build_method("asvd-i"), {"calibrate": math.inf, "factor": math.inf}
    ids = torch.randint(512, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    for _ in range(rounds):
        model = make_model(hidden, blocks)
        taken: dict[str, float] = {}
        with lap(taken, "calibrate"):
            moments = calibrate(model, tokens, method)
        taken["factor"] = compress(model, method, plan(model, 0.7), moments).seconds["factor"]
        best = {stage: min(best[stage], taken[stage]) for stage in best}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round, without the last doubling of each series")
    arguments = parser.parse_args()
    rows, rounds, doublings = [], 1 if arguments.quick else arguments.rounds, -1 if arguments.quick else None
    measure(*SERIES["width"][0], rounds=1)  # to warm up
    print("grows    width  blocks  tokens   calibrate, over first (exponent)   factor")
    for name, series in SERIES.items():
        first: dict[str, float] = {}
        before: dict[str, float] = {}
        for hidden, blocks, samples in series[:doublings]:
            seconds = measure(hidden, blocks, samples, rounds)
            first = first or seconds
            relative = {stage: seconds[stage] / first[stage] for stage in seconds}
            row = {"grows": name, "width": hidden, "blocks": blocks, "tokens": samples * LENGTH, **seconds}
            cells = {
                stage: f"{seconds[stage]:8.2f} s x{relative[stage]:<6.1f}"
                + (f"({math.log2(seconds[stage] / before[stage]):4.1f})" if before else " " * 6)
                for stage in seconds
            }
            place = f"{name:8s} {hidden:5d}  {blocks:6d}  {samples * LENGTH:6d}"
            print(f"{place}   {cells['calibrate']}     {cells['factor']}", flush=True)
            rows.append({**row, "relative": relative})
            before = seconds
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
