"""Quality at equal bytes: methods, or the default with its ingredients on and off.

    python benchmarks/quality.py table [--model MODEL --data DIR] [--samples 64] [--out runs/quality.jsonl]
    python benchmarks/quality.py ablation ...
    python benchmarks/quality.py samples ...                # how many calibration tokens a method needs
    python benchmarks/quality.py show --out runs/quality.jsonl                # what is there, as Markdown

Every variant of one keep gets the same `max_bytes`: the size of the weight files of plain factors at that share of each
linear. Printed is the increase of log-perplexity over the dense model, in nats: in the domain of the calibration text
and the mean over the other corpora; in brackets KL(dense || compressed). Rows are appended to --out as they come, and
what is there is not computed again.

Without --data: the built-in model, calibrated on prose, evaluated on prose and code. With --data: calibrated on
WikiText-2 train, evaluated on its test split and on whichever of the others the folder has.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import append_line, read_lines
from real_models import add_model_option
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan, weight_bytes
from eckart.cli.terminal import TerminalTrack
from eckart.data.corpora import read_text
from eckart.data.tokens import encode
from eckart.evals.predictions import log_probabilities, summed_divergence
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe

# Windows at a time.
BATCH = 8
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
OTHERS = ("ptb", "c4", "snips", "alpaca_eval", "mctest", "japanese")
CUT = {"allocation": "global"}
FULL: dict[str, Any] = {"method": "best"}
OFF = {"refine": False}

# {name: recipe keys}.
TABLE: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("svd", "asvd-0", "asvd-i", "nsvd-i", "sfsd", "kfac")},
    "best": FULL,
    "best-distilled": {"method": "best-distilled"},
}
# From the published method to the default, one ingredient after the other; then the default without each, and with what
# it leaves out.
ABLATION: dict[str, dict[str, Any]] = {
    "asvd-i": {"method": "asvd-i"},
    "kfac": {"method": "kfac"},
    "kfac, global": {"method": "kfac", **CUT},
    "kfac, global, pivoted": {"method": "kfac", **CUT, "layout": "pivoted"},
    "kfac, global, pivoted, anchored": {**FULL, **OFF},
    "best": FULL,
    "best-distilled": {"method": "best-distilled"},
    "best with asvd-i, probes": {
        "method": "asvd-i",
        "allocation": {"name": "global", "weights": "probes"},
        "layout": "pivoted",
        "order": "anchored",
        "refine": True,
    },
    "best, uniform": {**FULL, "allocation": "uniform"},
    "best, plain": {**FULL, "layout": "plain"},
    "best, one-shot": {**FULL, "order": "one-shot"},
    "best, sequential": {**FULL, "order": "sequential"},
    "best, no bias": {"method": {"name": "best", "options": {"bias": False}}},
    "best and probes": {**FULL, "allocation": {"name": "global", "weights": "probes"}},
    "best and joint": {**FULL, "joint": True},
    "best and refit": {**FULL, "refit": True},
}
SAMPLES: dict[str, dict[str, Any]] = {
    name: TABLE[name] for name in ("asvd-0", "asvd-i", "nsvd-i", "sfsd", "kfac", "best")
}
STUDIES = {"table": TABLE, "ablation": ABLATION, "samples": SAMPLES}
# 512 to 64k tokens, in windows of 256.
COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "show"])
    add_model_option(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--variants", nargs="+", help="some of the study's")
    parser.add_argument("--keeps", type=float, nargs="+")
    parser.add_argument("--samples", type=int, nargs="+", help="calibration windows")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48, help="windows read of each corpus")
    parser.add_argument("--cache", type=Path, help="folder for moments, shared by the variants")
    parser.add_argument("--out", type=Path, help="JSON lines; a stopped run goes on from it")
    arguments = parser.parse_args()
    if arguments.study == "show":
        show_rows(read_lines(arguments.out))
        return
    sweep = arguments.study == "samples"
    keeps = arguments.keeps or ([0.7] if sweep else KEEPS)
    counts = arguments.samples or (COUNTS if sweep else [64])
    variants = {name: STUDIES[arguments.study][name] for name in arguments.variants or STUDIES[arguments.study]}
    Comparison(arguments).run(variants, keeps, counts)


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Tables of variants by keep, nats and KL in domain / out of it; one for every model and number of samples."""
    for model, samples in dict.fromkeys((row["key"][0], row["key"][3]) for row in rows):
        by_variant = {
            (row["key"][1], row["key"][2]): row for row in rows if (row["key"][0], row["key"][3]) == (model, samples)
        }
        keeps = sorted({keep for _, keep in by_variant}, reverse=True)
        for measure in ("nats", "kl"):
            print(f"\n{Path(model).name}, {samples} samples, {measure}\n")
            print("| |" + "".join(f" {keep} |" for keep in keeps) + "\n|---|" + "---|" * len(keeps))
            for name in dict.fromkeys(name for name, _ in by_variant):
                cells = [both(by_variant[name, keep][measure]) if (name, keep) in by_variant else "" for keep in keeps]
                print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))


