"""PackedInt4: a weight in four bits, two numbers to a byte. Importing this file imports torchao.

torchao's int4 formats with kernels of their own need a certain device, type and width; its general one spends a byte on
each number. This holds the numbers of the general one in the bytes that four bits take, on any device and for any
width, and multiplies by unpacking: right for comparing quality at equal bytes, of no use for speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.utils import TorchAOBaseTensor

# Codes are -8 ... 7; a nibble holds 0 ... 15.
OFFSET = 8


class PackedInt4(TorchAOBaseTensor):
    """A (d_out, d_in) weight: (code - zero_point) scale.

    Tensors:
        codes: (d_out d_in / 2,) uint8, rounded up; even indices in the low four bits, rows one after the other.
        scale: (d_out, d_in / group), of the type of the weight.
        zero_point: (d_out, d_in / group) int8.
    """

    tensor_data_names = ["codes", "scale", "zero_point"]  # noqa: RUF012 (read by the base class as it is)
    tensor_attribute_names = ["shape"]  # noqa: RUF012

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __new__(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, shape: torch.Size) -> PackedInt4:
        return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, shape, dtype=scale.dtype, device=codes.device, requires_grad=False
        )

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.codes, self.scale, self.zero_point = codes, scale, zero_point

    @classmethod
    def pack(cls, weight: IntxUnpackedToInt8Tensor) -> PackedInt4:
        """The same numbers, two to a byte."""
        codes = (weight.qdata + OFFSET).to(torch.uint8).flatten()
        if len(codes) % 2:
            codes = nn.functional.pad(codes, (0, 1))
        return cls(codes[::2] | codes[1::2] << 4, weight.scale, weight.zero_point, weight.shape)

    def dequantize(self) -> Tensor:
        """The weight as ordinary numbers, (d_out, d_in)."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten()[: self.shape.numel()]
        groups = codes.view(*self.scale.shape, -1).to(torch.int16) - OFFSET - self.zero_point[..., None]
        return (groups.to(self.scale.dtype) * self.scale[..., None]).view(self.shape)


@PackedInt4.implements_torch_function(nn.functional.linear)
def _linear(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, *bias = args
    return nn.functional.linear(x, weight.dequantize().to(x.dtype), *bias, **(kwargs or {}))
