"""Draw docs/demo.svg from the demo's table.

eckart demo --out runs/demo.json && python benchmarks/picture.py runs/demo.json docs/demo.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "eckart"  # the same table gives the same file

PANELS = (("in_domain", "prose: the calibration domain"), ("out_of_domain", "code: out of it"))
# Distinguishable without colour as well, and for readers who see red and green alike.
STYLES = {
    "svd": ("#777777", "o", ":"),
    "asvd-0": ("#d98200", "s", "--"),
    "asvd-i": ("#0067b8", "^", "-"),
    "nsvd-i": ("#9b2fae", "v", "-"),
    "sfsd": ("#00795c", "D", "-"),
}


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    rows = json.loads(source.read_text())
    dense = next(row for row in rows if row["method"] == "dense")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (column, title) in zip(axes, PANELS, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
            points = sorted((row["keep"], row[column]) for row in rows if row["method"] == method)
            colour, marker, line = STYLES.get(method, (None, "x", "-"))
            keeps, values = zip(*points, strict=True)
            axis.plot(keeps, values, color=colour, marker=marker, linestyle=line, markersize=5, label=method)
        axis.axhline(dense[column], color="black", linewidth=1, label="dense")
        axis.set(xlabel="keep (share of each linear kept)", ylabel="perplexity", title=title)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
