"""Bands: a map's matrix some rows at a time, in float64, so that neither it nor a factor is ever there whole in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# Bytes of a band in float64: large enough for full-speed products, small beside a large model's weights.
BYTES = 2**27
# Columns of the left factor that are taken to float64 at a time, and rows of the right one.
TOGETHER = 512


def bands(d_out: int, d_in: int) -> Iterator[slice]:
    """The places of the bands, from the top, of BYTES each."""
    rows = max(1, BYTES // (8 * d_in))
    for start in range(0, d_out, rows):
        yield slice(start, min(start + rows, d_out))


def wide_product(left: Float[Tensor, "n rank"], right: Float[Tensor, "rank in"]) -> Float[Tensor, "n in"]:
    """left right in float64. Cost: 2 n rank d_in operations, and the memory of the product."""
    product = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64, device=left.device)
    for some, others in zip(left.split(TOGETHER, 1), right.split(TOGETHER), strict=True):
        product.addmm_(some.double(), others.double())
    return product
