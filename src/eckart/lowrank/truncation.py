"""Truncation: a matrix factored once, for every rank at once.

minimise over rank(M) <= r:  E || A (W x - M x - d) ||^2    with  B B^T the moment of x
U = left singular vectors of A T B,   M = A^-1 U_r U_r^T A T,   loss = sum of the squared singular values left out
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.interpolative import interp_decomp
from torch import Tensor

from eckart.lowrank.factors import Factors
from eckart.lowrank.float32 import is_fast_in_float64, lower_gram
from eckart.lowrank.leading import leading_basis
from eckart.lowrank.metrics import (
    BlockDiagonal,
    DecompositionError,
    Metric,
    Root,
    Whitening,
    apply_metric,
    eigh,
    is_nothing,
    singular,
    solve_metric,
    transpose_metric,
    weigh_inputs,
)

# Below this share of the largest eigenvalue of the Gram matrix, rounding (2^-53 times the size) is no longer far
# below the eigenvalue itself, and the singular value decomposition of the product is taken instead.
GRAM_RESOLUTION = 1e-11


@dataclass(frozen=True)
class Spectrum:
    """Every rank of one layer: cut it anywhere, read off what the cut costs.

    Attributes:
        target: (d_out, d_in) T, what is approximated.
        basis: (d_out, q) U, left singular vectors of A T B, leading first: all p = min(d_out, d_in) of them, or as many
            as were asked for.
        energies: (p,) squared singular values, descending: the loss that each direction carries.
        metric: A, (d_out, d_out), its diagonal (d_out,), its blocks where linears are stacked, or None for the
            identity.
        output_mean: (d_out,) W mu, and input_mean: (d_in,) mu of what the factors will read. Both or neither: with
            them the cut carries the bias d = W mu - M mu (SFSD Eq. 5).
        floor: the part of the loss that no rank removes (an anchored target whose input lost information).
    """

    target: Float[Tensor, "out in"]
    basis: Float[Tensor, "out q"]
    energies: Float[Tensor, "p"]
    metric: Metric = None
    output_mean: Float[Tensor, "out"] | None = None
    input_mean: Float[Tensor, "in"] | None = None
    floor: float = 0.0

    @property
    def max_rank(self) -> int:
        return len(self.energies)

    def cut(self, rank: int) -> Factors:
        """The best factors of `rank`: left = A^-1 U_r (d_out, rank), right = U_r^T A T (rank, d_in).

        Raises:
            ValueError: rank is not in 1 ... min(d_out, d_in), or above the rank that the layer was factored for.
            DecompositionError: A is singular.
        Cost: one product of 2 rank d_out d_in operations, and a solve with A where there is one.
        """
        check_rank(rank, self.max_rank)
        if rank > self.basis.shape[1]:
            raise ValueError(f"the layer was factored for rank {self.basis.shape[1]}, and is to be cut at {rank}")
        basis = self.basis[:, :rank]
        # U^T A first: at any rank that pays off it is no dearer than A T.
        right = apply_metric(transpose_metric(self.metric), basis).mT @ self.target
        return self.with_bias(Factors(solve_metric(self.metric, basis), right))

    def with_bias(self, factors: Factors) -> Factors:
        """The factors with the bias that fits them, d = W mu - M mu; unchanged where there are no means."""
        if self.output_mean is None or self.input_mean is None:
            return factors
        bias = self.output_mean - factors.left.double() @ (factors.right.double() @ self.input_mean)
        return Factors(factors.left, factors.right, bias)

    def tail(self, rank: int) -> float:
        """Loss of the cut at `rank`, in the method's metric: floor plus the energies left out. rank 0 loses all."""
        if rank:
            check_rank(rank, self.max_rank)
        return self.floor + float(self.energies[rank:].sum())

    def tails(self) -> Float[Tensor, "points"]:
        """The loss at every rank from 0 to full, (max_rank + 1,)."""
        left_out = self.energies.flip(0).cumsum(0).flip(0)
        return self.floor + torch.cat([left_out, left_out.new_zeros(1)])

    def losses(self, points: int) -> list[float]:
        """The loss at `points` ranks spread evenly from 0 to full, as shares of the loss at rank 0: a curve to draw."""
        total = self.tail(0)
        ranks = torch.linspace(0, self.max_rank, points).round().int().tolist()
        return [self.tail(rank) / total if total > 0 else 0.0 for rank in ranks]


