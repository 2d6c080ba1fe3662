"""Truncation: a matrix factored once, for every rank at once.

minimise over rank(M) <= r:  E || A (W x - M x - d) ||^2    with  B B^T the moment of x
U = left singular vectors of A T B,   M = A^-1 U_r U_r^T A T,   loss = sum of the squared singular values left out

A correction M of a matrix Q that is there already, W x - (Q + M) x, is the same with T - Q in T's place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.interpolative import interp_decomp
from torch import Tensor

from eckart.lowrank.anchor import Anchor
from eckart.lowrank.factors import Factors
from eckart.lowrank.float32 import full_float32, is_fast_in_float64
from eckart.lowrank.leading import all_energies, leading_basis
from eckart.lowrank.metrics import (
    BlockDiagonal,
    Metric,
    Root,
    Whitening,
    apply_metric,
    eigh,
    eigvalsh,
    gram_of,
    is_nothing,
    singular,
    solve_metric,
    svd,
    svdvals,
    weigh_inputs,
)

# Below this share of the largest eigenvalue of the Gram matrix, rounding (2^-53 times the size) is no longer far
# below the eigenvalue itself, and the singular value decomposition of the product is taken instead.
GRAM_RESOLUTION = 1e-11


@dataclass(frozen=True)
class Spectrum:
    """Every rank of one layer: cut it anywhere, read off what the cut costs.

    Attributes:
        weighted: (d_out, d_in) A T, what is approximated; of a correction A (T - Q).
        basis: (d_out, q) U, left singular vectors of A T B, leading first: all p = min(d_out, d_in) of them, or as many
            as were asked for.
        energies: (p,) squared singular values, descending: the loss that each direction carries.
        metric: A, (d_out, d_out), its diagonal (d_out,), its blocks where linears are stacked, or None for the
            identity.
        output_mean: (d_out,) W mu, and input_mean: (d_in,) mu of what the factors will read. Both or neither: with
            them the cut carries the bias d = W mu - M mu (SFSD Eq. 5).
        floor: the part of the loss that no rank removes (an anchored target whose input lost information).
    """

    weighted: Float[Tensor, "out in"]
    basis: Float[Tensor, "out q"]
    energies: Float[Tensor, "p"]
    metric: Metric = None
    output_mean: Float[Tensor, "out"] | None = None
    input_mean: Float[Tensor, "in"] | None = None
    floor: float = 0.0

    def __repr__(self) -> str:
        d_out, d_in = self.weighted.shape
        return f"Spectrum({d_out} x {d_in}, ranks to {self.max_rank})"

    @property
    def max_rank(self) -> int:
        return len(self.energies)

    @property
    def target(self) -> Float[Tensor, "out in"]:
        """T, of a correction T - Q. Cost: a solve with A where there is one."""
        return solve_metric(self.metric, self.weighted)

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
        return self.with_bias(Factors(solve_metric(self.metric, basis), basis.mT @ self.weighted))

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
        return self.floor + tails_of(self.energies)

    def losses(self, points: int) -> list[float]:
        """The loss at `points` ranks spread evenly from 0 to full, as shares of the loss at rank 0: a curve to draw."""
        return shares(self.tails(), points)


def tails_of(energies: Float[Tensor, "p"]) -> Float[Tensor, "points"]:
    """What the cuts at ranks 0 to p leave out of the energies, (p + 1,)."""
    left_out = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([left_out, left_out.new_zeros(1)])


def shares(tails: Float[Tensor, "ranks"], points: int) -> list[float]:
    """Entries of `tails`, spread evenly from the first to the last, as shares of the first."""
    places = torch.linspace(0, len(tails) - 1, points).round().long()
    sampled = tails.cpu()[places]
    return (sampled / sampled[0] if sampled[0] > 0 else torch.zeros_like(sampled)).tolist()


@dataclass(frozen=True)
class Problem:
    """minimise E||A (W x - M xh - d)||^2 over rank(M) <= r, for every r at once.

    Attributes:
        weight: (d_out, d_in) W.
        root: B of xh's moment, (d_in, d_in), its diagonal (d_in,) or a `Whitening`. None is the identity: plain SVD.
        metric: A, (d_out, d_out), its diagonal (d_out,) or its blocks, non-singular. None is the identity.
        anchor: of xh, which makes the target T; None for T = W, xh being x itself.
        output_mean, input_mean: see Spectrum. floor: the part of the loss that no rank removes, without an anchor.
        base: (d_out, d_in) Q, to which M is added: the loss is then E||A (W x - (Q + M) xh - d)||^2. None for zero.

    Where A or B is zero, every M loses nothing (but the floor), and that is what the losses are. The factors are then
    the best ones without A, or without B: a linear without influence on the loss is cut in the input's metric alone,
    and one whose input is always zero by plain SVD.

    Raises:
        ValueError: shapes disagree.
        DecompositionError: a diagonal metric is singular (a full one is detected when the spectrum is cut).
    """

    weight: Float[Tensor, "out in"]
    root: Root = None
    metric: Metric = None
    anchor: Anchor | None = None
    output_mean: Float[Tensor, "out"] | None = None
    input_mean: Float[Tensor, "in"] | None = None
    floor: float = 0.0
    base: Float[Tensor, "out in"] | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"target has shape {tuple(self.weight.shape)}, expected (d_out, d_in)")
        if self.base is not None and self.base.shape != self.weight.shape:
            raise ValueError(
                f"what is corrected has shape {tuple(self.base.shape)}, expected {tuple(self.weight.shape)}"
            )
        d_out, d_in = self.weight.shape
        _check_side(self.root, d_in, "root")
        _check_side(self.metric, d_out, "metric")
        metric = self.metric
        if isinstance(metric, Tensor) and metric.ndim == 1 and (metric == 0).any() and not is_nothing(metric):
            raise singular(metric)

    @property
    def max_rank(self) -> int:
        return min(self.weight.shape)

    @property
    def is_single(self) -> bool:
        """Whether float32 is all that is known of the weight and the moments, and the device is faster in it."""
        return (
            self.weight.dtype != torch.float64
            and (self.root.is_single if isinstance(self.root, Whitening) else self.root is None or self.root.ndim == 1)
            and (self.anchor is None or self.anchor.is_single)
            and not is_fast_in_float64(self.weight.device)
        )

    def factor(self, rank: int | None = None) -> Spectrum:
        """Every rank of the linear, or those up to one.

        Args:
            rank: the largest that will be cut, where that is known: only so many vectors are made. What `is_single` is
                then factored in float32 where that is enough (see `leading`): the loss is within 1e-5 of the least,
                and the factors are float32.

        Raises:
            ValueError: an entry is not finite, or the rank is out of reach.
            DecompositionError: a decomposition did not converge, or an anchor's moment is singular; the message names
                the shape and the numbers.

        Cost: the products A T and A T B or the Gram matrix A T M T^T A^T, and the symmetric eigenproblem of the Gram
        matrix on the smaller side; one SVD of the product instead where the Gram matrix cannot resolve the singular
        values that are needed (see `left_basis`). Of an anchor, see `Anchor`.
        """
        if rank is not None:
            check_rank(rank, self.max_rank)
        if is_nothing(self.metric):
            return replace(_lossless(replace(self, metric=None).factor(rank)), floor=self.floor)
        exact = None
        if rank is not None and self.is_single:
            known, exact = self._weigh_for_float32()
            leading = leading_basis(known[0], self.root, rank)
            if leading is not None:
                return Spectrum(known[0], *leading, self.metric, self.output_mean, self.input_mean, known[1])
        weighted, floor = exact or self._weigh_exactly()
        basis, energies = left_basis(weighted, self.root, rank)
        if self.root is not None and energies[0] == 0:
            return _lossless(replace(self, root=None).factor(rank))
        return Spectrum(weighted, basis, energies, self.metric, self.output_mean, self.input_mean, floor)

    def tails(self) -> Float[Tensor, "points"]:
        """The loss at every rank from 0 to full, (max_rank + 1,), as that of `factor`.

        What `is_single` is multiplied in float32 where that resolves the values (see `leading.all_energies`).

        Raises: as `factor`. Cost: as that, but of the eigenproblem only the values, about a third of it.
        """
        if is_nothing(self.metric):
            return self.floor + torch.zeros(self.max_rank + 1, dtype=torch.float64)
        exact = None
        if self.is_single:
            known, exact = self._weigh_for_float32()
            energies = all_energies(known[0], self.root)
            if energies is not None:
                return known[1] + tails_of(energies)
        weighted, floor = exact or self._weigh_exactly()
        return floor + tails_of(left_energies(weighted, self.root))

    def _weigh(self, dtype: torch.dtype) -> tuple[Tensor, float] | None:
        """(A T, of a correction A (T - Q); the floor) in a type; None where float32 is not enough for the anchor."""
        weight, base = self.weight.to(dtype), None if self.base is None else self.base.to(dtype)
        if self.anchor is None:
            with full_float32():
                return apply_metric(self.metric, weight if base is None else weight - base), self.floor
        with full_float32():
            weighted = apply_metric(self.metric, weight)
        anchored = self.anchor.target_and_floor(weighted)
        if anchored is None:
            return None
        target, floor = anchored
        if base is not None:
            with full_float32():
                target = target - apply_metric(self.metric, base)
        return target, floor

    def _weigh_for_float32(self) -> tuple[tuple[Tensor, float], tuple[Tensor, float] | None]:
        """((A T, the floor) in float32, the same in float64 where the target took that): its cut may not take it."""
        known = self._weigh(torch.float32)
        if known is not None:
            return known, None
        exact = self._weigh_exactly()
        return (exact[0].float(), exact[1]), exact

    def _weigh_exactly(self) -> tuple[Tensor, float]:
        answer = self._weigh(torch.float64)
        assert answer is not None
        return answer


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

    Args, raises and cost: see `Problem` and `Problem.factor`.
    """
    return Problem(target, root, metric, None, output_mean, input_mean, floor).factor(rank)


