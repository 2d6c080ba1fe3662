"""Which decomposition gives the leading left singular vectors of A T B fastest, and how exact is each?

    python benchmarks/decomposition.py [--sizes 768 2048 4096] [--condition 1e4] [--json FILE]

Prints, per size, seconds relative to the float64 SVD of the product (the baseline, timed in the same run) and the
excess of the loss at half rank over the optimum. The decision is in docs/decisions.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import scipy.linalg
import torch
from measuring import write_json
from torch import Tensor


def product(size: int, condition: float, seed: int = 0) -> Tensor:
    """W B with W Gaussian and B a root whose singular values fall geometrically from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return weight @ (basis * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64))


def svd(p: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(p, full_matrices=False)[0][:, :rank]


def svd_float32(p: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(p.float(), full_matrices=False)[0][:, :rank].double()


def eigh_of_gram(p: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(p @ p.mT)[1].flip(1)[:, :rank]


def eigh_of_gram_float32(p: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh((p @ p.mT).float())[1].flip(1)[:, :rank].double()


def top_of_gram(p: Tensor, rank: int) -> Tensor:
    size = p.shape[0]
    vectors = scipy.linalg.eigh((p @ p.mT).numpy(), subset_by_index=(size - rank, size - 1))[1]
    return torch.from_numpy(vectors.copy()).flip(1)


ROUTES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "SVD float64": svd,
    "SVD float32": svd_float32,
    "eigh(Gram) float64": eigh_of_gram,
    "eigh(Gram) float32": eigh_of_gram_float32,
    "eigh(Gram) float64, top half only": top_of_gram,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--condition", type=float, default=1e4, help="condition number of the root B")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        p, rank = product(size, arguments.condition), size // 2
        baseline = optimum = 0.0
        for name, route in ROUTES.items():
            start = time.perf_counter()
            basis = route(p, rank)
            seconds = time.perf_counter() - start
            loss = float((p - basis @ (basis.mT @ p)).square().sum())
            if not baseline:
                baseline, optimum = seconds, loss
            row = {"size": size, "route": name, "seconds": seconds, "relative_time": seconds / baseline}
            row["excess_loss"] = loss / optimum - 1
            rows.append(row)
            print(
                f"{size:5d}  {name:36s} {seconds:8.2f} s  x{row['relative_time']:.2f}  {row['excess_loss']:+.1e}",
                flush=True,
            )
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