def factor(
    target: Float[Tensor, "out in"],
    *,
    root: Root = None,
    metric: Metric = None,
    output_mean: Tensor | None = None,
    input_mean: Tensor | None = None,
    floor: float = 0.0,
    rank: int | None = None,
) -> Spectrum:
    """Factor `target` for every rank at once, measuring error at the layer's output.

    The cut at rank r minimises ||A (T - M) B||_F over rank(M) <= r (METHODS: one problem, one solution; NSVD Theorems
    2 and 3 for A = I). B is applied, never inverted, so it may be singular.

    Args:
        target: (d_out, d_in); taken to float64.
        root: B, (d_in, d_in), or its diagonal (d_in,), or a `Whitening`. None is the identity: plain SVD.
        metric: A, (d_out, d_out), its diagonal (d_out,) or its blocks, non-singular. None is the identity.
        output_mean, input_mean, floor: see Spectrum.
        rank: the largest that will be cut, where that is known: only so many vectors are made. A target of less than
            float64 is then factored in float32 where that is enough (see `leading`) and the device faster at it: the
            loss is within 1e-5 of the least, and the factors are float32.

    Where A or B is zero, every M loses nothing (but the floor), and that is what the spectrum's losses are. The factors
    are then the best ones without A, or without B: a linear without influence on the loss is cut in the input's metric
    alone, and one whose input is always zero by plain SVD.

    Raises:
        ValueError: shapes disagree, an entry is not finite, or the rank is out of reach.
        DecompositionError: the decomposition did not converge; the message names the shape and the largest entry. Or
            the metric is singular (a full one is detected when the spectrum is cut).

    Cost: the product A T B or the Gram matrix A T M T^T A^T, and the symmetric eigenproblem of the Gram matrix on the
    smaller side; one SVD of the product instead where the Gram matrix cannot resolve the singular values that are
    needed (see `left_basis`).
    """
    if target.ndim != 2:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected (d_out, d_in)")
    d_out, d_in = target.shape
    _check_side(root, d_in, "root")
    _check_side(metric, d_out, "metric")
    settings: dict[str, Any] = {"output_mean": output_mean, "input_mean": input_mean, "floor": floor, "rank": rank}
    if is_nothing(metric):
        return _lossless(factor(target, root=root, **settings))
    if rank is not None:
        check_rank(rank, min(d_out, d_in))
        known = target.dtype != torch.float64 and (not isinstance(root, Whitening) or root.is_single)
        if known and metric is None and not is_fast_in_float64(target.device):
            single = target.float()
            leading = leading_basis(single, root, rank)
            if leading is not None:
                return Spectrum(single, *leading, metric, output_mean, input_mean, floor)
    target = target.double()
    if isinstance(metric, Tensor) and metric.ndim == 1 and (metric == 0).any():
        raise singular(metric)
    basis, energies = left_basis(target, root, metric, rank)
    if root is not None and energies[0] == 0:
        return _lossless(factor(target, metric=metric, **settings))
    return Spectrum(target, basis, energies, metric, output_mean, input_mean, floor)


def _lossless(spectrum: Spectrum) -> Spectrum:
    """The same factors, with no loss at any rank but the floor."""
    return replace(spectrum, energies=torch.zeros_like(spectrum.energies))


def weigh(matrix: Float[Tensor, "out in"], root: Root = None, metric: Metric = None) -> Float[Tensor, "out in"]:
    """A T B: its squared Frobenius norm is the loss of dropping T. A vector is the diagonal of a diagonal matrix."""
    return apply_metric(metric, weigh_inputs(matrix, root))


