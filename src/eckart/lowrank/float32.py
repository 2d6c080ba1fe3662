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
# The same where a product is not kept but summed up, so that its blocks stay in a cache.
TRACED_COLUMNS = 256
# The same on a GPU, where a narrow product leaves units idle.
GPU_COLUMNS = 2048
# Capabilities of GPUs that do half as many float64 operations as float32 ones: P100, V100, A100, H100 and H200, B200.
FAST_IN_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
# Types of 16 bits: the product of two such numbers has at most 22, and float32 holds it.
HALF = (torch.float16, torch.bfloat16)


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
    with _precision("medium" if x.device.type == "cpu" and has_units_for(x) else "highest"):
        yield


def has_units_for(x: Tensor) -> bool:
    """Whether the device multiplies numbers of this type as they are, of 16 bits, and adds in float32."""
    if x.device.type != "cpu":
        return is_multiplied_exactly(x)
    units = torch.cpu.get_capabilities()
    return x.dtype == torch.bfloat16 and bool(units.get("amx_bf16") or units.get("avx512_bf16"))


@contextmanager
def products_as_stored(x: Tensor) -> Iterator[None]:
    """Float32 products of a model that is stored as `x` is may take TF32 inside, on a GPU, where that has 16 bits.

    TF32 has 11 bits, as float16 has, and more than bfloat16; a GPU multiplies it several times as fast.
    """
    with _precision("high" if is_multiplied_exactly(x) else torch.get_float32_matmul_precision()):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_fast_in_float64(device: torch.device) -> bool:
    """Whether the device is as good as fast in float64 as in float32: a GPU for data centres, by its capability.

    On an H200 an eigenproblem of size 4096 takes 0.11 s, and 0.09 s in float32, which has to be checked then.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FAST_IN_FLOAT64


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """Add rows^T rows to the upper block triangle of `total`, in place. `mirror` makes it whole.

    Products are taken where the rows are; `total` may be in main memory, and of another float type.
    """
    columns = COLUMNS if rows.device.type == "cpu" else GPU_COLUMNS
    alike = (rows.dtype, rows.device) == (total.dtype, total.device)
    for start in range(0, len(total), columns):
        stop = start + columns
        first, second = rows[:, start:stop], rows[:, start:]
        if alike:  # no product of its own in memory
            total[start:stop, start:].addmm_(first.T, second)
        else:
            total[start:stop, start:] += inner_product(first, second).to(total.device)


def is_multiplied_exactly(x: Tensor) -> bool:
    """Whether `inner_product` takes this as it is stored: 16 bits, on a device that adds exact products in float32."""
    return x.dtype in HALF and x.device.type == "cuda"


def inner_product(first: Float[Tensor, "n a"], second: Float[Tensor, "n b"]) -> Float[Tensor, "a b"]:
    """first^T second in float32 or better. Numbers of 16 bits are taken where they `is_multiplied_exactly`."""
    if is_multiplied_exactly(first) and is_multiplied_exactly(second):
        return torch.mm(first.T, second, out_dtype=torch.float32)
    return first.T @ second


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


def symmetric_trace(matrix: Float[Tensor, "n d"], symmetric: Float[Tensor, "d d"]) -> float:
    """trace(A S A^T) with a symmetric S, as the sum of A^T A times S entry by entry, of which half are computed.

    Products are taken in the matrix's type, sums in float64; S may be of another type.
    """
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[1], TRACED_COLUMNS):
        place = slice(start, min(start + TRACED_COLUMNS, matrix.shape[1]))
        total += partial_trace(matrix, symmetric[place], place)
    return float(total)


def partial_trace(matrix: Float[Tensor, "n d"], rows: Float[Tensor, "k d"], place: slice) -> Float[Tensor, ""]:
    """What some rows of S, and the columns of the same numbers, add to trace(A S A^T) as `symmetric_trace` takes it.

    Args:
        place: of the rows in S. Those of all places add up to the trace.
    """
    product = matrix[:, place].T @ matrix[:, : place.stop]
    products = (product.double() if product.dtype != rows.dtype else product) * rows[:, : place.stop]
    return 2 * products.sum(dtype=torch.float64) - products[:, place.start :].sum(dtype=torch.float64)
