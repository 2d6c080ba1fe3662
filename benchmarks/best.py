"""What a compression spends its time and memory on, stage by stage, beside the operations that it cannot do without.

    python benchmarks/best.py --model smollm2 [--methods asvd-i kfac best] [--samples 32 --length 512] [--json FILE]
    python benchmarks/best.py --quick           # a random Llama of eight blocks of 256, 16 x 256 tokens

Each method compresses the model in a process of its own, as `eckart compress --no-cache` does. A stage is what the
progress lines are about: seconds are those of the innermost line that runs, memory is the most that was resident then.
The first method is the baseline of the ratios. *Floor* is the operations of a stage's products over the rate of a large
float32 product in the same run: forward and backward passes, sums, decompositions; what is small is left out, and so
are the bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from floor import EIGH
from measuring import best_seconds, machine, peak_bytes, write_json
from real_models import add_model_option
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eckart import load_model, load_tokenizer
from eckart.data.builtin import builtin_model_path
from eckart.lowrank import rank_for
from eckart.lowrank.float32 import COLUMNS
from eckart.models.sites import blocks_of, find_sites, first_readers
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe

T = TypeVar("T")
TEXT = "builtin/prose"
HELD_OUT = 0.125
# What a progress line is about, by the first pattern that it matches; the lines inside "losses" are of the dense model.
STAGES = {
    r"^embedding": "embedding",
    r"^gradients|: gradients|^loss$": "gradients",
    r"^losses$": "loss curves",
    r"refinement": "refinement",
    r"^linears$": "factors",
    r"moments|forward|dense|compressed": "walk",
}


class Stopwatch:
    """Seconds and peak memory of each stage; `track` is a progress display that notes them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.stages = ["load and save"]
        self.since = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        """The items; meanwhile the description's stage runs, unless a line inside it does."""
        del total
        stage = next((name for pattern, name in STAGES.items() if re.search(pattern, description)), description)
        if stage == "walk" and self.stages[-1] == "loss curves":
            stage = "moments"
        self._note()
        self.stages.append(stage)
        try:
            yield from items
        finally:
            self._note()
            self.stages.pop()

    def _note(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stages[-1]] = self.seconds.get(self.stages[-1], 0.0) + now - self.since
        self.since = now

    def stop(self) -> float:
        """All seconds."""
        self._note()
        return sum(self.seconds.values())

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            stage = self.stages[-1]
            self.peaks[stage] = max(self.peaks.get(stage, 0), process.memory_info().rss)
            time.sleep(0.05)


def floor_of(
    model: PreTrainedModel, method: str, samples: int, length: int, keep: float, steps: int
) -> dict[str, float]:
    """{stage: operations of its products}: what the method cannot do without, on any model."""
    sites, tokens = find_sites(model), samples * length
    used = tokens * (1 - HELD_OUT) if method == "best" else tokens
    weights = sum(site.num_params for site in sites)
    width = max(site.d_in for site in sites if site.role.startswith(("self_attn", "attn")))
    forward = 2 * tokens * weights + 2 * tokens * length * width * len(blocks_of(model))  # causal attention: half
    head = 2 * tokens * model.get_output_embeddings().weight.numel()
    sums = sum(site.d_in * (site.d_in + COLUMNS) for site in first_readers(sites).values())
    out_sums = sum(site.d_out * (site.d_out + COLUMNS) for site in sites)
    cross = sum(2 * site.d_in**2 for site in first_readers(sites).values())
    cuts = 0.0
    for site in sites:
        small, large = min(site.d_out, site.d_in), max(site.d_out, site.d_in)
        rank = rank_for(keep, site.d_out, site.d_in)
        cuts += 2 * site.d_out * site.d_in**2 + small * (small + COLUMNS) * large + EIGH * small**3
        cuts += 2 * rank * site.num_params
    share = used / tokens
    gradients = 2 * share * (forward + head) + used * out_sums
    return {
        "asvd-i": {"walk": forward + used * sums, "factors": cuts},
        "kfac": {"gradients": gradients, "walk": forward + used * sums, "factors": cuts},
        "best": {
            "gradients": gradients + used * sums,  # the dense moments come with the same forward pass
            "loss curves": cuts,
            "walk": 2 * forward + used * (sums + cross),
            "factors": cuts,
            "refinement": steps * 3 * forward / tokens * 8 * length,
        },
    }[method]


