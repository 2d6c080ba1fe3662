"""Factors: a low-rank linear map as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.bands import wide_product


@dataclass(frozen=True)
class Factors:
    """The linear map `x -> left (right x) + bias`, never multiplied out.

    Attributes:
        left: (d_out, rank).
        right: (rank, d_in).
        bias: (d_out,) or None. A correction that comes on top of the layer's own bias, not instead of it.

    Factors add: `a + b` is the map `x -> a(x) + b(x)`, stored as one pair of rank `a.rank + b.rank`
    ([L1 L2], [R1; R2]), which is how a nested decomposition becomes an ordinary one.

    Raises:
        ValueError: the shapes do not fit together.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    bias: Float[Tensor, "out"] | None = None

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not chain: "
                "expected (d_out, rank) and (rank, d_in)"
            )
        if self.bias is not None and self.bias.shape != (self.d_out,):
            raise ValueError(f"bias has shape {tuple(self.bias.shape)}, expected ({self.d_out},)")

    def __repr__(self) -> str:
        bias = "" if self.bias is None else ", with a bias"
        kind = str(self.left.dtype).removeprefix("torch.")
        return f"Factors({self.d_out} x {self.d_in}, rank {self.rank}{bias}, {kind})"

    @property
    def d_out(self) -> int:
        return self.left.shape[0]

    @property
    def d_in(self) -> int:
        return self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def num_params(self) -> int:
        """Numbers stored: rank (d_out + d_in), and d_out more for a bias."""
        return self.left.numel() + self.right.numel() + (0 if self.bias is None else self.bias.numel())

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = (x @ self.right.T) @ self.left.T
        return y if self.bias is None else y + self.bias

    def __add__(self, other: Factors) -> Factors:
        if (self.d_out, self.d_in) != (other.d_out, other.d_in):
            raise ValueError(
                f"cannot add factors of a {self.d_out} x {self.d_in} map and of a {other.d_out} x {other.d_in} map"
            )
        biases = [b for b in (self.bias, other.bias) if b is not None]
        return Factors(
            left=torch.cat([self.left, other.left], dim=1),
            right=torch.cat([self.right, other.right], dim=0),
            bias=sum(biases[1:], start=biases[0]) if biases else None,
        )

    def dense(self) -> Float[Tensor, "out in"]:
        """The product `left right`. Cost: 2 rank d_out d_in operations."""
        return self.left @ self.right

    def rows(self, place: slice) -> Float[Tensor, "rows in"]:
        """Some rows of the product, in float64."""
        return wide_product(self.left[place], self.right)

    def balanced(self) -> Factors:
        """The same map with column j of left and row j of right of one length, for every j.

        A cut in an output metric has a left factor in units of one over the loss's gradient and a right one in units of
        the gradient, a million apart. Half precision would lose one of them, and the step of an optimiser, which is of
        one size for all numbers, would ruin it. A direction that is zero on either side stays as it is.
        """
        ratio = (self.right.norm(dim=1) / self.left.norm(dim=0)).sqrt()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        return Factors(self.left * ratio, self.right / ratio[:, None], self.bias)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same map in another type. Used once, when factors leave the mathematics for a model."""
        return Factors(self.left.to(dtype), self.right.to(dtype), None if self.bias is None else self.bias.to(dtype))
