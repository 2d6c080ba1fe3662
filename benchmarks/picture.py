"""Draw docs/demo.svg from the demo's table, or docs/bytes-MODEL.svg from the rows of `quality.py bytes`.

eckart demo --out runs/demo.json && python benchmarks/picture.py runs/demo.json docs/demo.svg
python benchmarks/quality.py bytes --model smollm2 --data DATA --out runs/bytes.jsonl
python benchmarks/picture.py runs/bytes.jsonl docs/bytes-smollm2.svg [--measure kl]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from losing import mean_and_error
from matplotlib.axes import Axes
from measuring import read_lines

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "eckart"  # the same table gives the same file

PANELS = (("in_domain", "prose: the calibration domain"), ("out_of_domain", "code: out of it"))
MEASURES = {"nats": "nats a token over dense", "kl": "KL(dense || compressed), nats a token"}
# Distinguishable without colour as well, and for readers who see red and green alike.
STYLES = {
    "svd": ("#777777", "o", ":"),
    "asvd-0": ("#d98200", "s", "--"),
    "asvd-i": ("#0067b8", "^", "-"),
    "nsvd-i": ("#9b2fae", "v", "-"),
    "sfsd": ("#00795c", "D", "-"),
    "best": ("#c0143c", "*", "-"),
    "llm-pruner": ("#5a3d2b", "P", "--"),
    "int8": ("black", "s", ""),
    "int4, 32": ("black", "^", ""),
    "int4, 64": ("black", "v", ""),
    "int4, 128": ("black", "D", ""),
    "nearest 4, 64": ("#777777", "v", ""),
    "nearest 3, 64": ("#777777", "x", ""),
    "compensated 4, 64": ("#0067b8", "v", ""),
    "compensated 3, 64": ("#0067b8", "x", ""),
    "best, bits auto": ("#c0143c", "P", "--"),
    "best, 8 bits": ("#c0143c", "s", ":"),
    "best, 4 bits": ("#c0143c", "v", ":"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--measure", choices=list(MEASURES), default="nats", help="of bytes")
    given = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if given.source.suffix == ".jsonl":
        draw_bytes(read_lines(given.source), axes, given.measure)
    else:
        draw_demo(json.loads(given.source.read_text()), axes)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(given.target, metadata={"Date": None})


def draw_demo(rows: list[dict[str, Any]], axes: Sequence[Axes]) -> None:
    """Perplexity against the share of each linear kept."""
    dense = next(row for row in rows if row["method"] == "dense")
    for axis, (column, title) in zip(axes, PANELS, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
            draw_line(axis, method, [(row["keep"], row[column]) for row in rows if row["method"] == method])
        axis.axhline(dense[column], color="black", linewidth=1, label="dense")
        axis.set(xlabel="keep (share of each linear kept)", ylabel="perplexity", title=title)
        axis.invert_xaxis()


def draw_bytes(rows: list[dict[str, Any]], axes: Sequence[Axes], measure: str) -> None:
    """What was lost against the size of the file."""
    first, *others = rows[0][measure]
    titles = (first, f"mean of {len(others)} other texts")
    for number, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for name in dict.fromkeys(row["key"][1] for row in rows):
            points = [(row["share"], losses_of(row[measure])[number]) for row in rows if row["key"][1] == name]
            draw_line(axis, name, points)
        axis.set(xlabel="bytes of the dense file in bfloat16", ylabel=MEASURES[measure], title=title)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.invert_xaxis()


def losses_of(values: dict[str, list[float]]) -> tuple[float, float]:
    """(in the domain of the calibration text, the mean over the other corpora)."""
    own, *others = (mean_and_error(windows)[0] for windows in values.values())
    return own, statistics.fmean(others)


def draw_line(axis: Axes, name: str, points: list[tuple[float, float]]) -> None:
    colour, marker, line = STYLES.get(name, (None, "x", "-"))
    x, y = zip(*sorted(points), strict=True)
    axis.plot(x, y, color=colour, marker=marker, linestyle=line, markersize=5, label=name)


if __name__ == "__main__":
    main()
