"""Pivoting: a rank-r map by r of its own rows and the other rows' coefficients in them.

M = left right has rank r, so some r of its rows, the pivots, span all its rows:  M_others = coefficients M_pivots.
The pivots and the coefficients are r d_in + (d_out - r) r numbers instead of r (d_out + d_in), and as many
multiply-accumulates per token; the map is the same one. (Zhao et al., PIFA, arXiv 2501.19090)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.lowrank.bands import wide_product
from eckart.lowrank.factors import Factors
from eckart.lowrank.threads import few_threads

Layout = Literal["plain", "pivoted"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# Coefficients above this are swapped away. They multiply the rounding of the stored pivots; 10 is a decimal digit, and
# far above what pivoted QR gives (about 2 on trained weights), so that a swap is rare.
LARGEST_COEFFICIENT = 10.0
# What elimination may lose of a map, as a share of its norm: far above rounding, far below the weights' own.
ELIMINATED = 1e-9


def num_stored(d_out: int, d_in: int, rank: int, layout: Layout) -> int:
    """Numbers that a rank-`rank` map stores, without a bias: r (d_out + d_in) plain, r (d_out + d_in - r) pivoted.

    Linears that share a right factor count as one map: d_out is then the sum of theirs.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    return rank * (d_out + d_in - (rank if layout == "pivoted" else 0))


