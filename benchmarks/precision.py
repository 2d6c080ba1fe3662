"""What float32 and bfloat16 are good for here: which cuts are made in float32, and how moments are summed.

    python benchmarks/precision.py [--model builtin smollm2] [--methods asvd-i sfsd] [--keeps 0.7 0.4] [--widths 2048]

Cuts: for each method and share, how many of a model's linears pass the check of `lowrank.leading`, the largest true
excess of their losses over the float64 optimum, the largest error of their tails, and the largest excess that float32
would have had without the check. Moments: seconds and error of X^T X of 4,096 bfloat16 rows, in full as float32, and
as `add_gram` makes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import best_seconds, write_json
from real_models import add_model_option
from torch import Tensor
from transformers import PreTrainedModel

from eckart import build_method, calibrate, load_model, load_tokenizer, read_text, sample_windows
from eckart.data.tokens import Tokens
from eckart.lowrank import Method, Moments, Spectrum, leading, rank_for
from eckart.lowrank.float32 import add_gram, exact_products, full_float32, mirror
from eckart.lowrank.metrics import weigh_inputs
from eckart.models.sites import find_sites, read_weight

ROWS = 4096


def check_cuts(model: PreTrainedModel, tokens: Tokens, method: Method, keep: float) -> dict[str, Any]:
    """How the linears of a model fare in float32."""
    parts = {part.block: part for part in calibrate(model, tokens, method)}
    passed, excess, tails, unchecked = 0, 0.0, 0.0, 0.0
    sites = find_sites(model)
    for site in sites:
        part = parts[site.block]
        moments = Moments(part.inputs.get(site.input_group), part.gradients.get(site.name))
        weight = read_weight(model.get_submodule(site.name)).float()
        rank = rank_for(keep, site.d_out, site.d_in)
        exact, single = method.factor(weight.double(), moments), method.factor(weight, moments, rank=rank)
        assert isinstance(exact, Spectrum)
        assert isinstance(single, Spectrum)
        least = exact.tail(rank)
        if single.basis.dtype == torch.float32:
            passed += 1
            excess = max(excess, loss_of(weight, single.basis, method, moments) / least - 1)
            tails = max(tails, abs(single.tail(rank) / least - 1))
        kept = leading._is_enough  # noqa: SLF001 (what it would be without the check)
        try:
            leading._is_enough = lambda *_: True  # noqa: SLF001
            bold = method.factor(weight, moments, rank=rank)
        finally:
            leading._is_enough = kept  # noqa: SLF001
        assert isinstance(bold, Spectrum)
        unchecked = max(unchecked, loss_of(weight, bold.basis, method, moments) / least - 1)
    return {"passed": passed, "of": len(sites), "excess": excess, "tail error": tails, "without the check": unchecked}


def loss_of(weight: Tensor, basis: Tensor, method: Method, moments: Moments) -> float:
    """||(I - U U^T) W B||^2 in float64."""
    product = weigh_inputs(weight.double(), method.root(moments))
    basis = torch.linalg.qr(basis.double())[0]
    return float((product - basis @ (basis.mT @ product)).square().sum())


def time_moments(width: int) -> dict[str, float]:
    """Seconds and largest error, over the largest entry, of both ways."""
    x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, expected = x.float(), x.double().T @ x.double()
    total = torch.zeros(width, width, dtype=torch.float64)

    def add_whole() -> None:
        with full_float32():
            total.add_(rows.T @ rows)

    def add_half() -> None:
        with exact_products(x):
            add_gram(total, rows)

    results: dict[str, float] = {}
    for name, add in (("in full", add_whole), ("add_gram", add_half)):
        results[name] = best_seconds(add)
        total.zero_()
        add()
        mirror(total)
        results[f"{name}, error"] = float((total - expected).abs().max() / expected.abs().max())
        total.zero_()
    results["add_gram over in full"] = results["add_gram"] / results["in full"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser, ["builtin"])
    parser.add_argument("--methods", nargs="+", default=["asvd-i", "sfsd"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.7, 0.4])
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 5632])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load_model(name), load_tokenizer(name)
        tokens = sample_windows(read_text("builtin"), tokenizer, samples=arguments.samples, length=arguments.length)
        for method in arguments.methods:
            for keep in arguments.keeps:
                result = check_cuts(model, tokens, build_method(method), keep)
                rows.append({"model": Path(name).name, "method": method, "keep": keep, **result})
                print(
                    f"{Path(name).name:12s} {method:7s} keep {keep}: {result['passed']} of {result['of']} in float32, "
                    f"excess {result['excess']:.0e}, tail error {result['tail error']:.0e}; without the check "
                    f"{result['without the check']:.0e}",
                    flush=True,
                )
    for width in arguments.widths:
        timed = time_moments(width)
        rows.append({"width": width, **timed})
        print(f"width {width}: " + ", ".join(f"{what} {value:.2g}" for what, value in timed.items()), flush=True)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
