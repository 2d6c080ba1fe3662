"""CodedLinear: the module that runs in place of a dense linear of which numbers are kept in few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.lowrank.codes import SCALE, Block, Codes, pack, stored_bytes, unpack
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage


class CodedMatrix(nn.Module):
    """x -> x Mᵀ with M (d_out, d_in) in few bits. M is multiplied out, in x's type, at every call.

    Tensors:
        `codes` uint8, packed as `lowrank.codes.pack` does: bits for every eight numbers.
        `scales` (blocks down, blocks across) bfloat16.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block: Block,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.block = in_features, out_features, bits, block
        count = -(-in_features * out_features // 8) * bits
        down, across = -(-out_features // block[0]), -(-in_features // block[1])
        self.register_buffer("codes", torch.zeros(count, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(down, across, dtype=SCALE, device=device))

    @classmethod
    def of(cls, codes: Codes, *, device: torch.device | None = None) -> CodedMatrix:
        """The module of these codes."""
        made = cls(codes.shape[1], codes.shape[0], codes.bits, codes.block, device="meta").to_empty(
            device=device or codes.codes.device
        )
        with torch.no_grad():
            made.codes.copy_(pack(codes.codes, codes.bits))
            made.scales.copy_(codes.scales)
        return made

    @property
    def coded_params(self) -> int:
        """Numbers that it represents; `support.sizes` counts them."""
        return self.in_features * self.out_features

    @property
    def coded_bytes(self) -> int:
        """Bytes of its codes and scales."""
        return stored_bytes(self.out_features, self.in_features, self.bits, self.block)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(d_out, d_in): M in a type, rounded once."""
        shape = (self.out_features, self.in_features)
        return Codes(unpack(self.codes, self.bits, shape), self.scales, self.bits, self.block).dense(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dense(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, block={self.block}"


class CodedLinear(nn.Module):
    """y = base(x) + left(right(x)) + bias, in few bits; base or factors may be absent, not both.

    Tensors, by the name of the linear it replaces:
        `base.codes`, `base.scales`: a quantised weight.
        `right`, `left`: the factors, each a `CodedMatrix`, or an nn.Linear where they keep the model's type.
        `bias` (d_out,): the dense linear's own, and what the method added.
        `weight` (0,): an empty tensor under the dense linear's key, as in `LowRankLinear`.

    Args:
        rank: 0 for a quantised weight alone.

    Raises:
        ValueError: neither a base nor a rank.
    """

    # As of a `LowRankLinear` in the plain layout with factors of its own.
    pivots: None = None
    order: None = None
    lender: None = None

    weight: Tensor
    base: CodedMatrix | None
    left: CodedMatrix | nn.Linear | None
    right: CodedMatrix | nn.Linear | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        storage: Storage,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 0 or (rank == 0 and storage.base is None):
            raise ValueError(f"rank {rank} without a quantised weight is nothing")
        self.in_features, self.out_features, self.rank, self.storage = in_features, out_features, rank, storage
        group = storage.group
        self.base = self.left = self.right = None
        if storage.base is not None:
            self.base = CodedMatrix(in_features, out_features, storage.base, (1, group), device=device)
        if rank and storage.factors is not None:
            self.right = CodedMatrix(in_features, rank, storage.factors, (1, group), device=device)
            self.left = CodedMatrix(rank, out_features, storage.factors, (group, 1), device=device)
        elif rank:
            self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            self.left = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_coded(
        cls,
        coded: CodedFactors,
        bias: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CodedLinear:
        """The module that computes `coded`, with the dense layer's own `bias` (d_out,) added to the method's."""
        biases = [each.double().to(device) for each in (bias, coded.bias) if each is not None]
        made = cls(coded.d_in, coded.d_out, coded.rank, coded.storage, bias=bool(biases), device="meta", dtype=dtype)
        made = made.to_empty(device=device)
        with torch.no_grad():
            for name in ("base", "left", "right"):
                given, place = getattr(coded, name), getattr(made, name)
                if isinstance(given, Codes):
                    setattr(made, name, CodedMatrix.of(given, device=device))
                elif given is not None:
                    place.weight.copy_(given)
            if made.bias is not None:
                made.bias.copy_(sum(biases[1:], start=biases[0]))
        return made

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.base is None else self.base(x)
        if self.right is not None and self.left is not None:
            added = self.left(self.right(x))
            y = added if y is None else y + added
        assert y is not None
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """The matrix (d_out, d_in), multiplied in float32 or better and rounded once to the model's type."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        total = None if self.base is None else self.base.dense(wide)
        if self.right is not None and self.left is not None:
            product = _numbers(self.left, wide) @ _numbers(self.right, wide)
            total = product if total is None else total + product
        assert total is not None
        return total.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {self.storage}"


def _numbers(side: CodedMatrix | nn.Linear, dtype: torch.dtype) -> Tensor:
    return side.dense(dtype) if isinstance(side, CodedMatrix) else side.weight.to(dtype)
