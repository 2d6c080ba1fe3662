"""Compressing a model of TinyLlama-1.1B's shape from disk, against a plain implementation in the same run.

    python benchmarks/scale.py [--model MODEL | --layers 22] [--keep 0.7] [--samples 64] [--json FILE]
    python benchmarks/scale.py --only eckart            # or: plain, out-of-core

Makes a random-weight bfloat16 checkpoint (once), or takes --model, and compresses it with asvd-i, each way in a process
of its own:

    plain           what public scripts do: X^T X of every linear in one pass over the whole model, all of them held in
                    memory in float32; then for each linear a Cholesky root in float64, torch.linalg.svd of W times it
                    in float32, and the root's inverse
    plain, float64  the same with the singular value decomposition in float64 (factors only, of one block)
    eckart          `make_checkpoint`
    out-of-core     `compress_out_of_core`: one block in memory

Printed are seconds a stage, the peak resident memory of each process, the mean relative output error of the linears,
and how far each stage of eckart is from its floor (see floor.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from floor import Rates, factor_work, forward_work, measure_rates, moments_work
from measuring import lap, machine, peak_bytes, write_json
from real_models import add_model_option
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from eckart import load_model, load_tokenizer
from eckart.data.builtin import builtin_model_path
from eckart.data.corpora import read_text
from eckart.data.samples import sample_windows
from eckart.lowrank import rank_for
from eckart.models.sites import Site, find_sites
from eckart.runs.facts import Outcome
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import Recipe, parse_recipe

BATCH = 8
WAYS = ("plain", "eckart", "out-of-core")


def tiny_llama(layers: int) -> LlamaConfig:
    """The published shape of TinyLlama-1.1B."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_model(folder: Path, layers: int) -> None:
    """Random weights in bfloat16, and the built-in tokenizer, whose ids fit any vocabulary of 32000."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(tiny_llama(layers)).save_pretrained(folder, max_shard_size="500MB")
    load_tokenizer(builtin_model_path()).save_pretrained(folder)


def make_recipe(folder: Path, arguments: argparse.Namespace) -> Recipe:
    """asvd-i at the same share of every linear."""
    return parse_recipe(
        {
            "model": str(folder),
            "method": "asvd-i",
            "keep": arguments.keep,
            "calibration": {"corpus": "builtin", "samples": arguments.samples, "length": arguments.length},
        }
    )


def run_eckart(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`make_checkpoint`, or out of core."""
    make: Callable[..., Outcome] = make_checkpoint if arguments.step == "eckart" else compress_out_of_core
    out = arguments.folder / f"{folder.name}-{arguments.step}"
    outcome = make(make_recipe(folder, arguments), out, How(batch_size=BATCH), force=True)
    errors = [site.relative_error for site in outcome.report.sites if site.relative_error is not None]
    return {"seconds": dict(outcome.seconds), "error": sum(errors) / len(errors)}


