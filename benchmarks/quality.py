"""Quality at equal bytes: methods, or the default with its ingredients on and off.

    python benchmarks/quality.py table [--model MODEL --data DIR] [--samples 64] [--out runs/quality.jsonl]
    python benchmarks/quality.py ablation ...
    python benchmarks/quality.py samples ...                # how many calibration tokens a method needs
    python benchmarks/quality.py bytes --keeps 0.9 0.8 ...  # against quantisation and pruning, by the size of the file
    python benchmarks/quality.py show --out runs/quality.jsonl                # what is there, as Markdown

Every variant of one keep gets the same `max_bytes`: the size of the weight files of plain factors at that share of each
linear; of `bytes`, that share of the dense model's file, as it is in bfloat16. Printed is the increase of
log-perplexity over the dense model, in nats: in the domain of the calibration text and the mean over the other corpora;
in brackets KL(dense || compressed). `show` adds every corpus with its standard error over windows, and the difference
to `best` on the same windows. Rows are appended to --out as they come, and what is there is not computed again.

Without --data: the built-in model, calibrated on prose, evaluated on prose and code. With --data: calibrated on
WikiText-2 train, evaluated on its test split and on whichever of the others the folder has.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losing import NSVD_TEXTS, Texts, mean_and_error, spread
from measuring import append_line, read_lines
from real_models import add_model_option
from rich.console import Console
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan, weight_bytes
from eckart.cli.terminal import TerminalTrack
from eckart.models.sites import find_sites
from eckart.runs.how import How
from eckart.runs.in_memory import make_baseline, make_checkpoint
from eckart.runs.recipe import parse_recipe
from eckart.support.sizes import num_params, tensor_bytes

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
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
    "best, tokens alike": {"method": {"name": "best", "options": {"weighted": False}}},
    "best, shrunk by 0.3": {"method": {"name": "best", "options": {"shrink_in": 0.3}}},
    "kfac, global, pivoted, shrunk by 0.3": {
        "method": {"name": "kfac", "options": {"shrink_in": 0.3}},
        **CUT,
        "layout": "pivoted",
    },
    "best, no bias": {"method": {"name": "best", "options": {"bias": False}}},
    "best and probes": {**FULL, "allocation": {"name": "global", "weights": "probes"}},
    "best and joint": {**FULL, "joint": True},
    "best and refit": {**FULL, "refit": True},
}
SAMPLES: dict[str, dict[str, Any]] = {
    name: TABLE[name] for name in ("asvd-0", "asvd-i", "nsvd-i", "sfsd", "kfac", "best")
}
# Rivals that are no low-rank models; those of one size are measured once.
RIVALS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    **{f"int4, {group}": {"method": {"name": "int4", "options": {"group_size": group}}} for group in (32, 64, 128)},
    "llm-pruner": {"method": "llm-pruner"},
}
# Numbers in few bits: those of one size quantise every linear and cut none, by rounding to nearest (svd reads no text)
# or with errors passed on (asvd-i's moments).
IN_BITS: dict[str, dict[str, Any]] = {
    **{f"nearest {bits}, 64": {"method": "svd", "bits": bits} for bits in (4, 3)},
    **{f"compensated {bits}, 64": {"method": "asvd-i", "bits": bits} for bits in (4, 3)},
    "best, bits auto": {**FULL, "bits": "auto"},
    **{f"best, {bits} bits": {**FULL, "bits": bits} for bits in (8, 4)},
}
OF_ONE_SIZE = ("int8", "int4", "nearest", "compensated")
BYTES: dict[str, dict[str, Any]] = {
    **RIVALS,
    **IN_BITS,
    **{name: TABLE[name] for name in ("best", "asvd-i", "nsvd-i", "svd", "asvd-0", "sfsd")},
}
STUDIES = {"table": TABLE, "ablation": ABLATION, "samples": SAMPLES, "bytes": BYTES}
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
    parser.add_argument("--calibration", help="text or mixture; default: the train split of the first corpus")
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
    """Tables of variants by keep: nats and KL in domain / out of it, then every corpus; for every model and text."""
    for setting in dict.fromkeys(setting_of(row) for row in rows):
        of_setting = {(row["key"][1], row["key"][2]): row for row in rows if setting_of(row) == setting}
        keeps = sorted({keep for _, keep in of_setting}, key=lambda keep: -(keep or 2))
        names = list(dict.fromkeys(name for name, _ in of_setting))
        model, samples, calibration, *_ = setting
        title = f"{Path(model).name}, {samples} samples of {calibration}"
        for measure in ("nats", "kl"):
            print(f"\n{title}, {measure}\n")
            print(row_of("", [heading(keep) for keep in keeps]) + "\n" + row_of("---", ["---"] * len(keeps)))
            for name in names:
                some = [of_setting.get((name, keep)) for keep in keeps]
                print(row_of(name, [both(row[measure]) if row else "" for row in some]))
        for keep in keeps:
            show_corpora(f"{title}, {heading(keep)}", [of_setting[n, keep] for n in names if (n, keep) in of_setting])


def show_corpora(title: str, rows: list[dict[str, Any]]) -> None:
    """Nats of every corpus with their standard errors over windows; then less those of `best` on the same windows."""
    corpora = list(rows[0]["nats"])
    print(f"\n{title}, nats\n")
    print(row_of("", ["file", *corpora]) + "\n" + row_of("---", ["---"] * (1 + len(corpora))))
    base = next((row for row in rows if row["key"][1] == "best"), None)
    for row in rows:
        cells = [spread(row["nats"][corpus]) for corpus in corpora]
        print(row_of(row["key"][1], [f"{row['share']:.3f}", *cells]))
    for row in rows:
        if base is not None and row is not base:
            pairs = [zip(row["nats"][corpus], base["nats"][corpus], strict=True) for corpus in corpora]
            cells = [spread([ours - theirs for ours, theirs in pair]) for pair in pairs]
            print(row_of(f"{row['key'][1]} less best", ["", *cells]))


def setting_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """(model, samples, calibration text, ...) of a row: all of its key but the variant and its keep."""
    model, _, _, *others = row["key"]
    return model, *others


def heading(keep: float | None) -> str:
    return "of one size" if keep is None else f"keep {keep}"


def row_of(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def both(values: dict[str, list[float]]) -> str:
    """The value in the domain, which comes first, and the mean over the other corpora."""
    own, *others = (mean_and_error(windows)[0] for windows in values.values())
    return f"{own:.4f} / {sum(others) / len(others):.4f}"


class Comparison:
    """One model, its texts, and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        texts = ("builtin/prose", "builtin/code") if arguments.data is None else NSVD_TEXTS
        self.own = texts[0]
        self.calibration: str = arguments.calibration or self.own
        self.model = eckart.load_model(arguments.model, dtype="float32")
        self.texts = Texts(
            self.model,
            eckart.load_tokenizer(arguments.model),
            texts,
            arguments.data,
            windows=arguments.windows,
            length=arguments.length,
        )
        self.dense_bytes = weight_bytes(self.model, plan(self.model, 1.0))
        self.rows: list[dict[str, Any]] = read_lines(arguments.out)

    def run(self, variants: dict[str, dict[str, Any]], keeps: Any, counts: Any) -> None:
        print(
            f"{self.arguments.model}: calibrated on {self.calibration}; nats over dense, in domain / out of it (KL)",
            flush=True,
        )
        for samples in counts:
            for keep in keeps:
                for name, keys in variants.items():
                    alone = name.startswith(OF_ONE_SIZE)
                    row = self.find(name, None if alone else keep, samples)
                    show_row(row or self.measure(name, keys, None if alone else keep, samples))

    def key(self, name: str, keep: float | None, samples: int) -> list[Any]:
        """What a row is of. Two studies may mean two sizes by one keep."""
        given = self.arguments
        read = [given.length, given.windows, "+".join(self.texts.rows)]
        return [str(given.model), name, keep, samples, self.calibration, "bytes" if self.of_file else "numbers", *read]

    @property
    def of_file(self) -> bool:
        """Whether a keep is of the bytes of the dense file, and not of the linears' numbers."""
        return self.arguments.study == "bytes"

    def limit(self, keep: float) -> int:
        """Bytes that every variant of a keep may take."""
        if self.of_file:
            return int(keep * self.dense_bytes)
        return weight_bytes(self.model, plan(self.model, keep))

    def find(self, name: str, keep: float | None, samples: int) -> dict[str, Any] | None:
        key = self.key(name, keep, samples)
        return next((row for row in self.rows if row["key"] == key), None)

    def measure(self, name: str, keys: dict[str, Any], keep: float | None, samples: int) -> dict[str, Any]:
        recipe = {
            "model": str(self.arguments.model),
            "dtype": "float32",
            "calibration": {"corpus": self.calibration, "samples": samples, "length": self.arguments.length},
            **keys,
        }
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            make = self._rival if name in RIVALS else self._in_bits if name in IN_BITS else self._low_rank
            compressed, facts = make(recipe, keep, Path(folder))
            facts["seconds"] = round(time.perf_counter() - start, 1)
            changes = self.texts.compare(compressed)
        row = {"key": self.key(name, keep, samples), **facts, **changes}
        self.rows.append(row)
        append_line(self.arguments.out, row)
        return row

    def _how(self) -> How:
        track = TerminalTrack(Console(stderr=True))
        return How(cache=self.arguments.cache, data=self.arguments.data, track=track)

    def _low_rank(
        self, recipe: dict[str, Any], keep: float | None, folder: Path
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The compressed model, and its share of the dense file; at most what `limit` allows."""
        assert keep is not None
        limit, out = self.limit(keep), folder / "model"
        outcome = make_checkpoint(parse_recipe({**recipe, "max_bytes": limit}), out, self._how())
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert size <= limit, f"{recipe['method']} at keep {keep}: {size} bytes are more than {limit}"
        before, after = outcome.summary.macs_per_token[:2]
        facts = {
            "share": size / self.dense_bytes,
            "macs": after / before,
            "undone": sum(not report.kept for report in outcome.passes),
        }
        return eckart.load_model(out), facts

    def _in_bits(
        self, recipe: dict[str, Any], keep: float | None, folder: Path
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model in few bits, and the share of the dense bfloat16 file that it would have in bfloat16.

        It is made in float32, as the others are: what has no codes takes twice the bytes then, and is given them.
        """
        out, whole = folder / "model", self.dense_bytes / 2
        linears = sum(site.d_out * site.d_in for site in find_sites(self.model))
        wider = 2 * (num_params(self.model) - linears)
        budget = {"keep": 1.0} if keep is None else {"max_bytes": int(keep * whole + wider)}
        outcome = make_checkpoint(parse_recipe({**recipe, **budget}), out, self._how())
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        ways = Counter(str(outcome.plan.storage(site)) for site in outcome.plan.sites)
        # Multiplied out: the same numbers, and in float32 measured in a tenth of the time.
        return eckart.export_dense(eckart.load_model(out)), {"share": (size - wider) / whole, "ways": dict(ways)}

    def _rival(
        self, recipe: dict[str, Any], keep: float | None, folder: Path
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The pruned or quantised model, and its share of the dense model's bytes, what is no code in bfloat16."""
        if keep is not None:  # of the linears' numbers, so that with the others the model has as many as it may
            linears = sum(site.d_out * site.d_in for site in find_sites(self.model))
            numbers = self.limit(keep) / 4 - (num_params(self.model) - linears)
            recipe = {**recipe, "keep": max(numbers, 1) / linears}
        compressed = make_baseline(parse_recipe(recipe), folder, self._how())
        size = sum(
            tensor_bytes(tensor) if is_traceable_wrapper_subclass(tensor) else 2 * tensor.numel()
            for tensor in compressed.parameters()
        )
        return compressed, {"share": size / (2 * num_params(self.model))}


def show_row(row: dict[str, Any]) -> None:
    _, name, keep, samples, *_ = row["key"]
    print(
        f"{samples:5d} samples  {'' if keep is None else f'keep {keep:.2f}':9s}  {name:34s} {both(row['nats'])}   "
        f"({both(row['kl'])})  {row['share']:6.3f} of the dense file  {row['seconds']:6.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
