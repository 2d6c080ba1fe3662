"""Leading: the leading left singular vectors of T B in float32, with a measured bound on what that costs.

Weights and moments that a model and a calibration give are known to float32 at best. Their Gram matrix has the squares
of the singular values, so that in float32 what lies below 3e-4 of the largest is rounding, and whether that matters is
a question of the layer: with a few outlying input channels it does, without them it does not. So it is measured, on a
sample of the dropped directions, with products in float64, which are cheap because they are products with few vectors.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.float32 import COLUMNS, full_float32
from eckart.lowrank.metrics import DecompositionError, Root, Whitening, eigh, eigvalsh, gram_of

# A float32 answer is taken where its loss exceeds the least one by at most this share of it, and where its tail, which
# is reported, is known that well. Storing factors in bfloat16 adds 4e-6 of the output's energy, which is more still.
LARGEST_EXCESS = 1e-5
LARGEST_TAIL_ERROR = 3e-4
# Directions that the measurement looks at: those next to the kept ones, where nearly all of the excess arises because
# their values are nearly the kept ones', and some of those further on, evenly.
NEAREST, FURTHER = 8, 16
# See `all_energies`. Float32's rounding is 6e-8, of a Gram matrix about 1e-7 of its largest value.
SOUGHT, SINGLE_RESOLUTION = 0.75, 1e-5


def leading_basis(
    target: Float[Tensor, "out in"], root: Root, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "p"]] | None:
    """The leading `rank` left singular vectors of T B and all its squared singular values, leading first, in float32.

    Args:
        target: T in float32. root: B; with a full (d_in, d_in) tensor the answer is None.

    Returns:
        None where float32 is not enough: the caller then works in float64.

    Cost: as `truncation.left_basis`, at twice the speed and half the memory; the measurement takes a
    product of T, T^T and M with NEAREST + FURTHER vectors.
    """
    scale = _scale(target, root)
    if scale is None:
        return None
    target, wide = target / scale, target.shape[0] <= target.shape[1]
    try:
        with full_float32():
            gram, product = gram_of(target, root)
            values, vectors = eigh(gram)
    except DecompositionError:
        return None
    del gram
    values, vectors = values.flip(0).double(), vectors.flip(1)
    if values[rank - 1] <= 0:
        return None
    sampled, counts = _sample(rank, len(values))
    basis, dropped = vectors[:, :rank], vectors[:, sampled]
    if not wide and product is not None:
        with full_float32():
            orthonormal = _orthonormal(product @ (basis / values[:rank].sqrt().float()))
            dropped = product @ dropped
            lengths = dropped.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
            dropped = dropped / lengths
        if orthonormal is None:
            return None
        basis = orthonormal
    if not _is_enough(target, root, basis, values, dropped, sampled, counts):
        return None
    return basis, values.clamp_min(0) * scale**2


def all_energies(target: Float[Tensor, "out in"], root: Root) -> Float[Tensor, "p"] | None:
    """All squared singular values of T B, leading first, of products in float32.

    Rounding in the products is relative to the largest value. Ranks of more than SOUGHT of the full one are hardly ever
    an answer: a factored linear is as large as a dense one there. Where values before that are below SINGLE_RESOLUTION,
    the answer is None, and the caller works in float64.
    """
    scale = _scale(target, root)
    if scale is None:
        return None
    with full_float32():
        gram, _ = gram_of(target / scale, root)
    try:
        values = eigvalsh(gram.double()).flip(0)
    except DecompositionError:
        return None
    sought = values[math.ceil(SOUGHT * len(values)) - 1]
    if not sought >= SINGLE_RESOLUTION * values[0] or not values[0] > 0:
        return None
    return values.clamp_min(0) * scale**2


def _scale(target: Tensor, root: Root) -> float | None:
    """The size of T, without which its Gram matrix could leave float32's range; None where float32 will not do."""
    scale = float(target.abs().max())
    full = isinstance(root, Tensor) and root.ndim == 2
    return None if full or not math.isfinite(scale) or scale == 0 else scale


def _sample(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Indices of some of the directions rank ... count - 1, and how many directions each of them represents."""
    near = min(NEAREST, count - rank)
    rest = count - rank - near
    far = min(FURTHER, rest)
    indices = rank + near + (torch.arange(far) + 0.5) * rest / max(far, 1)
    counts = torch.cat([torch.ones(near), torch.full((far,), rest / max(far, 1))])
    return torch.cat([torch.arange(rank, rank + near), indices.long()]), counts.double()


def _orthonormal(basis: Float[Tensor, "out rank"]) -> Float[Tensor, "out rank"] | None:
    """The same space with orthonormal columns, by a Cholesky root of their Gram matrix; None where it has none."""
    factor, info = torch.linalg.cholesky_ex(basis.mT @ basis)
    if int(info) != 0:
        return None
    return torch.linalg.solve_triangular(factor, basis.mT, upper=False).mT


def _is_enough(
    target: Tensor, root: Root, basis: Tensor, values: Tensor, dropped: Tensor, sampled: Tensor, counts: Tensor
) -> bool:
    """Whether the loss of projecting on `basis`, and the tail of `values`, are near enough to the least loss.

    With K = T B (T B)^T, u_i kept and v_j dropped, K leads a dropped direction into a kept one by s_ij = u_i^T K v_j,
    which is zero in the exact answer. Turning u_i towards v_j would lower the loss by s_ij^2 / (value_i - value_j), to
    first order, and never by more than the difference.
    """
    rank = basis.shape[1]
    if rank == len(values):
        return True
    tail = float(values[rank:].clamp_min(0).sum())
    if tail <= 0:
        return False
    dropped = dropped.double()
    reached = _times(target, _squared(root, _times_transposed(target, dropped)))
    measured = (dropped * reached).sum(0)
    leakage, overlap = _times_transposed(basis, torch.cat([reached, dropped], 1)).chunk(2, dim=1)
    leakage = leakage - values[:rank, None] * overlap
    gaps = values[:rank, None] - values[sampled]
    excess = (leakage.square() / torch.maximum(gaps, leakage.abs()).clamp_min(torch.finfo(torch.float64).tiny)).sum(0)
    counts = counts.to(excess.device)
    error = (counts * (measured - values[sampled])).sum().abs()
    return bool((counts * excess).sum() <= LARGEST_EXCESS * tail and error <= LARGEST_TAIL_ERROR * tail)


def _times(matrix: Float[Tensor, "m n"], vectors: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """The product in float64, without the matrix in float64."""
    return torch.cat([rows.double() @ vectors for rows in matrix.split(COLUMNS)])


def _times_transposed(matrix: Float[Tensor, "m n"], vectors: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """matrix^T times the vectors, in float64, without the matrix in float64."""
    product = vectors.new_zeros(matrix.shape[1], vectors.shape[1])
    for rows, part in zip(matrix.split(COLUMNS), vectors.split(COLUMNS), strict=True):
        product += rows.double().mT @ part
    return product


def _squared(root: Root, vectors: Float[Tensor, "d k"]) -> Tensor:
    """B B^T times the vectors."""
    if root is None:
        return vectors
    if isinstance(root, Whitening):
        return root.apply(vectors)
    return root.double().square()[:, None] * vectors
