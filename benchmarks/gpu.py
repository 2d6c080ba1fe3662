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
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from floor import Rates, factor_work, forward_work, measure_rates, moments_work
from gpu_checks import CHECKS, failures
from gpu_stages import (
    KEEP,
    compress_asvd,
    compress_best,
    compress_kfac,
    measure_block,
    measure_parts,
    run_plain,
    shape_of,
)
from gpu_tokens import measure_tokens
from measuring import machine, now, peak_gb, write_json
from transformers import LlamaConfig

from eckart.data.tokens import Tokens

# Seconds without which no part, and of the last one no model, is begun.
LEAST = 20


class Report:
    """What the run has found, in a file that is written anew after every entry."""

    def __init__(self, path: Path | None, device: torch.device, minutes: float) -> None:
        self.path, self.device, self.end = path, device, time.perf_counter() + 60 * minutes
        self.facts: dict[str, Any] = {}

    def note(self, **entries: Any) -> None:
        """Add entries and write all."""
        self.facts |= entries
        write_json(self.path, self.facts)

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
    def has_time(self) -> bool:
        """Whether there is time for something more."""
        return self.end - time.perf_counter() >= LEAST

    def note_tokens(self, entry: dict[str, Any]) -> bool:
        """Note what the last part has so far; whether there is time for more of it."""
        self.note(tokens_so_far=entry)
        return self.has_time


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
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    report.note(device=machine(device), versions=versions, shape=arguments.shape, command=sys.argv)
    print(machine(device), versions, flush=True)
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
        if not report.has_time:
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
                rates = measure_rates(256 if tiny else 8192, device)
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
                measure_tokens(
                    entry, device, config(2 if tiny else 4), report.note_tokens, length // 2, device.type == "cuda"
                )
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
