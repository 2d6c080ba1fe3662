"""Metrics: in which norm an error counts. Moments in, roots (input side) and metrics (output side) out.

A root B of an input moment has B B^T = moment; any two roots of one moment give the same factors. A one-dimensional
root or metric is the diagonal of a diagonal matrix. No function here inverts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from eckart.lowrank.float32 import lower_gram
from eckart.lowrank.input_moments import InputMoments
from eckart.lowrank.moments import GradientMoments, Moments
from eckart.lowrank.threads import few_threads

# Weight of a linear without influence in a stack with others, as a share of theirs: far above what float64 resolves,
# far below what moves a rank.
FAINT = 1e-9
# A gradient covariance that is shrunk by more has a condition number below d_out / 1e-3: its Cholesky root in float32
# is then off by less than 1e-3 in any direction even of 10,000 outputs, and mostly by 1e-6.
LEAST_SINGLE_SHRINKAGE = 1e-3
# Rows that are looked at together for numbers that are not finite.
ROWS_CHECKED = 1024


class DecompositionError(RuntimeError):
    """A matrix decomposition did not converge or its input is unusable; the message has the shape and the numbers."""


@dataclass(frozen=True)
class BlockDiagonal:
    """An output metric of stacked linears: each block (d, d) is of one of them, and none sees another's outputs."""

    blocks: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def split(self, matrix: Float[Tensor, "out n"]) -> list[tuple[Tensor, Tensor]]:
        """(block, the rows of `matrix` that it acts on), from the top."""
        rows = matrix.split([len(block) for block in self.blocks])
        return list(zip(self.blocks, rows, strict=True))


# A, (d_out, d_out), its diagonal (d_out,), blocks of it, or None for the identity.
Metric = Tensor | BlockDiagonal | None


