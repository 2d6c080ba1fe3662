"""Metrics: in which norm an error counts. Moments in, roots (input side) and metrics (output side) out.

A root B of an input moment has B B^T = moment; any two roots of one moment give the same factors. A one-dimensional
root or metric is the diagonal of a diagonal matrix. No function here inverts anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.moments import InputMoments, Moments

# Weight of a linear without influence in a stack with others, as a share of theirs: far above what float64 resolves,
# far below what moves a rank.
FAINT = 1e-9


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
    """A times the matrix."""
    if metric is None:
        return matrix
    if isinstance(metric, BlockDiagonal):
        return torch.cat([block @ rows for block, rows in metric.split(matrix)])
    return metric[:, None] * matrix if metric.ndim == 1 else metric @ matrix


def transpose_metric(metric: Metric) -> Metric:
    """A^T."""
    if isinstance(metric, BlockDiagonal):
        return BlockDiagonal(tuple(block.mT for block in metric.blocks))
    return metric if metric is None or metric.ndim == 1 else metric.mT


def solve_metric(metric: Metric, matrix: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
    """A^-1 times the matrix.

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
        return matrix / metric[:, None]
    solved, info = torch.linalg.solve_ex(metric, matrix)
    if int(info) != 0:
        raise singular(metric)
    return solved


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
    _check_finite(moment, "moment")
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
    moment: Float[Tensor, "d d"] | Float[Tensor, "d"], share: float
) -> Float[Tensor, "d d"] | Float[Tensor, "d"]:
    """(1 - share) M + share mean(diag M) I: towards the mean diagonal, so that a singular moment can be solved with.

    A vector is the diagonal of a diagonal matrix and is shrunk alike.

    Raises:
        ValueError: share is outside [0, 1].
    """
    _check_share(share)
    if moment.ndim == 1:
        return (1 - share) * moment + share * moment.mean()
    shrunk = (1 - share) * moment
    shrunk.diagonal().add_(share * moment.diagonal().mean())
    return shrunk


def of_second_moment(root: Callable[[Tensor], Tensor]) -> Callable[[Moments], Tensor]:
    """`root` of the uncentred G = E[x x^T], as a function of moments."""
    return lambda moments: root(moments.require_inputs().second_moment)


class Whitening:
    """The Cholesky root B of an input moment M, B B^T = M, computed when it is asked for.

        M = (1 - share) G + share mean(diag G) I,   or the same of C = G - mu mu^T where it is centred

    What a cut needs is often M alone: the Gram matrix of W B on its output side is W M W^T. Linears that read one input
    share one object, so that moment and root are computed once for all of them.

    Attributes:
        inputs: the moments of the input. share: how far M is shrunk towards its mean diagonal. centred: C instead of G.
    """

    def __init__(self, inputs: InputMoments, share: float = 0.0, *, centred: bool = False) -> None:
        _check_share(share)
        self.inputs, self.share, self.centred = inputs, share, centred
        self._moments: dict[torch.dtype, Tensor] = {}
        self._roots: dict[torch.dtype, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return self.inputs.d_in, self.inputs.d_in

    @property
    def is_single(self) -> bool:
        """Whether the moments were kept in float32, so that float32 is all that is known of M."""
        return self.inputs.keeps("second_moment") == torch.float32

    def moment(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "d d"]:
        """M. Computed in float64, and once for each type.

        Raises:
            DecompositionError: an entry is not finite.
        """
        if dtype not in self._moments:
            matrix = self.inputs.moment(centred=self.centred, dtype=dtype)
            _check_finite(matrix, "moment")
            if self.share:
                matrix = shrink(matrix, self.share)
            self._moments[dtype] = matrix
        return self._moments[dtype]

    def root(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "d d"]:
        """B, by `cholesky_root` in float64."""
        if dtype not in self._roots:
            self._roots[dtype] = cholesky_root(self.moment()).to(dtype)
            if dtype != torch.float64:
                self._moments.pop(torch.float64)
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
    if isinstance(root, Whitening):
        root = root.root(matrix.dtype)
    return matrix * root if root.ndim == 1 else matrix @ root


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
    covariances = [gradients.gradient_covariance for gradients in moments.require_gradients().members]
    scales = torch.stack([covariance.diagonal().mean() for covariance in covariances])
    if not scales.any():
        return torch.cat([torch.zeros_like(covariance.diagonal()) for covariance in covariances])
    faint = (FAINT * scales[scales != 0].mean()).sqrt()
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


def _gradient_root(covariance: Float[Tensor, "out out"], share: float) -> Float[Tensor, "out out"]:
    _check_finite(covariance, "gradient covariance")
    factor, info = torch.linalg.cholesky_ex(shrink(covariance, share))
    if int(info) != 0:
        raise DecompositionError(
            f"the gradient covariance {tuple(covariance.shape)} is singular at shrinkage {share}; raise the shrinkage"
        )
    return factor.mT


def anchored_target(
    weight: Float[Tensor, "out in"],
    cross: Float[Tensor, "in in"],
    moment: Float[Tensor, "in in"],
    share: float,
) -> Float[Tensor, "out in"]:
    """T = W X Gh^-1: the best linear read-out of the dense output W x from the compressed model's input xh.

    Args:
        cross: X = E[x xh^T] (or its centred form). moment: Gh = E[xh xh^T] (centred alike).
        share: both are shrunk by it towards the mean diagonal of Gh before the solve, so share -> 1 gives T = W.

    Raises:
        DecompositionError: Gh is singular even after shrinking, or an entry of it is not finite.
    """
    _check_finite(moment, "input moment")
    scale = share * moment.diagonal().mean()
    mixed = (1 - share) * cross
    mixed.diagonal().add_(scale)
    factor, info = torch.linalg.cholesky_ex(shrink(moment, share))
    if int(info) != 0:
        raise DecompositionError(
            f"the input moment {tuple(moment.shape)} is singular at shrinkage {share}; "
            "raise the shrinkage or calibrate on more tokens"
        )
    return torch.cholesky_solve((weight @ mixed).mT, factor).mT


def eigh(moment: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric matrix.

    Raises:
        DecompositionError: an entry is not finite, or the eigensolver failed.
    """
    _check_finite(moment, "moment")
    try:
        values, vectors = torch.linalg.eigh(moment)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"eigenvalues of a {tuple(moment.shape)} matrix did not converge; largest entry {moment.abs().max():.3g}"
        ) from error
    return values, vectors


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"shrinkage {share} is outside [0, 1]")


def _check_finite(matrix: Tensor, what: str) -> None:
    if not torch.isfinite(matrix).all():
        raise DecompositionError(f"the {what} {tuple(matrix.shape)} has entries that are not finite")
