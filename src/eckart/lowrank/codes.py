"""Codes: a matrix in few bits, whole numbers times a scale that a block of them shares.

    M_ij ~ c_ij s_b,   c in -2^(bits - 1) ... 2^(bits - 1) - 1,   b the block of (i, j)

Scales are bfloat16: codes are chosen for the scale as it is stored, so that its digits cost nothing, and no type that a
model is cast to takes it out of range. A scale may be negative, which puts the block's largest number on the lowest
code, and no code is wasted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

# Bits of a code. Of 16 and more there is no need: that is what a model's own type has.
BITS = (2, 3, 4, 8)
SCALE = torch.bfloat16
# Shares of the scale that spans a block, tried where few codes make it worth while to clip the largest numbers.
CLIPPED = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
# Codes of so many bits and more are not clipped: a block's largest number is within a hundredth of a step then.
FINE = 8

# Rows and columns that share a scale.
Block = tuple[int, int]


@dataclass(frozen=True)
class Codes:
    """A matrix in few bits.

    Attributes:
        codes: (d_out, d_in), whole numbers.
        scales: (blocks down, blocks across); the last block of a row or column may be smaller.
        bits: of a code. block: rows and columns that share a scale.
    """

    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, "down across"]
    bits: int
    block: Block

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def num_bytes(self) -> int:
        """Bytes stored, of codes and scales."""
        return stored_bytes(self.codes.shape[0], self.codes.shape[1], self.bits, self.block)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The matrix in a type: multiplied in float32 or better and rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        (d_out, d_in), (down, across) = self.codes.shape, self.block
        numbers, scales = self.codes.to(wide), self.scales.to(wide)
        if down == 1 and d_in % across == 0:  # a view of each block, without a scale for every number
            numbers.view(d_out, -1, across).mul_(scales[:, :, None])
        elif across == 1 and d_out % down == 0:
            numbers.view(-1, down, d_in).mul_(scales[:, None, :])
        else:
            numbers.mul_(spread(scales, self.codes.shape, self.block))
        return numbers.to(dtype)

    def rows(self, place: slice) -> Float[Tensor, "rows in"]:
        """Some rows of the matrix, in float64."""
        down = self.block[0]
        first, last = place.start // down, -(-place.stop // down)
        whole = Codes(self.codes[first * down : last * down], self.scales[first:last], self.bits, self.block)
        return whole.dense(torch.float64)[place.start - first * down : place.stop - first * down]


def check_bits(bits: int, group: int) -> None:
    """Raises ValueError for bits that there are no codes of, or a group of numbers that no scale can be shared by."""
    if bits not in BITS:
        raise ValueError(f"bits {bits!r} is none of {', '.join(map(str, BITS))}")
    if group < 8:
        raise ValueError(f"group {group} is below 8: the scales would weigh as much as the codes")


def stored_bytes(d_out: int, d_in: int, bits: int, block: Block) -> int:
    """Bytes of codes, packed, and scales of a matrix."""
    blocks = -(-d_out // block[0]) * -(-d_in // block[1])
    return -(-d_out * d_in // 8) * bits + blocks * SCALE.itemsize


def spread(scales: Float[Tensor, "down across"], shape: torch.Size, block: Block) -> Float[Tensor, "out in"]:
    """The scale of each entry."""
    d_out, d_in = shape
    down, across = block
    return scales.repeat_interleave(down, 0)[:d_out].repeat_interleave(across, 1)[:, :d_in]


def round_nearest(
    matrix: Float[Tensor, "out in"], bits: int, block: Block, *, weights: Float[Tensor, "in"] | None = None
) -> Codes:
    """Every number at the nearest code, with the scale of each block that loses least out of a few.

    Args:
        weights: (d_in,) what a squared error of each column counts; default all alike.

    Raises:
        ValueError: bits or a block that do not go, or an entry that is not finite.

    Cost: up to twenty passes over the matrix.
    """
    check_bits(bits, max(block))
    scales = block_scales(matrix, bits, block, weights=weights)
    return Codes(to_codes(matrix, spread(scales.to(matrix.dtype), matrix.shape, block), bits), scales, bits, block)


def to_codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest code of each value; 0 where the scale is."""
    lowest, highest = span(bits)
    ratio = torch.where(scales == 0, 0.0, values / scales)
    return ratio.round().clamp(lowest, highest).to(torch.int8)


