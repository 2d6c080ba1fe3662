"""Leading: the leading left singular vectors of T B in float32, with a measured bound on what that costs.

Weights and moments that a model and a calibration give are known to float32 at best. Their Gram matrix has the squares
of the singular values, so that in float32 what lies below 3e-4 of the largest is rounding, and whether that matters is
a question of the layer: with a few outlying input channels it does, without them it does not. So it is measured, on a
sample of the dropped directions, with products in float64, which are cheap because they are products with few vectors.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.float32 import COLUMNS, full_float32, lower_gram
from eckart.lowrank.metrics import DecompositionError, Root, Whitening, eigh, weigh_inputs

# A float32 answer is taken where its loss exceeds the least one by at most this share of it, and where its tail, which
# is reported, is known that well. Storing factors in bfloat16 adds 4e-6 of the output's energy, which is more still.
LARGEST_EXCESS = 1e-5
LARGEST_TAIL_ERROR = 3e-4
# Directions that the measurement looks at: those next to the kept ones, where nearly all of the excess arises because
# their values are nearly the kept ones', and some of the others, evenly.
NEAREST, OTHERS = 8, 16


def leading_basis(
    target: Float[Tensor, "out in"], root: Root, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "p"]] | None:
    """The leading `rank` left singular vectors of T B and all its squared singular values, leading first, in float32.

    Args:
        target: T in float32. root: B; a full one (d_in, d_in) that is given as a tensor is left to float64.

    Returns:
        None where float32 is not enough: the caller then works in float64.

    Cost: as `truncation.left_basis`, at twice the speed and half the memory; the measurement takes a
    product of T, T^T and M with NEAREST + OTHERS vectors.
    """
    if isinstance(root, Tensor) and root.ndim == 2:
        return None
    scale = target.abs().max()
    if not torch.isfinite(scale) or scale == 0:
        return None
    wide = target.shape[0] <= target.shape[1]
    try:
        with full_float32():
            if wide and isinstance(root, Whitening):
                product = target
                gram = lower_gram(target @ root.moment(torch.float32), target)
            else:
                product = weigh_inputs(target, _single(root))
                gram = lower_gram(product, product) if wide else lower_gram(product.mT, product.mT)
            values, vectors = eigh(gram)
    except DecompositionError:
        return None
    del gram
    values, vectors = values.flip(0).double(), vectors.flip(1)
    if values[rank - 1] <= 0:
        return None
    sampled, counts = _sample(rank, len(values))
    basis, dropped = vectors[:, :rank], vectors[:, sampled]
    if not wide:
        with full_float32():
            found = _orthonormal(product @ (basis / values[:rank].sqrt().float()))
            dropped = product @ dropped
            lengths = dropped.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
            dropped = dropped / lengths
        if found is None:
            return None
        basis = found
    if not _is_enough(target, root, basis, values, dropped, sampled, counts):
        return None
    return basis, values.clamp_min(0)


def _single(root: Root) -> Root:
    return root.float() if isinstance(root, Tensor) else root


def _sample(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Some of the directions rank ... count - 1, and for how many each of them stands."""
    near = min(NEAREST, count - rank)
    rest = count - rank - near
    others = min(OTHERS, rest)
    places = rank + near + (torch.arange(others) + 0.5) * rest / max(others, 1)
    counts = torch.cat([torch.ones(near), torch.full((others,), rest / max(others, 1))])
    return torch.cat([torch.arange(rank, rank + near), places.long()]), counts.double()


def _orthonormal(basis: Float[Tensor, "out rank"]) -> Float[Tensor, "out rank"] | None:
    """The same space with orthonormal columns, by a Cholesky root of what they are not; None where there is none."""
    factor, info = torch.linalg.cholesky_ex(basis.mT @ basis)
    if int(info) != 0:
        return None
    return torch.linalg.solve_triangular(factor, basis.mT, upper=False).mT


def _is_enough(
    target: Tensor, root: Root, basis: Tensor, values: Tensor, dropped: Tensor, sampled: Tensor, counts: Tensor
) -> bool:
    """Whether the loss of projecting on `basis`, and the tail of `values`, are near enough to the least loss.

    With K = T B (T B)^T, u_i kept and v_j dropped, K leads a dropped direction into a kept one by s_ij = u_i^T K v_j,
    which is zero in the exact answer. Turning it there would lower the loss by s_ij^2 / (value_i - value_j), to first
    order, and never by more than the difference.
    """
    rank = basis.shape[1]
    if rank == len(values):
        return True
    tail = float(values[rank:].clamp_min(0).sum())
    if tail <= 0:
        return False
    dropped = dropped.double()
    reached = _times(target, _squared(root, _times_transposed(target, dropped)))
    found = (dropped * reached).sum(0)
    led, overlap = _times_transposed(basis, torch.cat([reached, dropped], 1)).chunk(2, dim=1)
    led = led - values[:rank, None] * overlap
    gaps = values[:rank, None] - values[sampled]
    excess = (led.square() / torch.maximum(gaps, led.abs()).clamp_min(torch.finfo(torch.float64).tiny)).sum(0)
    counts = counts.to(excess.device)
    error = (counts * (found - values[sampled])).sum().abs()
    return bool((counts * excess).sum() <= LARGEST_EXCESS * tail and error <= LARGEST_TAIL_ERROR * tail)


def _times(matrix: Float[Tensor, "m n"], vectors: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """The product in float64, without the matrix in float64."""
    return torch.cat([rows.double() @ vectors for rows in matrix.split(COLUMNS)])


def _times_transposed(matrix: Float[Tensor, "m n"], vectors: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """matrix^T times the vectors, in float64, without the matrix in float64."""
    found = vectors.new_zeros(matrix.shape[1], vectors.shape[1])
    for rows, part in zip(matrix.split(COLUMNS), vectors.split(COLUMNS), strict=True):
        found += rows.double().mT @ part
    return found


def _squared(root: Root, vectors: Float[Tensor, "d k"]) -> Tensor:
    """B B^T times the vectors."""
    if root is None:
        return vectors
    if isinstance(root, Whitening):
        return root.apply(vectors)
    return root.double().square()[:, None] * vectors
