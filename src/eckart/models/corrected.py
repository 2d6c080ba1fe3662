"""CorrectedLinear: a quantised linear and the low-rank correction of it, side by side, as an adapter runs them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from eckart.lowrank import Factors


class CorrectedLinear(nn.Module):
    """`x -> base(x) + left (right x)`: what PEFT's LoRA layer computes at scaling 1, and in its types.

    Args:
        base: (..., d_in) -> (..., d_out), of any kind.
        factors: without a bias; of the numbers that the adapter stores. They are multiplied in float32, or in their
            own type where that is wider.
    """

    def __init__(self, base: nn.Module, factors: Factors) -> None:
        super().__init__()
        self.base = base
        dtype = torch.promote_types(factors.left.dtype, torch.float32)
        self.register_buffer("left", factors.left.to(dtype))
        self.register_buffer("right", factors.right.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.base(x))
        left, right = cast(Tensor, self.left), cast(Tensor, self.right)
        correction = nn.functional.linear(nn.functional.linear(x.to(right.dtype), right), left)
        return (y + correction).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The base's, where others look for a linear's device and type."""
        return cast(Tensor, self.base.weight)
