"""The stages of compressing a model on a device, each alone and on a whole model. Not a program: gpu.py runs it.

Each function notes in `entry` the seconds of what it does. Models have random weights, bfloat16, made on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from measuring import lap, median_seconds, now
from scale import add_plainly, factor_plainly
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eckart.allocation import plan
from eckart.allocation.budget import Budget
from eckart.calibration.gradients import collect_gradients
from eckart.calibration.moments import calibrate_by_block
from eckart.calibration.sequential import PassReport, SequentialCalibration
from eckart.calibration.streams import Sample
from eckart.calibration.walk import Walk
from eckart.compression.replace import compress
from eckart.data.tokens import Tokens
from eckart.lowrank import Factors, build_method, pivot, rank_for
from eckart.lowrank.float32 import add_gram
from eckart.lowrank.moments import GRADIENT_STATISTICS
from eckart.models.sites import find_sites, first_readers
from eckart.runs.composition import COMPOSITIONS
from eckart.runs.ranks import AllocationInputs, rank
from eckart.runs.workbench import REFINED_TOGETHER
from eckart.support.progress import Track, silent

KEEP, BATCH = 0.7, 8


@torch.no_grad()
def make_model(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """Random weights in bfloat16, scaled so that activations stay near one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()  # noqa: SLF001 (see inference.py)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def shape_of(name: str, blocks: int | None = None) -> LlamaConfig:
    """Llama-7B's, or a tiny one; of so many blocks."""
    sizes = {"llama-7b": (32000, 4096, 11008, 32, 32), "tiny": (512, 64, 160, 2, 4)}[name]
    vocabulary, hidden, inner, layers, heads = sizes
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks or layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def in_streams(work: Callable[[Tensor], object], matrices: list[Tensor], workers: int) -> None:
    """The work on each matrix, several at a time: a thread and a stream each."""
    device = matrices[0].device

    def one(matrix: Tensor) -> None:
        if device.type != "cuda":
            work(matrix)
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work(matrix)
        stream.synchronize()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, matrices))


@torch.no_grad()
def measure_parts(entry: dict[str, Any], device: torch.device, config: LlamaConfig, length: int) -> None:
    """The pieces alone, in seconds."""
    width, inner = config.hidden_size, config.intermediate_size
    rows = torch.randn(BATCH * length, inner, device=device).bfloat16()
    total = torch.zeros(inner, inner, dtype=torch.float64, device=device)
    entry["add_gram, one batch of the widest input"] = median_seconds(lambda: add_gram(total, rows), device)
    if device.type == "cuda":
        product = torch.mm(rows.T, rows, out_dtype=torch.float32)
        entry["the whole product at once"] = median_seconds(
            lambda: torch.mm(rows.T, rows, out_dtype=torch.float32, out=product), device
        )
        expected = rows[:4096, :256].double().T @ rows[:4096, :256].double()
        got = torch.mm(rows[:4096, :256].T, rows[:4096, :256], out_dtype=torch.float32)
        entry["its error"] = float((got.double() - expected).abs().max() / expected.abs().max())
        del product
    del rows, total
    for dtype in (torch.float32, torch.float64):
        square = torch.randn(width, width + 64, device=device, dtype=dtype)
        square = square @ square.T
        kind = str(dtype).removeprefix("torch.")
        entry[f"cholesky, {kind}"] = median_seconds(partial(torch.linalg.cholesky_ex, square), device, 2)
        entry[f"eigh, {kind}"] = median_seconds(partial(torch.linalg.eigh, square), device, 2)
        some = [square + index for index in range(4)]
        for workers in (2, 4):
            entry[f"eigh of four, {kind}, {workers} at a time"] = median_seconds(
                partial(in_streams, torch.linalg.eigh, some, workers), device, 1
            )
        if dtype == torch.float32:
            batch = torch.stack(some)
            entry[f"eigh of four, {kind}, batched"] = median_seconds(partial(torch.linalg.eigh, batch), device, 1)
        del some, square
    rank_kept = rank_for(KEEP, width, width)
    basis = torch.linalg.qr(torch.randn(width, rank_kept, device=device, dtype=torch.float64)).Q
    factors = Factors(basis, torch.randn(rank_kept, width, device=device, dtype=torch.float64))
    entry["pivot, square"] = median_seconds(lambda: pivot(factors), device, 1)
    wide = torch.linalg.qr(torch.randn(inner, rank_for(KEEP, inner, width), device=device, dtype=torch.float64)).Q
    factors = Factors(wide, torch.randn(wide.shape[1], width, device=device, dtype=torch.float64))
    entry["pivot, tall"] = median_seconds(lambda: pivot(factors), device, 1)
    logits = torch.randn(1, length, config.vocab_size, device=device)
    targets = torch.randint(0, config.vocab_size, (1, length), device=device)
    loss = nn.functional.cross_entropy
    with torch.enable_grad():
        logits.requires_grad_()
        entry["loss of a sample, classes last"] = median_seconds(
            lambda: loss(logits.flatten(0, 1), targets.flatten()).backward(), device, 2
        )
        entry["loss of a sample, classes first"] = median_seconds(
            lambda: loss(logits.transpose(1, 2), targets).backward(), device, 2
        )


