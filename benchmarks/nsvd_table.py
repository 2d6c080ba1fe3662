"""The NSVD paper's tables in small: methods, keep 0.9 ... 0.5, shares of the first stage, in and out of the domain.

    python benchmarks/nsvd_table.py [--model MODEL --data DIR] [--out runs/nsvd.jsonl]          # Tables 1 and 4
    python benchmarks/nsvd_table.py ... --methods nsvd-i --keeps 0.8 --shares 0.99 0.9 0.75     # Table 3: k1 / k
    python benchmarks/nsvd_table.py ... --calibration "wikitext2*2+c4"                          # another text
    python benchmarks/nsvd_table.py show --out runs/nsvd.jsonl                                # and Figure 1's question

Without --data: the built-in model, calibrated on prose, evaluated on prose and code. With --data: calibrated on
WikiText-2 train, evaluated on the paper's eight texts. Rows are appended to --out as they come, and what is
there is not computed again; `show` prints what is there as Markdown:

- perplexities, and the change against asvd-i at the same size as the paper prints it (positive: better), averaged over
  the corpora other than the calibration's own;
- nats a token that a method gains over asvd-i on the same windows, with the standard error of the difference;
- whether nsvd-i's gain follows the similarity of activations (Table 2, Figure 1): a regression over corpora.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
from losing import NSVD_TEXTS, Texts, mean_and_error, spread
from measuring import append_line, read_lines
from real_models import add_model_option

import eckart
from eckart.data.mixtures import parts_of
from eckart.data.samples import read_tokens
from eckart.evals.improvement import average_improvement
from eckart.evals.similarity import read_activations, similarity
from eckart.lowrank import Factored, Method
from eckart.lowrank.catalogue import FIRST_SHARE
from eckart.models.sites import input_groups

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
BASELINE, NESTED = "asvd-i", "nsvd-i"
OTHER_LANGUAGES = ("cmrc2018", "japanese")
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method, with a share k1 / k of the first stage where it is not FIRST_SHARE."""

    method: str
    share: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.share is None else f"{self.method}, {self.share:g}"

    def build(self) -> Method:
        return eckart.build_method(self.method, {} if self.share is None else {"share": self.share})


