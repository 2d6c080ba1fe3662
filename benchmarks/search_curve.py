"""Surgical search against global allocation: the same method, the same budgets, the same windows to report on.

    python benchmarks/search_curve.py [--model MODEL --data DIR] [--methods asvd-i kfac] [--out runs/search.jsonl]

For each tolerance the surgical search walks from the last linear to the first, scored by perplexity on windows out of
a fifth of the test text, and ends at some share kept. At that share the others get their ranks: the same share
everywhere, ranks in proportion to effective ranks, ASVD's sensitivity search, the knapsack over the method's own
losses, and the knapsack over losses weighed by probes. Printed are the increase of log-perplexity over dense and
KL(dense || compressed) on the other four fifths, and how many scores or probes each took. Plain layout, one shot.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import append_line
from real_models import add_model_option

import eckart
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe

TOLERANCES = ("0.02% per linear", "0.1% per linear", "0.2% per linear", "0.5% per linear", "5%")
RIVALS: dict[str, Any] = {
    "uniform": "uniform",
    "effective-rank": "effective-rank",
    "sensitivity": {"name": "sensitivity"},
    "global": "global",
    "global, probes": {"name": "global", "weights": "probes"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", default=["asvd-i", "kfac"])
    parser.add_argument("--tolerances", nargs="+", default=list(TOLERANCES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--windows", type=int, default=80, help="test windows: a fifth of them to search on, the others to report on"
    )
    parser.add_argument("--cache", type=Path, help="folder for moments and journals, so that a stopped run goes on")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    arguments = parser.parse_args()
    comparison = Comparison(arguments)
    print(f"{arguments.model}: {arguments.samples} x {arguments.length} tokens of {comparison.corpus}", flush=True)
    for method in arguments.methods:
        for tolerance in arguments.tolerances:
            searched = {"name": "surgical", "tolerance": tolerance, **comparison.score}
            keep = comparison.measure(f"{method}, surgical {tolerance}", method, searched, None)
            for name, allocation in RIVALS.items():
                if isinstance(allocation, dict) and allocation["name"] == "sensitivity":
                    allocation = {**allocation, **comparison.score}
                comparison.measure(f"{method}, {name}", method, allocation, keep)


class Comparison:
    """One model and what it is measured on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.corpus = "builtin/prose" if arguments.data is None else "wikitext2"
        self.model = eckart.load_model(arguments.model, dtype="float32")
        self.tokenizer = eckart.load_tokenizer(arguments.model)
        self.score = {"score": f"perplexity:{self.corpus}", "limit": arguments.windows // 5}

    def measure(self, name: str, method: str, allocation: Any, keep: float | None) -> float:
        """Compress, report, and give the share kept."""
        arguments = self.arguments
        recipe = parse_recipe(
            {
                "model": str(arguments.model),
                "dtype": "float32",
                "method": method,
                "keep": keep,
                "allocation": allocation,
                "context": arguments.length,
                "calibration": {"corpus": self.corpus, "samples": arguments.samples, "length": arguments.length},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            outcome = make_checkpoint(recipe, out, How(cache=arguments.cache, data=arguments.data))
            task = Task(
                f"divergence:{self.corpus}",
                split="sfsd-evaluation",
                length=arguments.length,
                limit=arguments.windows * 4 // 5,
            )
            (result,) = evaluate(
                eckart.load_model(out), self.tokenizer, [task], data=arguments.data, reference=self.model
            )
        facts = outcome.allocation
        row = {
            "name": name,
            "keep": outcome.summary.keep_of_linears,
            "nats": result.scores["log_perplexity.change"].value,
            "kl": result.value,
            "evaluations": facts.get("evaluations", facts.get("search", {}).get("evaluations", 0)),
            "seconds": round(outcome.seconds["allocate"], 1),
        }
        print(
            f"{name:38s} keep {row['keep']:.3f}  {row['nats']:8.4f} nats  KL {row['kl']:8.4f}  "
            f"{row['evaluations']:4d} evaluations, {row['seconds']:6.1f} s",
            flush=True,
        )
        append_line(arguments.out, row)
        return float(row["keep"])


if __name__ == "__main__":
    main()
