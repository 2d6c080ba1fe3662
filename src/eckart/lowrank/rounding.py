"""Rounding: a matrix, or a pair of factors, in few bits, so that what it gives for its inputs changes least.

    minimise over codes:  E||(T - Q) x||^2 = tr (T - Q) M (T - Q)^T,   M = E[x x^T]

Column after column is rounded, and what that loses is taken up by the columns that are not rounded yet (Frantar et
al., GPTQ, arXiv 2210.17323, after Hassibi and Stork's optimal brain surgeon). T need not be the weight: in anchored
order it is what comes nearest to the dense model's outputs on the compressed model's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.bands import wide_product
from eckart.lowrank.codes import SCALE, Block, Codes, block_scales, check_bits, round_nearest, spread, to_codes
from eckart.lowrank.factors import Factors
from eckart.lowrank.metrics import check_finite, shrink
from eckart.lowrank.storage import Storage

# Of the mean diagonal, added to the moment: with less, errors pile up on inputs that the text hardly uses.
DAMPING = 0.01
# Columns whose rounding is passed on to those after them in one product.
TOGETHER = 128


def round_compensated(
    target: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    bits: int,
    block: Block,
    *,
    damping: float = DAMPING,
) -> Codes:
    """Codes of a matrix that reads inputs of this second moment.

    Args:
        target: T. moment: M, or a covariance.
        bits, block: of the codes; either the rows or the columns of a block are 1.

    Raises:
        ValueError: bits or a block that do not go, or an entry that is not finite.
        DecompositionError: an entry of the moment is not finite.

    Cost: a Cholesky factor and its inverse, 2/3 d_in^3 operations in float64, and d_out d_in^2.
    """
    check_bits(bits, max(block))
    check_finite(moment, "moment")
    if not bool(moment.diagonal().any()):
        return round_nearest(target, bits, block)
    d_out, d_in = target.shape
    down, across = block
    passed_on = _passed_on(moment, damping).to(torch.promote_types(target.dtype, torch.float32))
    weights = passed_on.diagonal().square().reciprocal()
    values = target.to(passed_on.dtype, copy=True)
    codes = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    scales = torch.zeros(-(-d_out // down), -(-d_in // across), dtype=SCALE, device=target.device)
    for start in range(0, d_in, TOGETHER):
        stop = min(start + TOGETHER, d_in)
        errors = torch.empty(d_out, stop - start, dtype=values.dtype, device=values.device)
        for column in range(start, stop):
            if column % across == 0:
                group = slice(column, min(column + across, d_in))
                # Those beyond this round have not been told of its errors yet.
                ahead = values[:, group]
                if group.stop > stop and column > start:
                    ahead = ahead.clone()
                    ahead[:, stop - column :] -= (
                        errors[:, : column - start] @ passed_on[start:column, stop : group.stop]
                    )
                at = column // across
                scales[:, at : at + 1] = block_scales(ahead, bits, (down, group.stop - column), weights=weights[group])
            own = spread(
                scales[:, column // across : column // across + 1].to(values.dtype), values[:, :1].shape, (down, 1)
            )
            read = values[:, column : column + 1]
            codes[:, column : column + 1] = to_codes(read, own, bits)
            error = (read - codes[:, column : column + 1].to(values.dtype) * own) / passed_on[column, column]
            errors[:, column - start : column - start + 1] = error
            values[:, column + 1 : stop] -= error * passed_on[column, column + 1 : stop]
        values[:, stop:] -= errors @ passed_on[start:stop, stop:]
    return Codes(codes, scales, bits, block)


def _passed_on(moment: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """Upper triangular U, U^T U = (M + damping mean diag M I)^-1: row j says what column j's error is to the others.

    With R upper triangular and R R^T = M, U = R^-1, and R is the Cholesky factor of M read backwards.
    """
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    damped = moment.double() + damping * moment.double().diagonal().mean() * identity
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


@dataclass(frozen=True)
class CodedFactors:
    """The map `x -> base x + left (right x) + bias` as it is stored, in few bits.

    Attributes:
        storage: the bits of each part.
        base: (d_out, d_in), or None for none of it.
        left, right: (d_out, rank) and (rank, d_in), or None for none. Codes, or numbers of a float type.
        bias: (d_out,) or None; comes on top of the layer's own.
    """

    storage: Storage
    base: Codes | None
    left: Codes | Tensor | None
    right: Codes | Tensor | None
    bias: Float[Tensor, "out"] | None = None

    @property
    def d_out(self) -> int:
        return self._any(0)

    @property
    def d_in(self) -> int:
        return self._any(1)

    @property
    def rank(self) -> int:
        return 0 if self.right is None else self.right.shape[0]

    def _any(self, axis: int) -> int:
        if self.base is not None:
            return self.base.shape[axis]
        side = self.left if axis == 0 else self.right
        assert side is not None
        return side.shape[axis]

    def dense(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        """All of it but the bias, multiplied out."""
        total = None if self.base is None else self.base.dense(dtype)
        if self.left is not None and self.right is not None:
            product = numbers(self.left, dtype) @ numbers(self.right, dtype)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def rows(self, place: slice) -> Float[Tensor, "rows in"]:
        """Some rows of `dense`, in float64. Cost: of it, the right factor in float64 each time."""
        total = None if self.base is None else self.base.rows(place)
        if self.left is not None and self.right is not None:
            left = self.left.rows(place) if isinstance(self.left, Codes) else self.left[place]
            product = wide_product(left, numbers(self.right, torch.float64))
            total = product if total is None else total.add_(product)
        assert total is not None
        return total


def numbers(side: Codes | Tensor, dtype: torch.dtype) -> Tensor:
    """A factor's numbers in a type."""
    return side.dense(dtype) if isinstance(side, Codes) else side.to(dtype)


def code_factors(
    factors: Factors, target: Float[Tensor, "out in"], moment: Float[Tensor, "in in"] | None, bits: int, group: int
) -> tuple[Codes, Codes]:
    """(left, right) in few bits, of a pair that approximates `target` on inputs of this second moment.

    The right factor is rounded first. The left one is then fit anew to what the right one gives,

        L = T M R^T (R M R^T)^-1,

    so that it takes up what rounding lost, and rounded in turn on the inputs that it reads, of moment R M R^T.

    Args:
        target: what the pair is to approximate; W, or what is left of it beyond a quantised base.
        moment: None for the identity.
        group: numbers of a row of `right`, and of a column of `left`, that share a scale.

    Cost: as `round_compensated` of the right factor, and 2 d_out d_in (d_in + rank).
    """
    balanced = factors.balanced()
    if moment is None:
        right = round_nearest(balanced.right, bits, (1, group))
        weighed = right.dense(target.dtype)
    else:
        right = round_compensated(balanced.right, moment, bits, (1, group))
        weighed = right.dense(target.dtype) @ moment.to(target.dtype)
    read = shrink(weighed.double() @ right.dense(torch.float64).mT, 1e-8)
    solution, info = torch.linalg.solve_ex(read, (weighed @ target.mT).double())
    left = solution.mT
    if int(info) != 0 or not bool(torch.isfinite(left).all()):
        left = balanced.left.double()  # nothing comes through the right factor: any left one is as good
    return round_compensated(left.to(balanced.left.dtype), read, bits, (group, 1)), right