class Table:
    """One model and one calibration text, and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, data = arguments, arguments.data
        self.calibration = arguments.calibration or ("builtin/prose" if data is None else "wikitext2")
        self.model = eckart.load_model(arguments.model, dtype="float32")
        tokenizer = eckart.load_tokenizer(arguments.model)
        names = arguments.texts or (["builtin/prose", "builtin/code"] if data is None else NSVD_TEXTS)
        self.texts = Texts(self.model, tokenizer, names, data, windows=arguments.windows, length=arguments.length)
        self.tokens = read_tokens(
            self.calibration, tokenizer, samples=arguments.samples, length=arguments.length, seed=0, data=data
        )
        self.rows: list[Row] = read_lines(arguments.out)
        self.calibrations: dict[frozenset[str], eckart.Calibration] = {}

    def run(self, variants: Sequence[Variant], keeps: Iterable[float]) -> None:
        print(f"{self.arguments.model}: {self.tokens.count} calibration tokens of {self.calibration}", flush=True)
        if self.find("dense", 1.0) is None:
            self.add("dense", 1.0, {"losses": self.texts.dense_losses(), "similarity": self.similarities()})
        for variant in variants:
            spectra: dict[str, Factored] = {}
            for keep in keeps:
                if self.find(variant.name, keep) is None:
                    self.measure(variant, keep, spectra)

    def measure(self, variant: Variant, keep: float, spectra: dict[str, Factored]) -> None:
        start, method, candidate = time.perf_counter(), variant.build(), copy.deepcopy(self.model)
        if method.needs and method.needs not in self.calibrations:
            self.calibrations[method.needs] = eckart.calibrate(self.model, self.tokens, method)
        ranks = eckart.plan(candidate, keep)
        eckart.compress(candidate, method, ranks, self.calibrations.get(method.needs), spectra=spectra)
        spent = round(time.perf_counter() - start, 1)
        nats = self.texts.compare(candidate)["nats"]
        self.add(variant.name, keep, {"nats": nats, "seconds": spent})
        own, *others = (mean_and_error(windows)[0] for windows in nats.values())
        print(
            f"{keep:.2f} {variant.name:14s} {own:8.3f} / {sum(others) / len(others):8.3f} nats  {spent:6.1f} s",
            flush=True,
        )

    def similarities(self) -> dict[str, float]:
        """{corpus: cosine between mean inputs on it and on the calibration text}."""
        activations = read_activations(self.model, self.tokens, input_groups(self.model))
        return {
            name: similarity(self.model, activations, windows.flatten(), length=windows.shape[1]).value
            for name, windows in self.texts.rows.items()
        }

    def find(self, name: str, keep: float) -> Row | None:
        key = [*self.setting, name, keep]
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, name: str, keep: float, facts: Row) -> None:
        row = {"key": [*self.setting, name, keep], **facts}
        self.rows.append(row)
        append_line(self.arguments.out, row)

    @property
    def setting(self) -> list[Any]:
        """What rows are of, but for their method and size."""
        given = self.arguments
        texts = "+".join(self.texts.rows)
        return [str(given.model), self.calibration, given.samples, given.length, given.windows, texts]


def show(rows: list[Row]) -> None:
    """The tables of every model and calibration text that there are rows of."""
    for setting in dict.fromkeys(tuple(row["key"][:-2]) for row in rows):
        model, calibration, samples, length, windows, _ = setting
        of_setting = [row for row in rows if tuple(row["key"][:-2]) == setting]
        some = {tuple(row["key"][-2:]): row for row in sorted(of_setting, key=lambda row: -row["key"][-1])}
        dense = some.pop(("dense", 1.0))
        print(f"\n{Path(model).name}: {samples} x {length} tokens of {calibration}, {windows} windows of {length}")
        own = [corpus for corpus in dense["losses"] if corpus in parts_of(calibration)]
        show_perplexities(some, dense, own)
        show_gains(some, list(dense["losses"]))
        show_regressions(some, dense["similarity"])


def show_perplexities(rows: dict[tuple[str, float], Row], dense: Row, own: Sequence[str]) -> None:
    losses = {corpus: mean_and_error(windows)[0] for corpus, windows in dense["losses"].items()}
    print("\nperplexity\n")
    print(line_of("keep", "method", [*losses, "outside"]) + "\n" + line_of("---", "---", ["---"] * (1 + len(losses))))
    print(line_of("1.0", "dense", [*(f"{math.exp(loss):.4g}" for loss in losses.values()), ""]))

    def perplexities(row: Row) -> dict[str, float]:
        return {c: math.exp(losses[c] + mean_and_error(windows)[0]) for c, windows in row["nats"].items()}

    for (name, keep), row in rows.items():
        values, outside = perplexities(row), ""
        if (BASELINE, keep) in rows:
            outside = f"{average_improvement(values, perplexities(rows[BASELINE, keep]), in_domain=own):+.1%}"
        print(line_of(f"{keep:g}", name, [*(f"{value:.4g}" for value in values.values()), outside]))


def show_gains(rows: dict[tuple[str, float], Row], corpora: Sequence[str]) -> None:
    print(f"\nnats gained over {BASELINE}\n")
    print(line_of("keep", "method", corpora) + "\n" + line_of("---", "---", ["---"] * len(corpora)))
    for (name, keep), row in rows.items():
        if name != BASELINE and (BASELINE, keep) in rows:
            gained = [spread(gains(rows[BASELINE, keep], row, corpus)) for corpus in corpora]
            print(line_of(f"{keep:g}", name, gained))


def show_regressions(rows: dict[tuple[str, float], Row], similarities: dict[str, float]) -> None:
    """Of each size, the line through nsvd-i's gain in nats over similarity, a point a corpus."""
    if len(similarities) < 3:
        return
    print("\nsimilarity\n")
    print(line_of("", "", list(similarities)) + "\n" + line_of("---", "---", ["---"] * len(similarities)))
    print(line_of("", "cosine", [f"{value:.3f}" for value in similarities.values()]))
    print(f"\n{NESTED}'s gain over similarity, a point a corpus\n")
    titles = ["nats a unit of similarity", "p", "r²", "Spearman", "p"]
    print(line_of("keep", "share, over", titles) + "\n" + line_of("---", "---", ["---"] * len(titles)))
    english = [corpus for corpus in similarities if corpus not in OTHER_LANGUAGES]
    for (name, keep), row in rows.items():
        if name.startswith(NESTED) and (BASELINE, keep) in rows:
            share = name.removeprefix(NESTED).lstrip(", ") or f"{FIRST_SHARE:g}"
            for over, corpora in (("all", list(similarities)), ("English", english)):
                gained = [mean_and_error(gains(rows[BASELINE, keep], row, corpus))[0] for corpus in corpora]
                alike = [similarities[corpus] for corpus in corpora]
                line, order = scipy.stats.linregress(alike, gained), scipy.stats.spearmanr(alike, gained)
                cells = [f"{line.slope:.2f} ± {line.stderr:.2f}", f"{line.pvalue:.3f}", f"{line.rvalue**2:.2f}"]
                cells += [f"{order.statistic:.2f}", f"{order.pvalue:.3f}"]
                print(line_of(f"{keep:g}", f"{share}, {over}", cells))


def gains(base: Row, row: Row, corpus: str) -> list[float]:
    """Nats that a row is better than another one, window by window."""
    return [theirs - ours for theirs, ours in zip(base["nats"][corpus], row["nats"][corpus], strict=True)]


def line_of(first: str, second: str, cells: Sequence[str]) -> str:
    return f"| {first} | {second} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=["table", "show"], default="table")
    add_model_option(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", nargs="+", help="corpora; default: the paper's, without --data built-in text")
    parser.add_argument("--calibration", help="text or mixture; default: WikiText-2, without --data built-in prose")
    parser.add_argument("--methods", nargs="+", default=list(eckart.METHODS))
    parser.add_argument("--shares", type=float, nargs="+", help="k1 / k of the nested methods; default 0.95")
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="windows read of each corpus")
    parser.add_argument("--out", type=Path, help="JSON lines; a stopped run goes on from it")
    arguments = parser.parse_args()
    if arguments.study == "show":
        show(read_lines(arguments.out))
        return
    variants = [Variant(BASELINE)]
    for name in arguments.methods:
        nests = eckart.build_method(name).residual is not None
        shares = arguments.shares if nests and arguments.shares else [FIRST_SHARE]
        variants += [Variant(name, None if share == FIRST_SHARE else share) for share in shares]
    table = Table(arguments)
    table.run(list(dict.fromkeys(variants)), arguments.keeps)
    show([row for row in table.rows if row["key"][:-2] == table.setting])


if __name__ == "__main__":
    main()
