"""Anchor: what a linear is to give for the compressed model's input xh, to come nearest to W x of the dense one.

All of it is written in the difference of the two inputs, which is small where the compressed model is any good, so that
nothing here is a small difference of large numbers and float32 is enough.

    E = E[(x - xh) xh^T],   D = E[(x - xh)(x - xh)^T],   Gh = E[xh xh^T]      (centred: about the means)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.float32 import full_float32, partial_trace
from eckart.lowrank.input_moments import NORMALISED_ROWS, InputMoments
from eckart.lowrank.metrics import (
    DecompositionError,
    check_finite,
    cholesky_in_place,
    describe,
    eigh,
    shrink,
    times_inverse_root,
)

# An input of which every entry varies by less than this share of its square is constant: twice the rounding of float32
# (6e-8), squared.
CONSTANT = 1.5e-14
# The float32 solution of V Gh = P is taken where V Gh and P are as near as this on random vectors.
LARGEST_RESIDUAL = 1e-5
PROBES = 8
# Outputs whose error is computed at a time: what is in between is a small part of the weight then.
OUTPUTS = 1024
# Rows of E, D and Gh that are multiplied at a time.
ROWS = 512
# Bytes of E, D and Gh up to which they and the factor are kept in main memory, for the linears that read one input. Of
# a wider one, which is that of one linear as a rule, they are made of the sums each time that they are needed.
KEPT = 2**30


class Anchor:
    """The anchored target T of any linear that reads the input, and the loss that it leaves.

        T = W ((1 - share) X + share m I) ((1 - share) Gh + share m I)^-1,   X = E[x xh^T], m = mean diag Gh
          = W + (1 - share) W E ((1 - share) Gh + share m I)^-1

    Linears that read one input share one object, so that the moments are prepared and factored once for all of them.

    Args:
        inputs: with a reference stream. share: of the shrinkage; 1 gives T = W. centred: about the means.

    Memory: of inputs up to KEPT a (d_in, d_in) factor and three such matrices, in the float type that was asked for
    last.
    """

    def __init__(self, inputs: InputMoments, share: float, *, centred: bool = False) -> None:
        self.inputs, self.share, self.centred = inputs, share, centred
        self._matrices: tuple[Tensor, Tensor, Tensor] | None = None
        self._factored: tuple[torch.dtype, Tensor | None] | None = None
        self._takes_float64 = False

    @property
    def is_single(self) -> bool:
        """Whether the moments were kept in float32, so that float32 is all that is known of them."""
        names = ("covariance", "cross_covariance", "reference_covariance")
        return all(self.inputs.keeps(name) == torch.float32 for name in names)

    @property
    def is_constant(self) -> bool:
        """Whether xh is always zero (centred: the same for every token). It tells nothing of x then, and T is W."""
        variances = self.inputs.variances(centred=self.centred)
        return bool((variances <= CONSTANT * self.inputs.variances()).all())

    def target(self, weighted: Float[Tensor, "out in"]) -> Float[Tensor, "out in"] | None:
        """A T, given A W. In the matrix's type; None where float32 is not enough.

        Raises:
            DecompositionError: Gh is singular even after shrinking, or an entry of it is not finite.
        Cost: two products of 2 d_out d_in^2 operations.
        """
        solved = self._solve(weighted)
        return None if solved is None else solved[0]

    def target_and_floor(self, weighted: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], float] | None:
        """(A T, the loss that no rank removes E||A (W x - T xh)||^2), given A W; None where float32 is not enough.

        With V = A (T - W) and L the Cholesky factor of the shrunk Gh, both known once T is,

            E||A (W x - T xh)||^2 = trace(A W D W^T A^T) - (||V L||^2 + share m ||V||^2) / (1 - share).

        Raises: as `target`. Cost: as that, and d_out d_in^2 operations.
        """
        solved = self._solve(weighted)
        if solved is None:
            return None
        lost = torch.zeros((), dtype=torch.float64, device=weighted.device)
        with full_float32():
            for place, (_, spread, _) in self._blocks(weighted.dtype):
                for rows in weighted.split(OUTPUTS):
                    lost += partial_trace(rows, spread, place)
        return solved[0], max(float(lost) - solved[1], 0.0)

    def _solve(self, weighted: Tensor) -> tuple[Tensor, float] | None:
        """(A T, by how much it lowers the loss of A W), in the matrix's type; None where float32 is not enough.

        Where it was not for one linear it is not tried for the others that read this input.
        """
        if self.is_constant or self.share == 1:
            return weighted, 0.0
        single = weighted.dtype == torch.float32
        factor = None if single and self._takes_float64 else self._factor(weighted.dtype)
        if factor is None:
            self._takes_float64 = True
            return None
        sought = torch.zeros_like(weighted)
        with full_float32():
            for place, (change, _, _) in self._blocks(weighted.dtype):
                sought.addmm_(weighted[:, place], change, alpha=1 - self.share)
        probes = self._probe(sought) if single else None
        with full_float32():
            half = times_inverse_root(factor, sought)
            gained = _squared_norm(half)
            moved = times_inverse_root(factor, half, transposed=True)
        if probes is not None and not self._is_solution(moved, *probes):
            self._takes_float64 = True
            return None
        if self.share:
            gained += self.share * float(self.inputs.variances(centred=self.centred).mean()) * _squared_norm(moved)
        return moved.add_(weighted), gained / (1 - self.share)

    def error(self, weight: Float[Tensor, "out in"], other: Float[Tensor, "out in"]) -> float:
        """E||W x - M xh||^2 (centred: about the means) of any matrix M, given W and M.

        What is small is multiplied in W's type, and M - W, which is to cancel the loudest inputs, in M's.

        Cost: 4 d_out d_in^2 operations, of which a quarter is saved by symmetry.
        """
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        with full_float32():
            for place, (change, spread, moment) in self._blocks(weight.dtype):
                for rows, replaced in zip(weight.split(OUTPUTS), other.split(OUTPUTS), strict=True):
                    moved = replaced - rows
                    crossed = ((rows[:, place] @ change) * moved).sum(dtype=torch.float64)
                    total += partial_trace(rows, spread, place) - 2 * crossed + partial_trace(moved, moment, place)
        return float(total)

    def energy(self, weight: Float[Tensor, "out in"]) -> float:
        """E||W x||^2."""
        return self.inputs.energy(weight, reference=True)

    def _probe(self, sought: Tensor) -> tuple[Tensor, Tensor]:
        """(random vectors, (d_in, PROBES); `sought` times them), in float64."""
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(sought.shape[1], PROBES, generator=generator, dtype=torch.float64).to(sought.device)
        return probes, torch.cat([rows.double() @ probes for rows in sought.split(OUTPUTS)])

    def _is_solution(self, moved: Tensor, probes: Tensor, expected: Tensor) -> bool:
        """Whether `moved` times the shrunk Gh is what was sought, on random vectors, in float64."""
        variances = self.inputs.variances(centred=self.centred)
        moment = (1 - self.share) * self.inputs.apply_moment(probes, centred=self.centred)
        moment += self.share * variances.mean() * probes
        given = torch.cat([rows.double() @ moment for rows in moved.split(OUTPUTS)])
        return bool((given - expected).norm() <= LARGEST_RESIDUAL * expected.norm())

    def _factor(self, dtype: torch.dtype) -> Tensor | None:
        """The Cholesky factor of the shrunk Gh; None where float32 has none.

        A covariance is known to the rounding of its sums, which is largest for 16-bit inputs on tensor cores: its least
        eigenvalues may come out below zero. They count as zero then, as in `eigen_root`.
        """
        if self._factored is not None and self._factored[0] == dtype:
            return self._factored[1]
        self._factored = None  # before the other one is made
        moment = self.inputs.moment(centred=self.centred, dtype=dtype)
        check_finite(moment, "input moment")
        factor = cholesky_in_place(shrink(moment, self.share, in_place=True))
        del moment
        if factor is None and dtype != torch.float32:
            factor = self._factor_of_eigenvalues()
        if self._is_kept(dtype):
            self._factored = (dtype, factor)
        return factor

    def _factor_of_eigenvalues(self) -> Tensor:
        moment = self.inputs.moment(centred=self.centred)
        values, vectors = eigh(moment)
        shrunk = (1 - self.share) * values.clamp_min(0) + self.share * moment.diagonal().mean()
        if not shrunk[0] > torch.finfo(moment.dtype).eps * shrunk[-1]:
            raise DecompositionError(
                f"the input moment {describe(moment, values)} is singular at shrinkage {self.share}; "
                "raise the shrinkage or calibrate on more tokens"
            )
        return torch.linalg.qr((vectors * shrunk.sqrt()).mT, mode="r").R.mT

    def _is_kept(self, dtype: torch.dtype) -> bool:
        """Whether matrices of this size are kept for the next linear."""
        return self.inputs.mean.device.type != "cpu" or 3 * self.inputs.d_in**2 * dtype.itemsize <= KEPT

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
        """ROWS rows of E, D and Gh at a time, computed in float64 and given in `dtype`, and which.

        Matrices that are kept are those of the type that was asked for last.
        """
        size, device = self.inputs.d_in, self.inputs.mean.device
        if not self._is_kept(dtype):
            yield from self._rows(dtype)
            return
        if self._matrices is None or self._matrices[0].dtype != dtype:
            self._matrices = None  # before the others are made
            change, spread, moment = (torch.empty(size, size, dtype=dtype, device=device) for _ in range(3))
            for place, rows in self._rows(dtype):
                change[place], spread[place], moment[place] = rows
            self._matrices = (change, spread, moment)
        change, spread, moment = self._matrices
        for start in range(0, size, ROWS):
            place = slice(start, min(start + ROWS, size))
            yield place, (change[place], spread[place], moment[place])

    def _rows(self, dtype: torch.dtype) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
        """As `_blocks`, made of the sums."""
        sums, count, size = self.inputs.sums, self.inputs.total, self.inputs.d_in
        own, cross, reference = (sums[name] for name in ("covariance", "cross_covariance", "reference_covariance"))
        mean, shift = self.inputs.mean, self.inputs.reference_mean - self.inputs.mean
        for first in range(0, size, ROWS):
            block = slice(first, min(first + ROWS, size))
            made = [torch.empty(block.stop - first, size, dtype=dtype, device=mean.device) for _ in range(3)]
            for start in range(first, block.stop, NORMALISED_ROWS):
                place = slice(start, min(start + NORMALISED_ROWS, block.stop))
                moment = own[place].to(torch.float64, copy=True).div_(count)
                change = cross[place].to(torch.float64, copy=True).div_(count).sub_(moment)
                # About the means D = R - X - X^T + Ch = R - E - X^T.
                spread = reference[place].to(torch.float64, copy=True).sub_(cross[:, place].mT).div_(count).sub_(change)
                if not self.centred:
                    moment.addr_(mean[place], mean)
                    change.addr_(shift[place], mean)
                    spread.addr_(shift[place], shift)
                for rows, part in zip(made, (change, spread, moment), strict=True):
                    rows[start - first : place.stop - first] = part
            yield block, (made[0], made[1], made[2])


def _squared_norm(matrix: Tensor) -> float:
    """The sum of the squared entries, in float64, without a copy of them all."""
    return sum(float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 for rows in matrix.split(OUTPUTS))
