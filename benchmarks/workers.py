"""How much faster is a compression on 1, 2 and 4 workers of a Ray cluster than in one process, and is it the same?

    python benchmarks/workers.py [--model MODEL | --hidden 256 --layers 4] [--workers 1 2 4] [--json FILE]

Every way starts from the files, with no moments kept. Prints seconds of each
stage relative to one process of one thread, and of the low-rank products the largest difference to the first cluster's
(0: the number of workers changes no bit) and to one process's, relative to the largest entry. Workers start before the
clock does. More workers than cores show what sharing costs, and nothing of speed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import write_json
from real_models import add_model_option
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import eckart
from eckart.allocation import plan
from eckart.data.tokens import Tokens
from eckart.lowrank import build_method
from eckart.models.sites import low_rank_modules
from eckart.runs.engine.base import CalibrationRequest, Engine
from eckart.runs.engine.choose import DEFAULT, open_engine

VOCABULARY = 1000


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """A Llama with random weights, in files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def compress(path: str | Path, method: str, tokens: Tokens, engine: Engine) -> tuple[dict[str, float], list[Tensor]]:
    """Seconds of each stage, and the products of all factors."""
    model, built = eckart.load_model(path), build_method(method)
    moments = engine.calibrate_by_block(CalibrationRequest(model, tokens, built))
    report = eckart.compress(model, built, plan(model, 0.5), moments, cut=engine.cut_units)
    products = [module.dense().detach().double() for module in low_rank_modules(model).values()]
    return dict(report.seconds), products


def difference(products: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all products, relative to its product's largest entry."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(products, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--hidden", type=int, help="width of a Llama of random weights, in place of --model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--method", default="asvd-i")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path: str | Path = arguments.model
        if arguments.hidden:
            path = make_model(Path(folder), arguments.hidden, arguments.layers)
        ids = torch.randint(3, VOCABULARY, (arguments.samples, arguments.length), generator=torch.manual_seed(0))
        tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        rows: list[dict[str, Any]] = []
        by_engine: list[list[Tensor]] = []
        for workers in [0, *arguments.workers]:
            with open_engine("ray" if workers else DEFAULT, workers=workers or None) as engine:
                if workers:  # a first time, so that the workers have started and read the model
                    compress(path, arguments.method, tokens, engine)
                seconds, products = compress(path, arguments.method, tokens, engine)
            by_engine.append(products)
            rows.append({"workers": workers, "cores": os.cpu_count(), "seconds": seconds})
    whole = sum(rows[0]["seconds"].values())
    print(f"{os.cpu_count()} cores")
    print(f"{'workers':>8} {'calibrate':>10} {'factor':>8} {'both':>6} {'to first':>10} {'to local':>10}")
    for row, products in zip(rows, by_engine, strict=True):
        first = by_engine[1] if row["workers"] and len(by_engine) > 1 else by_engine[0]
        row |= {
            "relative": {stage: value / whole for stage, value in row["seconds"].items()},
            "difference_to_first": difference(products, first),
            "difference_to_local": difference(products, by_engine[0]),
        }
        relative = row["relative"]
        print(
            f"{row['workers'] or 'local':>8} {relative['calibrate']:>10.2f} {relative['factor']:>8.2f} "
            f"{sum(relative.values()):>6.2f} {row['difference_to_first']:>10.1e} {row['difference_to_local']:>10.1e}"
        )
    write_json(arguments.json, {"settings": vars(arguments), "rows": rows})


if __name__ == "__main__":
    main()
