"""eckart on a GPU: checks against the processor, a model of Llama-7B's shape by stage, and tokens per second.

    python benchmarks/gpu.py --device cuda --shape llama-7b --json gpu.json [--minutes 8] [--only checks sizes ...]
    python benchmarks/gpu.py --device cpu --shape tiny --json gpu.json          # the same in small, in seconds

Parts, in this order; the JSON is written anew after each, and what fails is noted in it with its traceback:

    checks      every check of gpu_checks.py: the device computes what the processor does
    rates       what the card does in a second: bfloat16, TF32, float32 and float64 products, bytes copied
    parts       the pieces of a stage alone: symmetric products, eigenproblems (one, several at a time), pivots, a block
    asvd-i      the whole model, 256 x 2048 random tokens: seconds of calibration and factors, peak memory
    kfac, best  models of the first blocks, two sizes: seconds a block are their difference, those of the rest what
                is left; what the whole model would take is EXTRAPOLATED from them and named so
    plain       what public scripts do (see scale.py), on a block, EXTRAPOLATED to all
    tokens      a few blocks of the shape: prompts and steps, dense and low-rank, compiled, by torch.cuda's graphs

Weights are random, bfloat16, made on the device. Stages end with the device idle, so that seconds are of work done.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from floor import Rates, factor_work, forward_work, moments_work
from gpu_checks import CHECKS, failures
from inference import LAYOUTS, low_rank, rank_of
from scale import add_plainly, factor_plainly
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

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
from eckart.models.sites import find_sites, first_readers, replace_module
from eckart.runs.composition import COMPOSITIONS
from eckart.runs.ranks import AllocationInputs, rank
from eckart.runs.workbench import REFINED_TOGETHER
from eckart.support.progress import Track, silent

KEEP, BATCH = 0.7, 8
KEEPS = (0.8, 0.6, 0.5)
# Tokens that are generated at most, warming up and capturing included.
STEPS = 256


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


class Report:
    """What the run has found, in a file that is written anew after every entry."""

    def __init__(self, path: Path | None, device: torch.device, minutes: float) -> None:
        self.path, self.device, self.end = path, device, time.perf_counter() + 60 * minutes
        self.facts: dict[str, Any] = {}

    def note(self, **entries: Any) -> None:
        """Add entries and write all."""
        self.facts |= entries
        if self.path is not None:
            self.path.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """A part of the run: its entry, its seconds and peak memory; what it raises ends it and is noted."""
        entry: dict[str, Any] = {}
        start = now(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield entry
        except Exception:  # noqa: BLE001 (whatever it is, the next part runs)
            entry["error"] = traceback.format_exc()
            print(f"{name}: {entry['error']}", flush=True)
        entry["seconds_all"] = round(now(self.device) - start, 3)
        entry["peak_gb"] = peak_gb(self.device)
        self.note(**{name: entry})
        print(f"[{name}] {entry['seconds_all']} s, peak {entry['peak_gb']} GB", flush=True)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()


def now(device: torch.device) -> float:
    """The time, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb(device: torch.device) -> float | None:
    """The most memory that tensors took on the device since the part began."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if device.type == "cuda" else None


def seconds(run: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Median of some rounds after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = now(device)
        run()
        times.append(now(device) - start)
    return statistics.median(times)


@contextmanager
def lap(entry: dict[str, Any], stage: str, device: torch.device) -> Iterator[None]:
    """Notes the seconds that the block takes."""
    start = now(device)
    yield
    entry[stage] = round(now(device) - start, 4)


def run_checks(entry: dict[str, Any], device: torch.device) -> None:
    """Every check; a failure is noted with what differs by how much."""
    for name, check in CHECKS.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                differences = check(device, Path(folder))
                failed = failures(differences)
                worst = max((pair[0] / pair[1] for pair in differences.values() if pair[1]), default=0.0)
                entry[name] = {"passed": not failed, "compared": len(differences), "worst_over_tolerance": worst}
                if failed:
                    entry[name]["failed"] = dict(sorted(failed.items(), key=lambda item: -item[1][0])[:12])
            except Exception:  # noqa: BLE001 (the next check runs)
                entry[name] = {"passed": False, "error": traceback.format_exc()}
        entry[name]["seconds"] = round(time.perf_counter() - start, 2)
        print(f"check {name}: {json.dumps(entry[name])}", flush=True)


def measure_rates(device: torch.device, size: int) -> Rates:
    """The device's float32 (TF32 off) and bfloat16 operations, and bytes copied, in a second."""
    single = torch.randn(size, size, device=device)
    half = single.bfloat16()
    blank = torch.randn(2 * size, 2 * size, device=device)
    target = torch.empty_like(blank)
    return Rates(
        2 * size**3 / seconds(lambda: single @ single, device),
        2 * size**3 / seconds(lambda: half @ half.T, device),
        2 * blank.nbytes / seconds(lambda: target.copy_(blank), device),
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
    entry["add_gram, one batch of the widest input"] = seconds(lambda: add_gram(total, rows), device)
    if device.type == "cuda":
        product = torch.mm(rows.T, rows, out_dtype=torch.float32)
        entry["the whole product at once"] = seconds(
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
        entry[f"cholesky, {kind}"] = seconds(partial(torch.linalg.cholesky_ex, square), device, 2)
        entry[f"eigh, {kind}"] = seconds(partial(torch.linalg.eigh, square), device, 2)
        some = [square + index for index in range(4)]
        for workers in (2, 4):
            entry[f"eigh of four, {kind}, {workers} at a time"] = seconds(
                partial(in_streams, torch.linalg.eigh, some, workers), device, 1
            )
        if dtype == torch.float32:
            batch = torch.stack(some)
            entry[f"eigh of four, {kind}, batched"] = seconds(partial(torch.linalg.eigh, batch), device, 1)
        del some, square
    rank_kept = rank_for(KEEP, width, width)
    basis = torch.linalg.qr(torch.randn(width, rank_kept, device=device, dtype=torch.float64)).Q
    factors = Factors(basis, torch.randn(rank_kept, width, device=device, dtype=torch.float64))
    entry["pivot, square"] = seconds(lambda: pivot(factors), device, 1)
    wide = torch.linalg.qr(torch.randn(inner, rank_for(KEEP, inner, width), device=device, dtype=torch.float64)).Q
    factors = Factors(wide, torch.randn(wide.shape[1], width, device=device, dtype=torch.float64))
    entry["pivot, tall"] = seconds(lambda: pivot(factors), device, 1)
    logits = torch.randn(1, length, config.vocab_size, device=device)
    targets = torch.randint(0, config.vocab_size, (1, length), device=device)
    loss = nn.functional.cross_entropy
    with torch.enable_grad():
        logits.requires_grad_()
        entry["loss of a sample, classes last"] = seconds(
            lambda: loss(logits.flatten(0, 1), targets.flatten()).backward(), device, 2
        )
        entry["loss of a sample, classes first"] = seconds(
            lambda: loss(logits.transpose(1, 2), targets).backward(), device, 2
        )


@torch.no_grad()
def measure_block(entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens) -> None:
    """A block on all tokens: forward, and forward with moments."""
    model = make_model(config, device)
    groups = first_readers(site for site in find_sites(model) if site.block == 1)
    with lap(entry, "embedding", device):
        walk = Walk(model, tokens.batches(BATCH))
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


def compress_best(entry: dict[str, Any], device: torch.device, config: LlamaConfig, tokens: Tokens) -> None:
    """`best`, stage by stage, as `eckart compress` does it, without files."""
    model, best = make_model(config, device), COMPOSITIONS["best"]()
    sites, method = find_sites(model), best.method
    used, held_out = tokens.hold_out(0.125)
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
        passes=(refine,),
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


def replaced(model: PreTrainedModel, keep: float, layout: Any, where: dict[str, Any]) -> None:
    """Random low-rank linears in place of all, in place."""
    for site in find_sites(model):
        kept = rank_of(site.d_out, site.d_in, keep, layout, 32)
        replace_module(model, site.name, low_rank(site.d_out, site.d_in, kept, layout, where))


@torch.inference_mode()
def measure_tokens(
    entry: dict[str, Any], device: torch.device, config: LlamaConfig, report: Report, prompt: int, compiled: bool
) -> None:
    """Tokens per second of a few blocks: a prompt, and a step of one and of sixteen sequences behind a cache."""
    where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    variants: list[tuple[str, float, Any]] = [("dense", 1.0, None)]
    variants += [(f"{layout} {keep}", keep, layout) for keep in KEEPS for layout in LAYOUTS]
    for name, keep, layout in variants:
        model = make_model(config, device)
        if layout is not None:
            replaced(model, keep, layout, where)
        row: dict[str, float] = {}
        ids = torch.ones(1, prompt, dtype=torch.int64, device=device)
        read = partial(model.base_model, input_ids=ids, use_cache=False)
        row["prompt"] = prompt / seconds(read, device, 5)
        for sequences in (1, 16):
            step = stepping(model, sequences, config, prompt // 4)
            row[f"step of {sequences}"] = sequences / seconds(partial(eight_times, step), device) * 8
            if device.type == "cuda":
                graph = captured(step)
                row[f"step of {sequences}, graph"] = (
                    8 * sequences / seconds(partial(eight_times, graph.replay), device, 5)
                )
                del graph
        if compiled:
            start = now(device)
            try:
                fast = torch.compile(model.base_model)
                read = partial(fast, input_ids=ids, use_cache=False)
                row["prompt, compiled"] = prompt / seconds(read, device, 5)
                graph = captured(stepping(model, 1, config, prompt // 4, fast))
                row["step of 1, compiled graph"] = 8 / seconds(partial(eight_times, graph.replay), device, 5)
                del graph
            except Exception:  # noqa: BLE001 (the next one may compile)
                print(f"{name}: {traceback.format_exc()}", flush=True)
            row["seconds to compile"] = now(device) - start
            torch.compiler.reset()
        entry[name] = {key: round(value, 1) for key, value in row.items()}
        report.note(tokens_so_far=entry)
        del model, read
        if report.left < 20:
            entry["ended early"] = True
            return


def eight_times(run: Callable[[], object]) -> None:
    """A stretch that is long enough to time."""
    for _ in range(8):
        run()


def stepping(
    model: PreTrainedModel, sequences: int, config: LlamaConfig, cached: int, run: Callable[..., object] | None = None
) -> Callable[[], object]:
    """Reads one token of each sequence behind a static cache, which has room for STEPS of them."""
    cache = StaticCache(config=config, max_cache_len=cached + STEPS)
    ids = torch.ones(sequences, cached, dtype=torch.int64, device=model.device)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    last, step_of = ids[:, :1].contiguous(), model.base_model if run is None else run

    def step() -> object:
        return step_of(input_ids=last, past_key_values=cache, use_cache=True)

    return step


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def extrapolate(few: dict[str, Any], more: dict[str, Any], counts: tuple[int, int], blocks: int) -> dict[str, float]:
    """{stage: seconds of a model of so many blocks}, a straight line through what two models took."""
    return {
        stage: round(few[stage] + (more[stage] - few[stage]) / (counts[1] - counts[0]) * (blocks - counts[0]), 2)
        for stage in few
        if stage in more and isinstance(few[stage], float) and stage != "peak_gb"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("llama-7b", "tiny"), default="llama-7b")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that would begin later are left out")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--blocks", type=int, help="of asvd-i's model; default all of the shape")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, tiny = torch.device(arguments.device), arguments.shape == "tiny"
    report = Report(arguments.json, device, arguments.minutes)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    report.note(device=name, versions=versions, shape=arguments.shape, command=sys.argv)
    print(name, versions, flush=True)
    samples, length = (16, 32) if tiny else (256, 2048)
    ids = torch.randint(
        0, shape_of(arguments.shape).vocab_size, (samples, length), generator=torch.Generator().manual_seed(0)
    )
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    config = partial(shape_of, arguments.shape)
    counts = (1, 2) if tiny else (2, 4)
    whole = config().num_hidden_layers
    run = [part for part in PARTS if part in arguments.only]
    for part in run:
        if report.left < 20:
            report.note(**{part: {"error": "no time was left for it"}})
            continue
        if part in ("kfac", "best"):
            compress_it = compress_kfac if part == "kfac" else compress_best
            entries = []
            for count in counts:
                with report.part(f"{part}, {count} blocks") as entry:
                    compress_it(entry, device, config(count), tokens)
                entries.append(entry)
            if not any("error" in entry for entry in entries):
                line = extrapolate(entries[0], entries[1], counts, whole)
                report.note(**{f"{part}, {whole} blocks (EXTRAPOLATED)": line})
            continue
        with report.part(part) as entry:
            if part == "checks":
                run_checks(entry, device)
            elif part == "rates":
                rates = measure_rates(device, 256 if tiny else 8192)
                entry |= vars(rates)
                entry["floor"] = floor_of(config(), rates, samples, length)
            elif part == "parts":
                measure_parts(entry, device, config(), length)
                measure_block(entry, device, config(2), tokens)
            elif part == "asvd-i":
                compress_asvd(entry, device, config(arguments.blocks), tokens)
            elif part == "plain":
                run_plain(entry, device, config(1), tokens)
            elif part == "tokens":
                measure_tokens(entry, device, config(2 if tiny else 4), report, length // 2, device.type == "cuda")
    tell(report.facts)
    checks = report.facts.get("checks", {})
    failed = [name for name, check in checks.items() if isinstance(check, dict) and not check["passed"]]
    broken = [part for part, entry in report.facts.items() if isinstance(entry, dict) and "error" in entry]
    for name in failed:
        print(f"check failed: {name}")
    return 1 if failed or broken else 0


PARTS = ("checks", "rates", "parts", "asvd-i", "kfac", "best", "plain", "tokens")


def floor_of(config: LlamaConfig, rates: Rates, samples: int, length: int) -> dict[str, float]:
    """Operations of all blocks and the seconds that they take at these rates: a forward pass, moments, factors."""
    blocks = config.num_hidden_layers
    works = {
        "forward": forward_work(config, samples, length) * blocks,
        "moments": moments_work(config, samples, length) * blocks,
        "factors": factor_work(config, KEEP) * blocks,
    }
    operations = {f"{stage}, operations": work.bfloat16 + work.float32 for stage, work in works.items()}
    return operations | {f"{stage}, seconds": rates.seconds(work) for stage, work in works.items()}


def tell(facts: dict[str, Any]) -> None:
    """A short table: every number but those of the checks."""
    for part, entry in facts.items():
        if not isinstance(entry, dict) or part in ("checks", "versions", "tokens_so_far"):
            continue
        print(f"== {part}")
        for key, value in entry.items():
            print(f"   {key}: {value if not isinstance(value, float) else f'{value:.6g}'}")
    checks = {name: check for name, check in facts.get("checks", {}).items() if isinstance(check, dict)}
    if checks:
        print(f"== checks: {sum(check['passed'] for check in checks.values())} of {len(checks)} passed")


if __name__ == "__main__":
    sys.exit(main())
