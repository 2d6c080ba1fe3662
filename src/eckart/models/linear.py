"""LowRankLinear: the module that runs in place of a dense linear."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from eckart.lowrank import Factors, Pivoted
from eckart.models.matmul import bare_weights, combine, reorder, run
from eckart.models.shared_product import SharedProduct


class LowRankLinear(nn.Module):
    """y = left(right(x)) + bias; pivoted, y = [p, left(p)] in the order `order`, plus bias, with p = right(x).

    Tensors, by the name of the linear it replaces:
        `right.weight` (rank, d_in), `left.weight` (d_out, rank): children are ordinary nn.Linear, so that adapters and
            quantisers find them. Pivoted, `right` holds the pivot rows and `left` (d_out - pivots, rank) the
            coefficients of this linear's other rows.
        `order` (d_out,) int32, only where pivoted: where each output is. An integer type passes through
            half() and to(bfloat16) as it is; 32 bits are half the bytes of 64 and index as fast.
        `bias` (d_out,), where the dense linear has its own, because serving runtimes look for it there.
        `weight` (0,): an empty tensor under the dense linear's key. A loader that does not know eckart compares it with
            the dense shape and stops, instead of building a dense model with random weights. Model code that reads
            `.weight` for its type finds the right one.

    Linears that read one tensor can share the right factor: one of them, the lender, has it as a child, and the
    borrowers look it up there at every call, so that it is stored once, moves once, and an adapter put around it serves
    all. Its product with an input is computed once, see `SharedProduct`. `right` returns it for each of them, but
    `parameters()` only for the lender. Borrowers have to stay on the lender's device: nn.DataParallel, which copies
    modules separately, is not for them.

    Args:
        pivots: how many of its rows are pivots (rank, unless the pivots are shared), or None for the plain layout.
        right_of: the linear whose right factor it shares, or None for one of its own.

    Raises:
        ValueError: the rank is not positive, there are more pivots than rows or than rank, or the lender has another
            width, rank or layout.
    """

    order: Tensor | None
    lender: LowRankLinear | None
    product: SharedProduct

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        pivots: int | None = None,
        right_of: LowRankLinear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} is not positive")
        if pivots is not None and not 0 <= pivots <= min(rank, out_features):
            raise ValueError(f"{pivots} pivots are not in 0 ... {min(rank, out_features)}, the rank or the rows")
        self.in_features, self.out_features, self.rank, self.pivots = in_features, out_features, rank, pivots
        lender = None if right_of is None else right_of.lender or right_of
        # Put where nn.Module does not register it: the lender's tensors are not this module's.
        self.__dict__["lender"] = lender
        self.product = SharedProduct()
        if lender is None:
            self.register_module("right", nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype))
        else:
            _check_lender(lender, self)
            lender.product.readers += 1
        with warnings.catch_warnings():
            # Where every row is a pivot there are no coefficients, and nothing to initialise.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.left = nn.Linear(rank, out_features - (pivots or 0), bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        order = None
        if pivots is not None:
            # Some valid order, pivots first, until that of the factors is copied or loaded.
            entries = torch.arange(out_features, dtype=torch.int32, device=device)
            order = torch.where(entries < pivots, entries, entries + (rank - pivots))
        self.register_buffer("order", order)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_factors(
        cls,
        factors: Factors | Pivoted,
        bias: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        right_of: LowRankLinear | None = None,
    ) -> LowRankLinear:
        """The module that computes `factors`, with the dense layer's own `bias` (d_out,) added to the factors' one.

        Args:
            right_of: the module of another member of the same `split`, whose right factor it shares.

        Raises:
            ValueError: as the class does; or the lender's right factor is another one.
        """
        pivots, order = None, None
        if isinstance(factors, Pivoted):
            left, right, pivots, order = factors.coefficients, factors.pivots, factors.own_pivots, factors.order
        else:
            left, right = factors.left, factors.right
        if right_of is not None and not torch.equal(right_of.right.weight, right.to(right_of.right.weight)):
            raise ValueError("the factors' right is not the lender's: only members of one split share it")
        biases = [b.double().to(left.device) for b in (bias, factors.bias) if b is not None]
        module = cls(
            factors.d_in,
            factors.d_out,
            factors.rank,
            bias=bool(biases),
            pivots=pivots,
            right_of=right_of,
            device="meta",  # no random numbers for weights that are there
            dtype=dtype,
        ).to_empty(device=device)
        with torch.no_grad():
            module.left.weight.copy_(left)
            if right_of is None:
                module.right.weight.copy_(right)
            if module.order is not None and order is not None:
                module.order.copy_(order)
            if module.bias is not None:
                module.bias.copy_(sum(biases[1:], start=biases[0]))
        return module

    @property
    def right(self) -> nn.Linear:
        """The right factor: its own child, or the lender's."""
        if "right" in self._modules:
            return cast(nn.Linear, self._modules["right"])
        if self.lender is None:
            raise AttributeError("a LowRankLinear without a lender has no right factor yet")
        return self.lender.right

    def forward(self, x: Tensor) -> Tensor:
        # Looked up where torch keeps them: as attributes, each takes a microsecond.
        left, order, bias = cast(nn.Module, self._modules["left"]), self._buffers["order"], self.bias
        right, product = self.right, (self.lender or self).product
        alone, same_type = product.readers == 1, bias is None or bias.dtype == x.dtype
        if alone and same_type and (weights := bare_weights(x, right, left)) is not None:
            return run(weights[0], weights[1], order, bias, x)
        p = product.take(right, x, self)
        if not alone and same_type and (weights := bare_weights(p, left)) is not None:
            return combine(weights[0], p, order, bias)
        return self.rebuild(p)

    def rebuild(self, p: Tensor) -> Tensor:
        """(..., d_out): what `forward` gives where p = right(x), (..., rank)."""
        y, order, bias = self.left(p), self._buffers["order"], self.bias
        if order is not None:
            y = reorder(torch.cat((p, y), -1), order)
        return y if bias is None else y + bias

    def dense(self) -> Tensor:
        """The matrix (d_out, d_in), multiplied in float32 or better and rounded once to the stored type."""
        wide = torch.promote_types(self.left.weight.dtype, torch.float32)
        right = self.right.weight.to(wide)
        rows = self.left.weight.to(wide) @ right
        if self.order is not None:
            rows = torch.cat([right, rows])[self.order]
        return rows.to(self.left.weight.dtype)

    def extra_repr(self) -> str:
        layout = "" if self.pivots is None else f", pivots={self.pivots}"
        shared = "" if self.lender is None else ", right shared"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{layout}{shared}"


def _check_lender(lender: LowRankLinear, borrower: LowRankLinear) -> None:
    """Raises ValueError where the two cannot share a right factor."""
    ours, theirs = (
        f"rank {one.rank}, d_in {one.in_features}, {'plain' if one.pivots is None else 'pivoted'}"
        for one in (borrower, lender)
    )
    if ours != theirs:
        raise ValueError(f"a linear of {ours} cannot share the right factor of one of {theirs}")
