"""LowRankLinear: the module that runs in place of a dense linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eckart.lowrank import Factors


class LowRankLinear(nn.Module):
    """y = left(right(x)) + bias.

    Tensors, by the name of the linear it replaces:
        `right.weight` (rank, d_in), `left.weight` (d_out, rank): children are ordinary nn.Linear, so that adapters and
            quantisers find them.
        `bias` (d_out,), where the dense linear has its own, because serving runtimes look for it there.
        `weight` (0,): an empty tensor under the dense linear's key. A loader that does not know eckart compares it with
            the dense shape and stops, instead of building a dense model with random weights. Model code that reads
            `.weight` for its type finds the right one.

    Raises:
        ValueError: the rank is not positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} is not positive")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_factors(
        cls, factors: Factors, bias: Tensor | None, *, device: torch.device, dtype: torch.dtype
    ) -> LowRankLinear:
        """The module that computes `factors`, with the dense layer's own `bias` (d_out,) added to the factors' one."""
        biases = [b.double().to(factors.left.device) for b in (bias, factors.bias) if b is not None]
        module = cls(factors.d_in, factors.d_out, factors.rank, bias=bool(biases), device=device, dtype=dtype)
        with torch.no_grad():
            module.left.weight.copy_(factors.left)
            module.right.weight.copy_(factors.right)
            if module.bias is not None:
                module.bias.copy_(sum(biases[1:], start=biases[0]))
        return module

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """left right, (d_out, d_in), multiplied in float32 or better and rounded once to the stored type."""
        wide = torch.promote_types(self.left.weight.dtype, torch.float32)
        return (self.left.weight.to(wide) @ self.right.weight.to(wide)).to(self.left.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