def apply_metric(metric: Metric, matrix: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
    """A times the matrix, in the matrix's type."""
    if metric is None:
        return matrix
    if isinstance(metric, BlockDiagonal):
        return torch.cat([block.to(rows) @ rows for block, rows in metric.split(matrix)])
    metric = metric.to(matrix)
    return metric[:, None] * matrix if metric.ndim == 1 else metric @ matrix


def solve_metric(metric: Metric, matrix: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
    """A^-1 times the matrix, solved in A's type and given in the matrix's.

    Raises:
        DecompositionError: A is singular.
    """
    if metric is None:
        return matrix
    if isinstance(metric, BlockDiagonal):
        return torch.cat([solve_metric(block, rows) for block, rows in metric.split(matrix)])
    if metric.ndim == 1:
        if (metric == 0).any():
            raise singular(metric)
        return matrix / metric[:, None].to(matrix)
    if not metric.tril(-1).any():
        if not metric.diagonal().all():
            raise singular(metric)
        return torch.linalg.solve_triangular(metric, matrix.to(metric), upper=True).to(matrix)
    solved, info = torch.linalg.solve_ex(metric, matrix.to(metric))
    if int(info) != 0:
        raise singular(metric)
    return solved.to(matrix)


def singular(metric: Tensor) -> DecompositionError:
    """The error of an output metric that cannot be solved with."""
    return DecompositionError(
        f"the output metric {tuple(metric.shape)} is singular: some output has no weight in it; shrink the metric"
    )


def cholesky_root(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Lower-triangular L with L L^T = moment (NSVD Theorem 2, SVD-LLM's whitening).

    A moment that is singular (fewer tokens than width, dead channels) has no Cholesky factorisation in floating point;
    then the eigenvalue root is returned instead, which by the any-root law yields the same factors.

    Raises:
        DecompositionError: an entry is not finite.
    Cost: d^3 / 3 operations.
    """
    check_finite(moment, "moment")
    factor, info = torch.linalg.cholesky_ex(moment)
    return factor if int(info) == 0 else eigen_root(moment)


def eigen_root(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """P Lambda^(1/2) with P Lambda P^T = moment (NSVD Theorem 3). Eigenvalues that rounding made negative count as 0.

    Raises:
        DecompositionError: an entry is not finite, or the eigensolver failed.
    Cost: one symmetric eigendecomposition, about 9 d^3 operations.
    """
    values, vectors = eigh(moment)
    return vectors * values.clamp_min(0).sqrt()


def scaled_eigenvectors(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """gamma P with gamma^2 the largest eigenvalue (NSVD Theorem 4). Orthogonal up to a scalar, hence plain SVD."""
    values, vectors = eigh(moment)
    return vectors * values[-1].clamp_min(0).sqrt()


def shrink(
    moment: Float[Tensor, "d d"] | Float[Tensor, "d"], share: float, *, in_place: bool = False
) -> Float[Tensor, "d d"] | Float[Tensor, "d"]:
    """(1 - share) M + share mean(diag M) I: towards the mean diagonal, so that a singular moment can be solved with.

    A vector is the diagonal of a diagonal matrix and is shrunk alike.

    Raises:
        ValueError: share is outside [0, 1].
    """
    _check_share(share)
    if moment.ndim == 1:
        return (1 - share) * moment + share * moment.mean()
    added = share * moment.diagonal().mean()
    shrunk = moment.mul_(1 - share) if in_place else (1 - share) * moment
    shrunk.diagonal().add_(added)
    return shrunk


def of_second_moment(root: Callable[[Tensor], Tensor]) -> Callable[[Moments], Tensor]:
    """`root` of the uncentred G = E[x x^T], as a function of moments."""
    return lambda moments: root(moments.require_inputs().second_moment)


class Whitening:
    """The Cholesky root B of an input moment M, B B^T = M, computed when it is asked for.

        M = (1 - share) G + share mean(diag G) I,   or the same of the covariance C where it is centred

    What a cut needs is often M alone: the Gram matrix of W B on its output side is W M W^T. Linears that read one input
    share one object, so that moment and root are computed once for all of them.

    Attributes:
        inputs: the moments of the input. share: how far M is shrunk towards its mean diagonal. centred: C instead of G.
    """

    def __init__(self, inputs: InputMoments, share: float = 0.0, *, centred: bool = False) -> None:
        _check_share(share)
        self.inputs, self.share, self.centred = inputs, share, centred
        self._moment: Tensor | None = None
        self._roots: dict[torch.dtype, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return self.inputs.d_in, self.inputs.d_in

    @property
    def is_single(self) -> bool:
        """Whether the moments were kept in float32, so that float32 is all that is known of M."""
        return self.inputs.keeps("covariance") == torch.float32

    def moment(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "d d"]:
        """M. Computed in float64; kept in the type that was asked for last.

        Raises:
            DecompositionError: an entry is not finite.
        """
        if self._moment is None or self._moment.dtype != dtype:
            self._moment = None  # before the other one is made
            matrix = self.inputs.moment(centred=self.centred, dtype=dtype)
            check_finite(matrix, "moment")
            self._moment = shrink(matrix, self.share, in_place=True) if self.share else matrix
        return self._moment

    def root(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "d d"]:
        """B, by `cholesky_root` in float64."""
        if dtype not in self._roots:
            self._roots[dtype] = cholesky_root(self.moment()).to(dtype)
            if dtype != torch.float64:
                self._moment = None
        return self._roots[dtype]

    def apply(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """M times some vectors, in float64, without M in float64."""
        vectors = vectors.double()
        product = self.inputs.apply_moment(vectors, centred=self.centred)
        if not self.share:
            return product
        mean = self.inputs.variances(centred=self.centred).mean()
        return (1 - self.share) * product + self.share * mean * vectors


# B, (d_in, d_in), its diagonal (d_in,), one that is computed when asked for, or None for the identity.
Root = Tensor | Whitening | None


def whitening(share: float = 0.0, *, centred: bool = False) -> Callable[[Moments], Whitening]:
    """The Cholesky root of the second moment (of the covariance where centred), shrunk, as a function of moments."""
    return lambda moments: Whitening(moments.require_inputs(), share, centred=centred)


def weigh_inputs(matrix: Float[Tensor, "n d"], root: Root) -> Float[Tensor, "n d"]:
    """The matrix times B, in the matrix's type."""
    if root is None:
        return matrix
    root = root.root(matrix.dtype) if isinstance(root, Whitening) else root.to(matrix)
    return matrix * root if root.ndim == 1 else matrix @ root


def gram_of(matrix: Float[Tensor, "m n"], root: Root) -> tuple[Float[Tensor, "p p"], Float[Tensor, "m n"] | None]:
    """(The Gram matrix of the matrix times B on its smaller side, in its lower triangle, and that product).

    On the output side of a `Whitening` the moment is enough: no product is made there, and None is given.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    if wide and isinstance(root, Whitening):
        return lower_gram(matrix @ root.moment(matrix.dtype), matrix), None
    product = weigh_inputs(matrix, root)
    return lower_gram(product, product) if wide else lower_gram(product.mT, product.mT), product


def absolute_mean_root(moments: Moments, alpha: float) -> Float[Tensor, "in"]:
    """diag(E|x|^alpha), as its diagonal (ASVD; NSVD Eq. 4 has alpha = 1)."""
    return moments.require_inputs().abs_mean.pow(alpha)


def fisher_input_root(moments: Moments) -> Float[Tensor, "in"]:
    """diag sqrt(sum of F over outputs), as its diagonal (FWSVD; "row" there, whose weights are stored (in, out))."""
    return moments.require_gradients().fisher_in.sqrt()


def fisher_output_metric(moments: Moments, share: float) -> Float[Tensor, "out"]:
    """diag sqrt(sum of F over inputs), shrunk by `share` because an output metric is solved with, not only applied.

    Zero where no output has any Fisher information, see `is_nothing`.
    """
    return shrink(moments.require_gradients().fisher_out, share).sqrt()


def gradient_metric(moments: Moments, share: float) -> Float[Tensor, "out out"] | Float[Tensor, "out"] | BlockDiagonal:
    """A with A^T A = H shrunk by `share`: upper-triangular chol(H)^T. The tail is then in units of the loss.

    Of stacked linears each has its own H, and their gradients at different outputs are taken as uncorrelated. One whose
    gradient is always zero counts next to nothing (FAINT) in the stack; where all are so, and of a single linear, A is
    zero: see `is_nothing`.

    Raises:
        DecompositionError: H is singular even after shrinking (share = 0 on too few tokens).
    """
    covariances = [_covariance_of(gradients, share) for gradients in moments.require_gradients().members]
    scales = torch.stack([covariance.diagonal().double().mean() for covariance in covariances])
    if not scales.any():
        return torch.cat([torch.zeros_like(covariance.diagonal()) for covariance in covariances])
    faint = float((FAINT * scales[scales != 0].mean()).sqrt())
    blocks = [
        _gradient_root(covariance, share) if scale else faint * torch.eye(len(covariance)).to(covariance)
        for covariance, scale in zip(covariances, scales, strict=True)
    ]
    return blocks[0] if len(blocks) == 1 else BlockDiagonal(tuple(blocks))


def is_nothing(metric: Metric) -> bool:
    """Whether A is zero: no error at the outputs counts, and A cannot be solved with.

    So it is for a linear without influence on the loss, as in a block whose output is multiplied by zero.
    """
    return isinstance(metric, Tensor) and not metric.any()


def _covariance_of(gradients: GradientMoments, share: float) -> Float[Tensor, "out out"]:
    """H: in float32 where it was kept so and its shrunk root is as good in it, else in float64."""
    total = gradients.sums.get("gradient_covariance")  # where it is missing, `covariance` says so
    single = total is not None and total.dtype == torch.float32 and share > LEAST_SINGLE_SHRINKAGE
    return gradients.covariance(torch.float32 if single else torch.float64)


def _gradient_root(covariance: Float[Tensor, "out out"], share: float) -> Float[Tensor, "out out"]:
    """In the covariance's type; in float64 where float32 has no root."""
    check_finite(covariance, "gradient covariance")
    factor, info = torch.linalg.cholesky_ex(shrink(covariance, share))
    if int(info) != 0 and covariance.dtype != torch.float64:
        return _gradient_root(covariance.double(), share)
    if int(info) != 0:
        raise DecompositionError(
            f"the gradient covariance {describe(covariance)} is singular at shrinkage {share}; raise the shrinkage"
        )
    return factor.mT


def eigh(moment: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric matrix.

    Raises:
        DecompositionError: an entry is not finite, or the eigensolver failed.
    """
    check_finite(moment, "moment")
    with _converging("eigenvalues", moment):
        values, vectors = torch.linalg.eigh(moment)
    return values, vectors


def eigvalsh(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d"]:
    """The eigenvalues alone, at a third of the cost. Raises as `eigh`."""
    check_finite(moment, "moment")
    with _converging("eigenvalues", moment):
        return torch.linalg.eigvalsh(moment)


def svd(matrix: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m p"], Float[Tensor, "p"], Float[Tensor, "p n"]]:
    """The reduced singular value decomposition. Raises DecompositionError where it did not converge."""
    with _converging("the SVD", matrix):
        basis, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return basis, singular, right


def svdvals(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "p"]:
    """The singular values alone. Raises as `svd`."""
    with _converging("the SVD", matrix):
        return torch.linalg.svdvals(matrix)


@contextmanager
def _converging(what: str, matrix: Tensor) -> Iterator[None]:
    """Inside, a solver that does not converge raises DecompositionError with the matrix's shape and largest entry."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"{what} of a {tuple(matrix.shape)} matrix did not converge; largest entry {matrix.abs().max():.3g}"
        ) from error


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"shrinkage {share} is outside [0, 1]")


def check_finite(matrix: Tensor, what: str) -> None:
    """Raises DecompositionError where an entry is not finite; `what` names the matrix."""
    # Row by row: in one go it takes as much memory again as the matrix has.
    if not all(bool(torch.isfinite(rows).all()) for rows in matrix.split(ROWS_CHECKED)):
        raise DecompositionError(f"the {what} {tuple(matrix.shape)} has entries that are not finite")


def cholesky_in_place(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"] | None:
    """The lower-triangular L, L L^T = moment, written over the moment; what is above its diagonal is no part of it.

    None where there is none in floating point; the moment is lost then too.

    Cost: d^3 / 3 operations, and no memory.
    """
    if moment.device.type == "cpu":
        # LAPACK takes columns one after the other: to it a symmetric matrix's rows are those, and L is the upper half.
        potrf = get_lapack_funcs("potrf", dtype=moment.numpy().dtype)
        with few_threads(moment.numel()):
            info = potrf(moment.numpy().T, lower=False, clean=False, overwrite_a=True)[1]
        return moment if info == 0 else None
    factor, info = torch.linalg.cholesky_ex(moment)
    return factor if int(info) == 0 else None


def times_inverse_root(
    factor: Float[Tensor, "d d"], rows: Float[Tensor, "n d"], *, transposed: bool = False
) -> Float[Tensor, "n d"]:
    """rows L^-T, or transposed rows L^-1, written over the rows: after one another rows (L L^T)^-1.

    Cost: n d^2 operations, and no memory.
    """
    upper = not transposed
    return torch.linalg.solve_triangular(factor.mT if upper else factor, rows, upper=upper, left=False, out=rows)


def describe(matrix: Float[Tensor, "d d"], values: Float[Tensor, "d"] | None = None) -> str:
    """What to know of a symmetric matrix that failed: its shape, its extreme eigenvalues, how symmetric it is.

    Args:
        values: its eigenvalues, where they are known.
    """
    values = torch.linalg.eigvalsh(matrix) if values is None else values
    skew = float((matrix - matrix.mT).abs().max() / matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny))
    return (
        f"{tuple(matrix.shape)} (eigenvalues {float(values[0]):.3g} to {float(values[-1]):.3g}, mean diagonal "
        f"{float(matrix.diagonal().mean()):.3g}, asymmetry {skew:.1g}, on {matrix.device.type})"
    )
