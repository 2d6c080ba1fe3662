"""CodedLinear: the module that runs in place of a dense linear of which numbers are kept in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.lowrank.codes import SCALE, Block, Codes, pack, packed_rows, span, stored_bytes, unpack
from eckart.lowrank.float32 import has_units_for
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage
from eckart.models.linear import LowRankLinear

# Numbers that are multiplied out at a time: what a processor's cache holds.
AT_ONCE = 2**19
# What torch has a kernel for: 4 bits by groups of these in bfloat16, on processors with these instructions. In float32
# it takes ten times as long as multiplying out (docs/scale.md).
KERNEL_GROUPS, KERNEL_ROWS, KERNEL_PROCESSORS = (32, 64, 128, 256), 16, ("AVX2", "AVX512")
# Rows of x from which a processor with units for bfloat16, which the kernel does not use, is faster multiplying out.
ROWS_FOR_UNITS = 128


@dataclass(frozen=True, eq=False)
class _Ordered:
    """What torch's kernel reads.

    Attributes:
        sources: the codes and scales that it was made of, themselves: an address may be given away again.
        versions: theirs at the time.
        packed: the codes in the kernel's order. pairs: its scales and zero points.
    """

    sources: tuple[Tensor, Tensor]
    versions: tuple[int, ...]
    packed: Tensor
    pairs: Tensor

    def is_of(self, *sources: Tensor) -> bool:
        """Whether these are the sources, and unchanged."""
        same = all(one is other for one, other in zip(self.sources, sources, strict=True))
        return same and self.versions == tuple(map(_version, sources))


class CodedMatrix(nn.Module):
    """x -> x Mᵀ with M (d_out, d_in) in few bits.

    M is multiplied out, in x's type, at every call, some rows at a time; or torch's kernel reads the codes, which wants
    them in an order of its own: a copy as large as they are, made at the first call and never stored.

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
        self._ordered: _Ordered | None = None

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
        if self._has_kernel(x):
            return self._by_kernel(x)
        down, d_in = self.block[0], self.in_features
        together = max(AT_ONCE // d_in // down, 1) * down
        if together >= self.out_features or d_in % 8:
            return linear(x, self.dense(x.dtype))
        parts = []
        for start in range(0, self.out_features, together):
            rows = slice(start, min(start + together, self.out_features))
            codes = unpack(packed_rows(self.codes, self.bits, d_in, rows), self.bits, (rows.stop - start, d_in))
            scales = self.scales[start // down : -(-rows.stop // down)]
            parts.append(linear(x, Codes(codes, scales, self.bits, self.block).dense(x.dtype)))
        return torch.cat(parts, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedMatrix:
        """As of every module, but a change of type leaves the scales: codes were chosen for them as they are."""
        before = self.scales
        self._ordered = None
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ordered = None
        super()._load_from_state_dict(*args, **kwargs)

    def _has_kernel(self, x: Tensor) -> bool:
        down, across = self.block
        return (
            self.bits == 4
            and x.dtype == torch.bfloat16
            and x.is_cpu
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.compiler.is_compiling()
            and down == 1
            and across in KERNEL_GROUPS
            and self.in_features % across == 0
            and self.out_features % KERNEL_ROWS == 0
            and torch.backends.cpu.get_cpu_capability() in KERNEL_PROCESSORS
            and not (x.numel() >= ROWS_FOR_UNITS * self.in_features and has_units_for(x))
        )

    def _by_kernel(self, x: Tensor) -> Tensor:
        if self._ordered is None or not self._ordered.is_of(self.codes, self.scales):
            codes = unpack(self.codes, self.bits, (self.out_features, self.in_features)).to(torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes - span(self.bits)[0], 1)  # noqa: SLF001
            scales = self.scales.mT
            pairs = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
            sources = (self.codes, self.scales)
            self._ordered = _Ordered(sources, tuple(map(_version, sources)), packed, pairs)
        packed, pairs = self._ordered.packed, self._ordered.pairs
        rows = x.reshape(-1, self.in_features).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, self.block[1], pairs)  # noqa: SLF001
        return y.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ordered": None}

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


# What runs in place of a dense linear.
CompressedLinear: TypeAlias = LowRankLinear | CodedLinear


def _version(tensor: Tensor) -> int:
    """Counts the changes of a tensor's numbers, but for those through `.data`, and those of inference mode's tensors.

    A state that is loaded makes the copy anew in any case.
    """
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def _numbers(side: CodedMatrix | nn.Linear, dtype: torch.dtype) -> Tensor:
    return side.dense(dtype) if isinstance(side, CodedMatrix) else side.weight.to(dtype)