def left_basis(
    target: Float[Tensor, "out in"], root: Root = None, metric: Metric = None, rank: int | None = None
) -> tuple[Float[Tensor, "out q"], Float[Tensor, "p"]]:
    """Left singular vectors of A T B, `rank` of them or all, and all p = min(d_out, d_in) squared singular values.

    Leading first, in float64. The route was chosen by measurement (benchmarks/decomposition.py, docs/decisions.md):
    eigenvectors of the Gram matrix on the smaller side, which on the output side needs the moment and no root. Its
    rounding error is relative to the largest eigenvalue, so where a value that is needed lies below GRAM_RESOLUTION of
    it, the product is decomposed by SVD, which resolves singular values down to 1e-16 of the largest.
    """
    d_out, d_in = target.shape
    wide, needed = d_out <= d_in, min(d_out, d_in) if rank is None else rank
    product = None
    if wide and isinstance(root, Whitening):
        weighted = apply_metric(metric, target)
        gram = lower_gram(weighted @ root.moment(), weighted)
        del weighted
    else:
        product = weigh(target, root, metric)
        gram = lower_gram(product, product) if wide else lower_gram(product.mT, product.mT)
    if not torch.isfinite(gram.diagonal()).all():
        raise ValueError(f"the weighted {d_out} x {d_in} matrix has entries that are not finite")
    values, vectors = eigh(gram)
    del gram
    if values[-needed] >= GRAM_RESOLUTION * values[-1] and values[-1] > 0:
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :needed]
        if product is not None and not wide:
            # T B V has orthogonal columns of length sigma; dividing is safe because sigma is well resolved here.
            vectors = (product @ vectors) / values[:needed].sqrt()
        return vectors, values
    product = weigh(target, root, metric) if product is None else product
    try:
        basis, singular, _ = torch.linalg.svd(product, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"the SVD of a {tuple(product.shape)} matrix did not converge; largest entry {product.abs().max():.3g}"
        ) from error
    return basis[:, :needed], singular.square()


def interpolate(matrix: Float[Tensor, "out in"], rank: int) -> Factors:
    """Column interpolative decomposition: left = `rank` columns of the matrix, right their coefficients (NSVD 4.3).

    right holds an identity at the selected columns, so those are reproduced exactly. Deterministic pivoted QR
    (Martinsson et al. 2011, through scipy.linalg.interpolative).

    Raises:
        ValueError: rank is not in 1 ... min(d_out, d_in).
    Cost: about 2 rank d_out d_in operations on the CPU.
    """
    check_rank(rank, min(matrix.shape))
    values = np.asfortranarray(matrix.double().cpu().numpy())
    order, projection = interp_decomp(values, rank, rand=False)
    if not np.isfinite(projection).all():
        # The selected columns are dependent (the matrix has less rank than asked): elimination divided zero by zero.
        projection = np.linalg.lstsq(values[:, order[:rank]], values[:, order[rank:]])[0]
    coefficients = np.empty((rank, values.shape[1]))
    coefficients[:, order[:rank]] = np.eye(rank)
    coefficients[:, order[rank:]] = projection
    left = torch.from_numpy(np.ascontiguousarray(values[:, order[:rank]]))
    return Factors(left.to(matrix.device), torch.from_numpy(coefficients).to(matrix.device))


def rank_for(keep: float, d_out: int, d_in: int) -> int:
    """Rank whose factors hold the share `keep` of d_out d_in numbers: floor(keep d_out d_in / (d_out + d_in)).

    SFSD Eq. 3. At least 1. A share such as 0.58 is no binary fraction; what falls short of a whole rank only by that
    counts as one.
    """
    return max(1, math.floor(round(keep * d_out * d_in / (d_out + d_in), 9)))


def check_rank(rank: int, max_rank: int) -> None:
    """Raises ValueError unless 1 <= rank <= max_rank."""
    if not 1 <= rank <= max_rank:
        raise ValueError(f"rank {rank} is not in 1 ... min(d_out, d_in) = {max_rank}")


def _check_side(side: Tensor | BlockDiagonal | Whitening | None, size: int, what: str) -> None:
    if side is not None and tuple(side.shape) not in {(size,), (size, size)}:
        raise ValueError(f"{what} has shape {tuple(side.shape)}, expected ({size}, {size}) or its diagonal ({size},)")