def span(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def block_scales(
    matrix: Float[Tensor, "out in"], bits: int, block: Block, *, weights: Float[Tensor, "in"] | None = None
) -> Float[Tensor, "down across"]:
    """The scale of each block with which rounding to nearest loses least, out of those that span it and clip it.

    Args, raises: as `round_nearest`.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("a number that is to be rounded to few bits is not finite")
    numbers = _blocks_of(matrix, block)
    counted = None if weights is None else _blocks_of(weights.to(matrix.dtype).expand(matrix.shape), block)
    at = numbers.abs().argmax(-1, keepdim=True)
    extreme = numbers.gather(-1, at)[..., 0]
    lowest, highest = span(bits)
    starts = (extreme / lowest, extreme / highest)
    best = torch.zeros_like(extreme, dtype=SCALE)
    least = torch.full_like(extreme, float("inf"))
    for start in starts:
        for share in CLIPPED if bits < FINE else CLIPPED[:1]:
            scales = _stored(start * share, up=share == 1.0)
            wide = scales.to(matrix.dtype)[..., None]
            lost = (to_codes(numbers, wide, bits).to(matrix.dtype) * wide - numbers).square_()
            lost = (lost if counted is None else lost.mul_(counted)).sum(-1)
            better = lost < least
            best, least = torch.where(better, scales, best), torch.where(better, lost, least)
    return best


def _stored(scales: Tensor, *, up: bool) -> Tensor:
    """The scales as they are stored; rounded away from zero where they are to span the whole block."""
    stored = scales.to(SCALE)
    if not up:
        return stored
    short = stored.to(scales.dtype).abs() < scales.abs()
    # The next one of a larger size: of a float's bits, read as a whole number, the next number.
    return torch.where(short, (stored.view(torch.int16) + 1).view(SCALE), stored)


def _blocks_of(matrix: Tensor, block: Block) -> Tensor:
    """(blocks down, blocks across, numbers of a block); what is missing of the last ones is zero."""
    down, across = block
    rows, columns = (-matrix.shape[0]) % down, (-matrix.shape[1]) % across
    padded = torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix
    tall, wide = padded.shape[0] // down, padded.shape[1] // across
    return padded.reshape(tall, down, wide, across).transpose(1, 2).reshape(tall, wide, down * across)


def pack(codes: Int8[Tensor, "out in"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes of a matrix, row after row, in as many bytes as their bits take: bits for every eight codes.

    A code, counted from the lowest, is written in pieces of a power of two of bits, so that no piece crosses a byte:
    three bits are two and one. All of the first pieces come before the second ones. Missing codes of the last eight
    count as 0.
    """
    flat = codes.flatten().to(torch.int16) - span(bits)[0]
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).to(torch.uint8)
    parts, shift = [], 0
    for width in _pieces(bits):
        held = 8 // width
        piece = (flat >> shift & (1 << width) - 1).view(-1, held)
        packed = torch.zeros(len(piece), dtype=torch.uint8, device=codes.device)
        for place in range(held):
            packed |= piece[:, place] << place * width
        parts.append(packed)
        shift += width
    return torch.cat(parts)


def packed_rows(packed: UInt8[Tensor, "bytes"], bits: int, d_in: int, rows: slice) -> UInt8[Tensor, "part"]:
    """Of packed codes of d_in a row, a multiple of 8, those of some rows, packed: a copy of their bytes."""
    whole, start, parts = len(packed) // bits, 0, []
    for width in _pieces(bits):
        a_row = d_in // 8 * width
        parts.append(packed[start + rows.start * a_row : start + rows.stop * a_row])
        start += whole * width
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, int]) -> Int8[Tensor, "out in"]:
    """The codes that `pack` wrote."""
    count = shape[0] * shape[1]
    eights = -(-count // 8)
    flat, shift, start = None, 0, 0
    for width in _pieces(bits):
        part = packed[start : start + eights * width]
        start += eights * width
        # One operation for each place in a byte: a table of shifts, broadcast, takes three times as long.
        piece = part
        if width < 8:
            piece = torch.stack([part >> place & (1 << width) - 1 for place in range(0, 8, width)], -1).flatten()
        piece = piece << shift if shift else piece
        flat = piece if flat is None else flat | piece
        shift += width
    assert flat is not None
    if bits == 8:
        return (flat[:count] ^ 128).view(torch.int8).view(shape)
    return (flat[:count].view(torch.int8) + span(bits)[0]).view(shape)


def _pieces(bits: int) -> list[int]:
    """Powers of two that add up to the bits, the largest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]