def both(values: dict[str, float]) -> str:
    """The value in the domain, which comes first, and the mean over the other corpora."""
    own, *others = values.values()
    return f"{own:.4f} / {sum(others) / len(others):.4f}"


class Comparison:
    """One model, its texts, and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.own = "builtin/prose" if arguments.data is None else "wikitext2"
        self.model = eckart.load_model(arguments.model, dtype="float32")
        self.tokenizer = eckart.load_tokenizer(arguments.model)
        others = ("builtin/code",) if arguments.data is None else OTHERS
        self.rows_of = {name: rows for name in (self.own, *others) if len(rows := self.windows(name))}
        self.dense: dict[tuple[str, int], Tensor] = {}
        self.rows: list[dict[str, Any]] = read_lines(arguments.out)

    def windows(self, name: str) -> Tensor:
        """(windows, length) of a corpus's test split; none where it is shorter than one."""
        stream = encode(read_text(name, split="test", data=self.arguments.data), self.tokenizer)
        length = self.arguments.length
        return stream[: len(stream) // length * length].view(-1, length)[: self.arguments.windows]

    def run(self, variants: dict[str, dict[str, Any]], keeps: Any, counts: Any) -> None:
        print(
            f"{self.arguments.model}: calibrated on {self.own}; nats over dense, in domain / out of it (KL)", flush=True
        )
        for samples in counts:
            for keep in keeps:
                limit = weight_bytes(self.model, plan(self.model, keep))
                for name, keys in variants.items():
                    self.show(self.find(name, keep, samples) or self.measure(name, keys, keep, samples, limit))

    def find(self, name: str, keep: float, samples: int) -> dict[str, Any] | None:
        key = [str(self.arguments.model), name, keep, samples]
        return next((row for row in self.rows if row["key"] == key), None)

    def measure(self, name: str, keys: dict[str, Any], keep: float, samples: int, limit: int) -> dict[str, Any]:
        recipe = parse_recipe(
            {
                "model": str(self.arguments.model),
                "dtype": "float32",
                "max_bytes": limit,
                "calibration": {"corpus": self.own, "samples": samples, "length": self.arguments.length},
                **keys,
            }
        )
        how = How(cache=self.arguments.cache, data=self.arguments.data, track=TerminalTrack(Console(stderr=True)))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            start = time.perf_counter()
            outcome = make_checkpoint(recipe, out, how)
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            assert size <= limit, f"{name} at keep {keep}: {size} bytes are more than {limit}"
            changes = self.compare(eckart.load_model(out))
        row = {
            "key": [str(self.arguments.model), name, keep, samples],
            "bytes": size,
            "limit": limit,
            "macs": outcome.summary.macs_per_token[1] / outcome.summary.macs_per_token[0],
            "seconds": round(seconds, 1),
            "nats": {corpus: change for corpus, (change, _) in changes.items()},
            "kl": {corpus: kl for corpus, (_, kl) in changes.items()},
            "undone": sum(not report.kept for report in outcome.passes),
        }
        self.rows.append(row)
        append_line(self.arguments.out, row)
        return row

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> dict[str, tuple[float, float]]:
        """{corpus: (increase of log-perplexity, KL)}."""
        changes = {}
        for name, rows in self.rows_of.items():
            nats, kl, count = 0.0, 0.0, 0
            for number, ids in enumerate(rows.split(BATCH)):
                mask, targets = torch.ones_like(ids, dtype=torch.bool), ids[:, 1:].flatten()[:, None]
                # The dense model's are computed once: they fit, and every variant is compared with them.
                if (name, number) not in self.dense:
                    self.dense[name, number] = log_probabilities(self.model, ids, mask)
                log_p, log_q = self.dense[name, number], log_probabilities(model, ids, mask)
                nats += float((log_p.gather(1, targets) - log_q.gather(1, targets)).sum(dtype=torch.float64))
                kl += summed_divergence(log_p, log_q)
                count += len(targets)
            changes[name] = (nats / count, kl / count)
        return changes

    def show(self, row: dict[str, Any]) -> None:
        _, name, keep, samples = row["key"]
        print(
            f"{samples:5d} x {self.arguments.length}  keep {keep:.1f}  {name:34s} {both(row['nats'])}   "
            f"({both(row['kl'])})  {row['bytes'] / 1e6:6.2f} MB  {row['seconds']:6.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
