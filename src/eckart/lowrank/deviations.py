"""Deviations: rows of an input about a shift near their mean, and how they may be multiplied without loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.lowrank.float32 import HALF, has_units_for, is_multiplied_exactly

# Rows multiplied in float32 before the product is added in float64. Long enough for full-speed matrix products,
# short enough that float32 rounding inside one product stays near 1e-7 of it.
CHUNK_ROWS = 4096
# An input feature of 16 bits is shifted where its mean is more than so many times its spread. There x - shift has 16
# bits too, but for a few rows, and below it a sum about zero loses at most 64 times its rounding (docs/decisions.md).
DOMINANT = 8.0


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """(..., d) -> (n, d) without the masked rows."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        if mask.numel() != len(rows):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit input {tuple(x.shape)}")
        if not bool(mask.all()):
            rows = rows[mask.reshape(-1).to(rows.device)]
    return rows


def widened(rows: Tensor) -> Tensor:
    """The rows in float32, or in float64 as they are."""
    return rows if rows.dtype == torch.float64 else rows.float()


def shift_for(rows: Float[Tensor, "n in"]) -> Float[Tensor, "in"]:
    """Near the mean of the rows, zero where that is of no use, in float64.

    It has the bits of float32, of 16-bit rows those of their type, so that its difference to rows near it is exact.
    """
    rows = rows[:CHUNK_ROWS]
    mean = rows.mean(0, dtype=torch.float64)
    if rows.dtype not in HALF:
        return mean.float().double()
    spread = (rows.float() - mean.float()).square().mean(0).sqrt()
    return torch.where(mean.abs() > DOMINANT * spread, mean.to(rows.dtype).double(), torch.zeros_like(mean))


@dataclass(frozen=True)
class Deviations:
    """Some rows of an input, and what is left of them after the shift.

    Attributes:
        wide: in float32, or float64 as they came. factors: the same as they are multiplied, in the input's own type
            where a product is_multiplied_exactly.
        exact: (n,) rows whose differences have the bits of the input's type; None where all have, or it is not asked.
    """

    wide: Float[Tensor, "n in"]
    factors: Float[Tensor, "n in"]
    exact: Bool[Tensor, "n"] | None

    def times(self, roots: Float[Tensor, "n 1"]) -> Deviations:
        """Each row times a number: no 16 bits hold the products."""
        wide = self.wide * roots.to(self.wide)
        return Deviations(wide, wide, torch.zeros(len(wide), dtype=torch.bool, device=wide.device))

    @classmethod
    def of(cls, rows: Float[Tensor, "n in"], shift: Float[Tensor, "in"] | None) -> Deviations:
        wide, exact = widened(rows), None
        factors = rows
        if shift is not None:
            wide = wide - shift.to(wide)
            if has_units_for(rows):
                factors = wide.to(rows.dtype)
                exact = (factors == wide).all(1)
        return cls(wide, factors if is_multiplied_exactly(rows) else wide, exact)


def exact_parts(streams: Sequence[Deviations]) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Rows to be multiplied, of one stream or two, and whether units for 16 bits may do it.

    They may where all differences of a row have so few bits. The other rows, a handful where tokens weigh alike, are
    multiplied in float32.
    """
    known = [stream.exact for stream in streams if stream.exact is not None]
    exact = torch.stack(known).all(0) if known else None
    if exact is None or bool(exact.all()):
        yield tuple(stream.factors for stream in streams), True
        return
    if not bool(exact.any()):
        yield tuple(stream.wide for stream in streams), False
        return
    yield tuple(stream.factors[exact] for stream in streams), True
    yield tuple(stream.wide[~exact] for stream in streams), False
