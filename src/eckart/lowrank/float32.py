"""Float32: matrix products without the shortcuts that torch may take, and with those that lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

# Columns of a symmetric product that are computed at a time, with themselves and those on one side: (1 + 512 / d) / 2
# of the work for d columns. Wider saves less, narrower slows the products (docs/decisions.md).
COLUMNS = 512


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products inside keep all 24 bits of float32: TF32 (11 bits) is off and put back afterwards."""
    with _precision("highest"):
        yield


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """Float32 products of the numbers in `x`, inside, lose nothing: each product of two is exact, or rounded once.

    A bfloat16 number has 8 bits, in float32 as well. A processor that multiplies bfloat16 and adds in float32 gives
    exactly the float32 products of such numbers, several times as fast; there, and for such an input only, it may.
    Anything else is multiplied in `full_float32`.
    """
    units = torch.cpu.get_capabilities()
    exact = x.dtype == torch.bfloat16 and x.device.type == "cpu" and (units.get("amx_bf16") or units.get("avx512_bf16"))
    with _precision("medium" if exact else "highest"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """Add rows^T rows to the upper block triangle of `total`, in place. `mirror` makes it whole."""
    for start in range(0, len(total), COLUMNS):
        stop = start + COLUMNS
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def mirror(total: Float[Tensor, "d d"]) -> None:
    """Copy the upper block triangle of a symmetric matrix to the lower one, in place."""
    for start in range(0, len(total), COLUMNS):
        stop = start + COLUMNS
        total[stop:, start:stop] = total[start:stop, stop:].T


def lower_gram(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """first second^T, known to be symmetric: its lower block triangle, which is all that an eigensolver reads.

    Above it there are zeros.
    """
    gram = first.new_zeros(len(first), len(first))
    for start in range(0, len(first), COLUMNS):
        stop = start + COLUMNS
        torch.mm(first[start:stop], second[:stop].T, out=gram[start:stop, : min(stop, len(first))])
    return gram