def measure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Compress once, in this process."""
    rate = measure_rate()
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_random(Path(folder) / "model")
        recipe: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "method": {"name": method},
            "keep": arguments.keep,
            "sites": {"blocks": arguments.blocks},
            "calibration": {"corpus": arguments.text, "samples": arguments.samples, "length": arguments.length},
        }
        if method == "best":
            recipe |= {key: json.loads(value) for key, _, value in (each.partition("=") for each in arguments.set)}
        out = arguments.out / method if arguments.out else Path(folder) / "out"
        outcome = make_checkpoint(parse_recipe(recipe, where="benchmark"), out, How(track=watch.track), force=True)
        total, peak = watch.stop(), peak_bytes()
        steps = outcome.recipe.composition.refinement
        floor = floor_of(
            load_model(model, dtype="float32"),
            method,
            arguments.samples,
            arguments.length,
            arguments.keep,
            0 if steps is None else steps.steps * len({report.place for report in outcome.passes}),
        )
    stages = {
        stage: {
            "seconds": round(seconds, 2),
            "floor": round(floor[stage] / rate, 2) if stage in floor else None,
            "peak_gb": round(watch.peaks.get(stage, 0) / 1e9, 2),
        }
        for stage, seconds in watch.seconds.items()
    }
    return {
        "method": method,
        "seconds": round(total, 2),
        "peak_gb": round(peak / 1e9, 2),
        "gflops": round(rate / 1e9, 1),
        "floor": round(sum(floor.values()) / rate, 2),
        "stages": stages,
    }


def measure_rate(size: int = 2048) -> float:
    """Float32 operations a second in a large product, now."""
    matrix = torch.randn(size, size)
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix)


def make_random(folder: Path) -> Path:
    """A random Llama of eight blocks with the built-in tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(builtin_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def print_table(results: list[dict[str, Any]]) -> None:
    """A row a stage, and each method's ratio to the first one."""
    base = results[0]
    print("| method | stage | seconds | floor | peak GB |\n|---|---|---|---|---|")
    for result in results:
        name = result["method"]
        for stage, entry in result["stages"].items():
            print(f"| {name} | {stage} | {entry['seconds']:.1f} | {entry['floor']} | {entry['peak_gb']:.2f} |")
        time, memory = (result[key] / base[key] for key in ("seconds", "peak_gb"))
        ratio = f"{time:.2f} x the time and {memory:.2f} x the memory of {base['method']}"
        print(f"| {name} | all: {ratio} | {result['seconds']:.1f} | {result['floor']} | {result['peak_gb']:.2f} |")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser, None)
    parser.add_argument("--methods", nargs="+", default=["asvd-i", "kfac", "best"], choices=["asvd-i", "kfac", "best"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--blocks", help="as in recipes: 'first 4'")
    parser.add_argument("--text", default=TEXT, help="calibration corpus")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="recipe settings of best")
    parser.add_argument("--out", type=Path, help="keep the checkpoints in this folder")
    parser.add_argument("--quick", action="store_true", help="few tokens; without --model of a random model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.length = 16, 256
    if arguments.inside:
        print(json.dumps(measure(arguments, arguments.inside)))
        return
    results = []
    for method in arguments.methods:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--inside", method], stdout=subprocess.PIPE, text=True, check=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{method}: {results[-1]['seconds']} s, {results[-1]['peak_gb']} GB", file=sys.stderr, flush=True)
    print_table(results)
    write_json(arguments.json, {"machine": machine(), "settings": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