@torch.no_grad()
def measure_block(entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens) -> None:
    """A block on all tokens: forward, and forward with moments."""
    model = make_model(config, device)
    groups = first_readers(site for site in find_sites(model) if site.block == 1)
    with lap(entry, "embedding", device):
        walk = Walk(model, tokens.rows(BATCH))
    with lap(entry, "forward", device):
        walk.skip(0)
    with lap(entry, "forward and moments", device):
        walk.moments(1, groups, frozenset({"second_moment"}))


def compress_asvd(entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens) -> None:
    """asvd-i on all blocks."""
    model, method = make_model(config, device), build_method("asvd-i")
    with lap(entry, "whole", device):
        report = compress(model, method, plan(model, KEEP), calibrate_by_block(model, tokens, method, batch_size=BATCH))
    entry |= {f"{stage}": round(value, 3) for stage, value in report.seconds.items()}
    errors = [site.relative_error for site in report.sites if site.relative_error is not None]
    entry["mean relative error"] = sum(errors) / len(errors)


def compress_kfac(entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens) -> None:
    """kfac, one shot: gradients of the whole model first."""
    model, method = make_model(config, device), build_method("kfac")
    with lap(entry, "gradients", device):
        gradients = collect_gradients(model, tokens, find_sites(model), method.needs & GRADIENT_STATISTICS)
    blocks = calibrate_by_block(model, tokens, method, gradients=gradients, batch_size=BATCH)
    with lap(entry, "rest", device):
        report = compress(model, method, plan(model, KEEP), blocks)
    entry |= {stage: round(value, 3) for stage, value in report.seconds.items()}


def compress_best(
    entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens, effort: str = "medium"
) -> None:
    """`best`, stage by stage, as `eckart compress` does it, without files."""
    model, best = make_model(config, device), COMPOSITIONS["best"](effort)
    sites, method = find_sites(model), best.method
    used, held_out = tokens.hold_out(0.125) if best.holds_out else (tokens, None)
    with lap(entry, "gradients", device):
        gradients = collect_gradients(model, used, sites, method.needs & GRADIENT_STATISTICS)
    inputs = AllocationInputs(
        model,
        sites,
        lambda: calibrate_by_block(model, used, method, gradients=gradients, batch_size=BATCH),
        used,
        None,  # type: ignore[arg-type]  # the tokenizer: no score is read
    )
    with lap(entry, "moments, losses and knapsack", device):
        ranking = rank(best, Budget(keep=KEEP), inputs)
    spent = {"refinement": 0.0}

    def refine(
        number: int, block: nn.Module, samples: Sequence[Sample], held_out: Sequence[Sample], track: Track = silent
    ) -> PassReport | None:
        start = now(device)
        assert best.refinement is not None
        report = best.refinement(number, block, samples, held_out, track)
        spent["refinement"] += now(device) - start
        return report

    calibration = SequentialCalibration(
        model,
        used,
        best.in_order,
        order=best.order,
        held_out=held_out,
        gradients=gradients,
        passes=(refine,) if best.refinement else (),
        batch_size=REFINED_TOGETHER,
    )
    with lap(entry, "anchored walk", device):
        report = compress(model, best.in_order, ranking.plan, calibration)
    entry["of it refinement"] = round(spent["refinement"], 3)
    entry["of it moments and forward"] = round(report.seconds["calibrate"] - spent["refinement"], 3)
    entry["of it factors, pivots"] = round(report.seconds["factor"], 3)
    entry["refinement, held-out loss before and after"] = [[one.before, one.after] for one in calibration.reports]


@torch.no_grad()
def run_plain(entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens) -> None:
    """One block by a plain script: float32 sums of every linear, a Cholesky root, an SVD and an inverse."""
    model = make_model(config, device)
    sites = find_sites(model)
    sums = {site.name: torch.zeros(site.d_in, site.d_in, device=device) for site in sites}
    handles = [model.get_submodule(site.name).register_forward_pre_hook(add_plainly(sums[site.name])) for site in sites]
    few = Tokens(tokens.ids[: 4 * BATCH], tokens.mask[: 4 * BATCH])
    base = model.base_model
    base(input_ids=few.ids[:BATCH].to(device), use_cache=False)
    with lap(entry, "calibrate, 32 samples", device):
        for ids, _ in few.batches(BATCH):
            base(input_ids=ids.to(device), use_cache=False)
    entry["calibrate a block, all samples (EXTRAPOLATED)"] = round(
        entry["calibrate, 32 samples"] * len(tokens) / len(few) / config.num_hidden_layers, 3
    )
    for handle in handles:
        handle.remove()
    times = {}
    for role in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        site = next(site for site in sites if site.role == role)
        start = now(device)
        factor_plainly(model, site, sums[site.name], KEEP, torch.float32)
        times[role] = round(now(device) - start, 3)
    entry["factor a linear"] = times
    attention, wide, narrow = times.values()
    entry["factor a block (4 x, 2 x and 1 x these)"] = round(4 * attention + 2 * wide + narrow, 3)
