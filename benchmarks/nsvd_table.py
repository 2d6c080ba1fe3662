"""The NSVD paper's Table 1 in small: every method, keep 0.9 ... 0.5, in and out of the calibration domain.

    python benchmarks/nsvd_table.py [--model MODEL --data DIR] [--out runs/table.json]

Without --data: the built-in model, calibrated on prose, evaluated on prose and code. With --data: calibrated on
WikiText-2 train, evaluated on every corpus that the folder has. Results are appended to --out as they come, and what is
there is not computed again. Changes are of perplexity against asvd-i at the same size, as the paper prints them
(positive: better), averaged over the corpora other than the calibration's own.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from measuring import append_line, read_lines
from real_models import add_model_option
from transformers import PreTrainedModel

import eckart
from eckart.data.corpora import CORPORA, read_text
from eckart.data.tokens import encode
from eckart.evals.improvement import average_improvement
from eckart.evals.perplexity import perplexity
from eckart.lowrank import Factored

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
BASELINE = "asvd-i"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(eckart.METHODS))
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="windows read of each corpus")
    parser.add_argument("--out", type=Path, help="JSON lines; a stopped run goes on from it")
    arguments = parser.parse_args()
    model = eckart.load_model(arguments.model, dtype="float32")
    tokenizer = eckart.load_tokenizer(arguments.model)
    if arguments.data is None:
        own, names = "builtin/prose", ["builtin/prose", "builtin/code"]
    else:
        own, names = "wikitext2", [name for name in CORPORA if present(name, arguments.data)]
    tokens = eckart.sample_windows(
        read_text(own, data=arguments.data), tokenizer, samples=arguments.samples, length=arguments.length
    )
    streams = {n: encode(read_text(n, split="test", data=arguments.data), tokenizer) for n in names}
    streams = {name: stream for name, stream in streams.items() if len(stream) >= arguments.length}

    def measure(candidate: PreTrainedModel) -> dict[str, float]:
        return {
            name: perplexity(candidate, stream, length=arguments.length, limit=arguments.windows).value
            for name, stream in streams.items()
        }

    perplexities: dict[tuple[str, float], dict[str, float]] = {}
    for row in read_lines(arguments.out):
        perplexities[row["method"], row["keep"]] = row["perplexity"]

    def record(method: str, keep: float, values: dict[str, float]) -> None:
        perplexities[method, keep] = values
        append_line(arguments.out, {"method": method, "keep": keep, "perplexity": values})

    print(
        f"{Path(arguments.model).name}: {tokens.count} calibration tokens of {own}, windows of {arguments.length}",
        flush=True,
    )
    print(f"{'keep method':22s}" + "".join(f"{name.split('/')[-1][:11]:>12s}" for name in streams) + "   out of domain")
    if ("dense", 1.0) not in perplexities:
        record("dense", 1.0, measure(model))
    show("1.0 dense", perplexities["dense", 1.0], None, own)
    calibrations: dict[frozenset[str], eckart.Calibration] = {}
    spectra: dict[str, dict[str, Factored]] = {}
    order = [BASELINE, *(name for name in arguments.methods if name != BASELINE)]
    for keep in arguments.keeps:
        for name in order:
            if (name, keep) not in perplexities:
                method = eckart.build_method(name)
                if method.needs and method.needs not in calibrations:
                    calibrations[method.needs] = eckart.calibrate(model, tokens, method)
                candidate = copy.deepcopy(model)
                eckart.compress(
                    candidate,
                    method,
                    eckart.plan(candidate, keep),
                    calibrations.get(method.needs),
                    spectra=spectra.setdefault(name, {}),
                )
                record(name, keep, measure(candidate))
            show(f"{keep:.1f} {name}", perplexities[name, keep], perplexities[BASELINE, keep], own)


def present(name: str, data: Path) -> bool:
    """Whether the folder has the corpus's test split."""
    try:
        read_text(name, split="test", data=data)
    except ValueError:
        return False
    return True


def show(label: str, values: dict[str, float], baseline: dict[str, float] | None, own: str) -> None:
    line = f"{label:22s}" + "".join(f"{value:12.5g}" for value in values.values())
    if baseline is not None:
        line += f"   {average_improvement(values, baseline, in_domain=[own]):+.1%}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