@torch.no_grad()
def run_plain(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One script, everything in memory."""
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {"seconds": seconds}
    with lap(seconds, "load"):
        model, tokenizer, text = load_model(folder), load_tokenizer(folder), read_text("builtin")
        tokens = sample_windows(text, tokenizer, samples=arguments.samples, length=arguments.length, seed=0)
        sites = find_sites(model)
        sums = {site.name: torch.zeros(site.d_in, site.d_in) for site in sites}
        for site in sites:
            model.get_submodule(site.name).register_forward_pre_hook(add_plainly(sums[site.name]))
    with lap(seconds, "calibrate"):
        for ids, _ in tokens.batches(BATCH):
            model(input_ids=ids, use_cache=False)
    errors = []
    with lap(seconds, "factor"):
        for site in sites:
            factors, error = factor_plainly(model, site, sums[site.name], arguments.keep, torch.float32)
            model.set_submodule(site.name, nn.Sequential(*(_linear(each) for each in reversed(factors))))
            errors.append(error)
    facts["error"] = sum(errors) / len(errors)
    reference = load_model(folder)
    with lap(facts, "factor_float64_block"):
        for site in sites:
            if site.block == 0:
                factor_plainly(reference, site, sums[site.name], arguments.keep, torch.float64)
    return facts


def add_plainly(total: Tensor) -> Callable[..., None]:
    """A hook that adds a linear's inputs, X^T X in float32, to `total`."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        total.add_(rows.T @ rows)

    return hook


def factor_plainly(
    model: nn.Module, site: Site, total: Tensor, keep: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], float]:
    """(left, right) by the singular value decomposition of W B and the inverse of B, and the relative error."""
    weight = model.get_submodule(site.name).weight
    assert isinstance(weight, Tensor)
    moment = total.double()
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info):  # as SVD-LLM's script does where rounding or few tokens leave an eigenvalue below zero
        ridge = 1e-6 - float(torch.linalg.eigvalsh(moment)[0])
        factor = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
    root = factor.to(dtype)
    left, values, right = torch.linalg.svd(weight.to(dtype) @ root, full_matrices=False)
    inverse = torch.linalg.solve(root, torch.eye(len(root), dtype=dtype, device=root.device))
    rank, squares = rank_for(keep, site.d_out, site.d_in), values.double().square()
    scale = values[:rank].sqrt()
    pair = (left[:, :rank] * scale, (scale[:, None] * right[:rank]) @ inverse)
    return (pair[0].bfloat16(), pair[1].bfloat16()), float(squares[rank:].sum() / squares.sum())


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.7)
    add_model_option(parser, None)
    parser.add_argument("--layers", type=int, default=22, help="of the model of random weights")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"))
    parser.add_argument("--only", choices=WAYS, action="append", help="of the ways to do it (repeatable)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=["make", *WAYS], help="used by the benchmark itself")
    arguments = parser.parse_args()
    folder = Path(arguments.model or arguments.folder / f"llama-{arguments.layers}")
    if arguments.step == "make":
        return make_model(folder, arguments.layers)
    if arguments.step:
        facts = (run_plain if arguments.step == "plain" else run_eckart)(folder, arguments)
        facts["peak"] = peak_bytes()
        print(json.dumps(facts))
        return None
    command = [sys.executable, __file__, *sys.argv[1:]]
    if not (folder / "config.json").is_file():
        subprocess.run([*command, "--step", "make"], check=True)
    rates = measure_rates()
    print(
        f"{machine()}: float32 {rates.float32 / 1e9:.0f} GFLOP/s, bfloat16 {rates.bfloat16 / 1e9:.0f}, "
        f"copies {rates.bytes / 1e9:.0f} GB/s"
    )
    results: dict[str, dict[str, Any]] = {}
    for way in arguments.only or WAYS:
        finished = subprocess.run([*command, "--step", way], check=True, stdout=subprocess.PIPE, text=True)
        results[way] = json.loads(finished.stdout.strip().splitlines()[-1])
        print(tell(way, results[way]), flush=True)
    compare(results, arguments, AutoConfig.from_pretrained(folder), rates)
    write_json(arguments.json, {"ways": results, "rates": vars(rates)})
    return None


def tell(way: str, facts: dict[str, Any]) -> str:
    """A line about one way."""
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in facts["seconds"].items() if value >= 0.05)
    return f"{way:12s} peak {facts['peak'] / 1e9:.2f} GB, mean relative error {facts['error']:.6f}; {stages}"


def compare(
    results: dict[str, dict[str, Any]], arguments: argparse.Namespace, config: LlamaConfig, rates: Rates
) -> None:
    """Print eckart's ways against the plain one, and against the floor."""
    layers = config.num_hidden_layers
    floors = {
        "calibrate": rates.seconds(
            (
                forward_work(config, arguments.samples, arguments.length)
                + moments_work(config, arguments.samples, arguments.length)
            )
            * layers
        ),
        "factor": rates.seconds(factor_work(config, arguments.keep) * layers),
    }
    plain = results.get("plain")
    if plain is not None:
        whole = plain["factor_float64_block"] * layers
        print(f"plain, SVD in float64: factor {whole:.0f} s, {layers} times the first block's")
    for way in ("eckart", "out-of-core"):
        if way not in results:
            continue
        seconds = results[way]["seconds"]
        for stage, floor in floors.items():
            print(
                f"{way}: {stage} {seconds[stage]:.1f} s, floor {floor:.1f} s, {seconds[stage] / floor:.1f} x the floor"
            )
        if plain is not None:
            ratios = {stage: plain["seconds"][stage] / seconds[stage] for stage in floors}
            total = sum(plain["seconds"][stage] for stage in floors) / sum(seconds[stage] for stage in floors)
            print(
                f"{way} against plain: calibrate {ratios['calibrate']:.2f} x, factor {ratios['factor']:.2f} x, both "
                f"{total:.2f} x as fast; peak memory {results[way]['peak'] / plain['peak']:.2f} of it; loss "
                f"{results[way]['error'] / plain['error']:.6f} of it"
            )


if __name__ == "__main__":
    main()