def _lossless(spectrum: Spectrum) -> Spectrum:
    """The same factors, with no loss at any rank but the floor."""
    return replace(spectrum, energies=torch.zeros_like(spectrum.energies))


def weigh(matrix: Float[Tensor, "out in"], root: Root = None, metric: Metric = None) -> Float[Tensor, "out in"]:
    """A T B: its squared Frobenius norm is the loss of dropping T. A vector is the diagonal of a diagonal matrix."""
    return apply_metric(metric, weigh_inputs(matrix, root))


def left_basis(
    weighted: Float[Tensor, "out in"], root: Root = None, rank: int | None = None
) -> tuple[Float[Tensor, "out q"], Float[Tensor, "p"]]:
    """Left singular vectors of (A T) B, `rank` of them or all, and all p = min(d_out, d_in) squared singular values.

    Leading first, in float64. The route was chosen by measurement (benchmarks/decomposition.py, docs/decisions.md):
    eigenvectors of the Gram matrix on the smaller side, which on the output side needs the moment and no root. Its
    rounding error is relative to the largest eigenvalue, so where a value that is needed lies below GRAM_RESOLUTION of
    it, the product is decomposed by SVD, which resolves singular values down to 1e-16 of the largest.
    """
    d_out, d_in = weighted.shape
    needed = min(d_out, d_in) if rank is None else rank
    gram, product = _finite_gram(weighted, root)
    values, vectors = eigh(gram)
    del gram
    if _resolves(values, needed):
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :needed]
        if product is not None and d_out > d_in:
            # T B V has orthogonal columns of length sigma; dividing is safe because sigma is well resolved here.
            vectors = (product @ vectors) / values[:needed].sqrt()
        return vectors, values
    basis, singular, _ = svd(weigh_inputs(weighted, root) if product is None else product)
    return basis[:, :needed], singular.square()


def left_energies(weighted: Float[Tensor, "out in"], root: Root = None) -> Float[Tensor, "p"]:
    """All squared singular values of (A T) B, as `left_basis` has them, at a third of the cost."""
    gram, product = _finite_gram(weighted, root)
    values = eigvalsh(gram)
    if _resolves(values, len(values)):
        return values.flip(0).clamp_min(0)
    return svdvals(weigh_inputs(weighted, root) if product is None else product).square()


def _finite_gram(weighted: Tensor, root: Root) -> tuple[Tensor, Tensor | None]:
    gram, product = gram_of(weighted, root)
    if not torch.isfinite(gram.diagonal()).all():
        raise ValueError(
            f"the weighted {weighted.shape[0]} x {weighted.shape[1]} matrix has entries that are not finite"
        )
    return gram, product


def _resolves(values: Float[Tensor, "p"], needed: int) -> bool:
    """Whether the Gram matrix's eigenvalues, ascending, tell the largest `needed` from rounding."""
    return bool(values[-needed] >= GRAM_RESOLUTION * values[-1] and values[-1] > 0)


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