def pivoted_rank_for(keep: float, d_out: int, d_in: int) -> int:
    """Largest rank whose pivoted layout holds the share `keep` of d_out d_in numbers; at least 1.

    r (d_out + d_in - r) <= keep d_out d_in  gives  r = ((m + n) - sqrt((m + n)^2 - 4 keep m n)) / 2, rounded down, with
    m = d_out and n = d_in. keep = 1 gives min(m, n). The root is taken in whole numbers: where m = n and keep is nearly
    1, a float's would be wrong in its eighth digit. A share such as 0.58 is no binary fraction; what falls short of a
    whole number only by that counts as one.

    Raises:
        ValueError: keep is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is outside (0, 1]: it is a share of the {d_out} x {d_in} weight's numbers")
    side = d_out + d_in
    square = side * side - 4 * math.floor(round(keep * d_out * d_in, 5))
    root = math.isqrt(square)
    return max(1, (side - root - (root * root < square)) // 2)


@dataclass(frozen=True)
class Pivoted:
    """The linear map `x -> y + bias` with y = [p, coefficients p] in the order `order`, p = pivots x.

    Attributes:
        pivots: (rank, d_in), rows of the map (of the whole stacked map, where linears share them).
        coefficients: (d_out - k, rank), where k rows of this map are pivots: k = rank unless the pivots are shared.
        order: (d_out,) int64. Output i is entry order[i] of [p, coefficients p]: below rank a pivot, else combined.
        bias: (d_out,) or None, as in Factors.

    Raises:
        ValueError: the shapes do not fit together, or the order names an entry that is not there, or one twice, or
            leaves a combination out.
    """

    pivots: Float[Tensor, "rank in"]
    coefficients: Float[Tensor, "others rank"]
    order: Int[Tensor, "out"]
    bias: Float[Tensor, "out"] | None = None

    def __post_init__(self) -> None:
        shapes = f"pivots {tuple(self.pivots.shape)} and coefficients {tuple(self.coefficients.shape)}"
        if self.pivots.ndim != 2 or self.coefficients.ndim != 2 or self.coefficients.shape[1] != self.rank:
            raise ValueError(f"{shapes} do not chain: expected (rank, d_in) and (others, rank)")
        check_order(self.order, self.rank, len(self.coefficients))
        if self.bias is not None and self.bias.shape != (self.d_out,):
            raise ValueError(f"bias has shape {tuple(self.bias.shape)}, expected ({self.d_out},)")

    def __repr__(self) -> str:
        bias = "" if self.bias is None else ", with a bias"
        return f"Pivoted({self.d_out} x {self.d_in}, rank {self.rank}{bias})"

    @property
    def d_out(self) -> int:
        return self.order.shape[0]

    @property
    def d_in(self) -> int:
        return self.pivots.shape[1]

    @property
    def rank(self) -> int:
        return self.pivots.shape[0]

    @property
    def own_pivots(self) -> int:
        """How many of the pivots are rows of this map: all, unless they are shared."""
        return self.d_out - self.coefficients.shape[0]

    @property
    def num_params(self) -> int:
        """Numbers stored: rank (d_out + d_in - rank), and d_out more for a bias; shared pivots count in every member.

        The order is not counted: it is d_out whole numbers, against rank times as many.
        """
        return self.pivots.numel() + self.coefficients.numel() + (0 if self.bias is None else self.bias.numel())

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        p = x @ self.pivots.T
        y = torch.cat([p, p @ self.coefficients.T], -1)[..., self.order]
        return y if self.bias is None else y + self.bias

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix of the map. Cost: 2 (d_out - k) rank d_in operations."""
        return torch.cat([self.pivots, self.coefficients @ self.pivots])[self.order]

    def rows(self, place: slice) -> Float[Tensor, "rows in"]:
        """Some rows of the matrix, in float64."""
        entries = self.order[place]
        combined = entries >= self.rank
        rows = torch.empty(len(entries), self.d_in, dtype=torch.float64, device=self.pivots.device)
        rows[~combined] = self.pivots[entries[~combined]].double()
        rows[combined] = wide_product(self.coefficients[entries[combined] - self.rank], self.pivots)
        return rows

    def factors(self) -> Factors:
        """The same map as a plain pair: left has the coefficients, and a unit row for every pivot."""
        unit = torch.eye(self.rank, dtype=self.coefficients.dtype, device=self.coefficients.device)
        return Factors(torch.cat([unit, self.coefficients])[self.order], self.pivots, self.bias)

    def to(self, dtype: torch.dtype) -> Pivoted:
        """The same map in another type; the order stays as it is."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Pivoted(self.pivots.to(dtype), self.coefficients.to(dtype), self.order, bias)


def check_order(order: Tensor, rank: int, others: int) -> None:
    """Raises ValueError unless `order` takes each of `others` combinations once and any pivot at most once.

    Args:
        order: (d_out,) of whole numbers; entries below `rank` name pivots, those from `rank` on combinations.
    """
    kinds = (torch.int32, torch.int64)
    if order.ndim != 1 or order.dtype not in kinds:
        raise ValueError(f"an order is a vector of int32 or int64, not {order.dtype} of shape {tuple(order.shape)}")
    entries = order.cpu().long().sort().values
    combinations = entries[entries >= rank]
    pivots = entries[entries < rank]
    valid = torch.equal(combinations, torch.arange(rank, rank + others)) and bool((pivots >= 0).all())
    if not valid or len(pivots.unique()) != len(pivots):
        raise ValueError(
            f"an order of {len(order)} outputs must take each of {rank} ... {rank + others - 1} once, and entries of "
            f"0 ... {rank - 1} at most once"
        )


def pivot(factors: Factors) -> Pivoted:
    """The pivoted layout of `factors`: the same map, in float64, with pivots and other rows in ascending order.

    The rows of left right are those of left S^T in other coordinates, where right^T = Q S is a QR decomposition, so the
    d_out x d_in product is never formed. Column-pivoted QR of (left S^T)^T chooses the pivots and gives the
    coefficients. Where one is larger than LARGEST_COEFFICIENT in size, its row and its pivot change places: that
    multiplies the volume of the pivots by it, so it comes to an end (strong rank-revealing QR; Gu and Eisenstat, SIAM
    J. Sci. Comput. 17, 1996).

    Factors whose product has less rank than they have columns, as far as float64 can tell, keep `rank` pivots: those
    beyond the rank of the product are stored as they are, and no other row has a part of them.

    Raises:
        ValueError: rank exceeds d_out, so that there are not enough rows; or an entry is not finite.

    On a GPU the pivots are those of Gaussian elimination; where a coefficient of theirs is above LARGEST_COEFFICIENT,
    or rounding decided on one, the CPU chooses.

    Cost: on the CPU about 2 d_out rank^2 operations for the QR decomposition and as many for the geometry.
    """
    rank, d_out = factors.rank, factors.d_out
    if rank > d_out:
        raise ValueError(f"rank {rank} exceeds d_out = {d_out}: a pivoted map stores {rank} of its own rows")
    left, right = factors.left.double(), factors.right.double()
    triangle = torch.linalg.qr(right.mT, mode="r").R
    on_device = left @ triangle.mT
    if not torch.isfinite(on_device).all():
        raise ValueError(f"factors of a {d_out} x {factors.d_in} map of rank {rank} have entries that are not finite")
    chosen = _choose_by_elimination(on_device) if on_device.is_cuda else None
    with few_threads(on_device.numel()):
        pivots, others, combined = _choose(on_device.cpu().numpy(), rank) if chosen is None else chosen
    # Ascending order on both sides makes the layout a function of the map and its pivots alone.
    columns, rows = np.argsort(pivots), np.argsort(others)
    pivots, others = pivots[columns], others[rows]
    order = np.empty(d_out, dtype=np.int64)
    order[pivots] = np.arange(rank)
    order[others] = np.arange(rank, d_out)
    device = left.device
    row_places, column_places = (torch.from_numpy(each).to(combined.device) for each in (rows, columns))
    return Pivoted(
        pivots=left[torch.from_numpy(pivots).to(device)] @ right,
        coefficients=combined[row_places][:, column_places].contiguous().to(device),
        order=torch.from_numpy(order).to(device),
        bias=None if factors.bias is None else factors.bias.double(),
    )


def split(whole: Factors | Pivoted, sizes: Sequence[int]) -> list[Factors] | list[Pivoted]:
    """The members of a stacked map, [M_1; M_2; ...] with `sizes` rows each, which share one right factor.

    Plain members have the same `right`. Pivoted members have the same `pivots`, of which some are rows of theirs, and
    coefficients for their other rows; stacked, they are the whole again, and store each of its numbers once.

    Raises:
        ValueError: the sizes are not positive, or do not add up to d_out.
    """
    if min(sizes, default=0) < 1 or sum(sizes) != whole.d_out:
        raise ValueError(f"a map of {whole.d_out} rows does not split into {list(sizes)}")
    biases = [None] * len(sizes) if whole.bias is None else list(whole.bias.split(list(sizes)))
    if isinstance(whole, Factors):
        lefts = whole.left.split(list(sizes))
        return [Factors(left, whole.right, bias) for left, bias in zip(lefts, biases, strict=True)]
    members = []
    for order, bias in zip(whole.order.split(list(sizes)), biases, strict=True):
        combined = order >= whole.rank
        own = order.clone()
        own[combined] = torch.arange(whole.rank, whole.rank + int(combined.sum()), device=order.device)
        members.append(Pivoted(whole.pivots, whole.coefficients[order[combined] - whole.rank], own, bias))
    return members


def _choose_by_elimination(geometry: Float[Tensor, "out rank"]) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
    """As `_choose`, by elimination with row pivoting: P G = [L1; L2] U, and the coefficients L2 L1^-1.

    The matrix is made square by columns of the identity, which change nothing in the steps before them: torch gives
    tall ones to a library that is not meant for that size, and square ones to cuSOLVER.

    None where the answer would be no good: a pivot is within rounding of zero, a coefficient is too large, or the other
    rows are not these combinations of the pivots.
    """
    d_out, rank = geometry.shape
    square = torch.eye(d_out, dtype=geometry.dtype, device=geometry.device)
    square[:, :rank] = geometry
    factor, swaps, _ = torch.linalg.lu_factor_ex(square)
    factor = factor[:, :rank]
    diagonal, resolution = factor.diagonal().abs(), d_out * torch.finfo(torch.float64).eps
    if not bool((diagonal > resolution * diagonal.max()).all()):
        return None
    combined = torch.linalg.solve_triangular(factor[:rank], factor[rank:], upper=False, left=False, unitriangular=True)
    if combined.numel() and not float(combined.abs().max()) <= LARGEST_COEFFICIENT:
        return None
    rows = np.arange(d_out)
    for place, other in enumerate(swaps.cpu().numpy() - 1):  # LAPACK counts from one
        rows[[place, other]] = rows[[other, place]]
    pivots, others = rows[:rank], rows[rank:]
    kept, made = (geometry[torch.from_numpy(each).to(geometry.device)] for each in (pivots, others))
    if not float((combined @ kept - made).norm()) <= ELIMINATED * float(geometry.norm()):
        return None
    return pivots, others, combined


def _choose(geometry: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """`rank` rows of `geometry` (d_out, p), the other rows, and the coefficients (others, rank) of those in them."""
    triangle, permutation = scipy.linalg.qr(geometry.T, mode="r", pivoting=True)
    diagonal = np.abs(np.diagonal(triangle))[:rank]
    # Directions below rounding of the largest carry nothing: a combination of theirs would divide noise by noise.
    resolution = max(geometry.shape) * np.finfo(np.float64).eps
    resolved = int((diagonal > resolution * diagonal[0]).sum())
    basis, spare, others = permutation[:resolved].copy(), permutation[resolved:rank], permutation[rank:].copy()
    # The rows in the directions that were resolved.
    rows = np.empty((len(geometry), resolved))
    rows[permutation] = triangle[:resolved].T
    combined = np.zeros((len(others), resolved))
    if resolved and len(others):
        combined = scipy.linalg.solve_triangular(triangle[:resolved, :resolved], triangle[:resolved, rank:]).T
    while np.abs(combined).max(initial=0.0) > LARGEST_COEFFICIENT:
        _exchange(basis, others, combined)
        combined = scipy.linalg.lu_solve(scipy.linalg.lu_factor(rows[basis].T), rows[others].T).T
    padded = np.zeros((len(others), rank))
    padded[:, :resolved] = combined
    return np.concatenate([basis, spare]), others, torch.from_numpy(padded)


def _exchange(basis: np.ndarray, others: np.ndarray, combined: np.ndarray) -> None:
    """Swap basis rows with other rows until no coefficient is above LARGEST_COEFFICIENT; all three change in place.

    With c = combined[i, j], row i enters for pivot j:  p_j = (row_i - sum over l != j of combined[i, l] p_l) / c, which
    is put into every other row. Cost: (d_out - rank) rank operations each.
    """
    while True:
        i, j = np.unravel_index(np.abs(combined).argmax(), combined.shape)
        c = combined[i, j]
        if abs(c) <= LARGEST_COEFFICIENT:
            return
        basis[j], others[i] = others[i], basis[j]
        entering = combined[i] / c
        entering[j] = 1 - 1 / c
        combined -= np.outer(combined[:, j], entering)
        combined[i] = -entering
        combined[i, j] = 1 / c
