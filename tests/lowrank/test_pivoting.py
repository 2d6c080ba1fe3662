"""The pivoted layout: the same map in fewer numbers, by rows of its own, for any factors whatever."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import Factors, Pivoted, num_stored, pivot, pivoted_rank_for, rank_for, split
from eckart.lowrank.pivoting import LARGEST_COEFFICIENT, LAYOUTS

from .reference import laws

# "scaled": sizes over twelve decades. "orthonormal": what a truncated SVD gives. "deficient": the product has less rank
# than the factors have columns, by the left or by the right factor.
KINDS = (
    "normal", "orthonormal", "scaled rows", "scaled columns", "near copies",
    "deficient left", "deficient right", "zero rows", "zero",
)  # fmt: skip
FULL_RANK = KINDS[:5]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_factors(kind: str, d_out: int, d_in: int, rank: int, *, seed: int = 0, biased: bool = False) -> Factors:
    """Factors of that kind; rank <= d_out, but it may exceed d_in."""
    left, right = normal(d_out, rank, seed=seed), normal(rank, d_in, seed=seed + 1)
    sizes = torch.logspace(-6, 6, d_out, dtype=torch.float64)
    if kind == "orthonormal":
        left = torch.linalg.qr(left).Q
    elif kind == "scaled rows":
        left = left * sizes[:, None]
    elif kind == "scaled columns":  # the factors are far from balanced, and so are the directions among themselves
        left, right = left * sizes[:rank], right / sizes[:rank, None].flip(0)
    elif kind == "near copies":  # rows that are nearly the same: a bad choice of pivots has huge coefficients
        left = left[:1] + 1e-5 * left
    elif kind == "deficient left":
        left[:, -1] = left[:, 0] if rank > 1 else 0.0
    elif kind == "deficient right":
        right[-1] = right[0] if rank > 1 else 0.0
    elif kind == "zero rows":
        left[::2] = 0.0
    elif kind == "zero":
        left = torch.zeros_like(left)
    return Factors(left, right, normal(d_out, seed=seed + 2) if biased else None)


@st.composite
def factored(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Factors:
    d_out, d_in = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, d_out))
    return make_factors(
        draw(st.sampled_from(kinds)), d_out, d_in, rank, seed=draw(st.integers(0, 999)), biased=draw(st.booleans())
    )


def assert_same_map(matrix: Tensor, factors: Factors) -> None:
    """Equal up to the rounding of the largest terms of the product."""
    largest = float((factors.left.abs() @ factors.right.abs()).max())
    torch.testing.assert_close(matrix, factors.dense(), rtol=0, atol=1e-9 * largest)


def maximal_volume(rank: int, size: int) -> Tensor:
    """(size, rank) rows on which pivoted QR's choice is known to be poor: Kahan's matrix, transposed, over its copy.

    Its columns come in pivoted QR's order already, and their coefficients grow like 2^rank.
    """
    s, c = 0.8, 0.6
    kahan = np.diag(s ** np.arange(rank)) @ (np.eye(rank) - c * np.triu(np.ones((rank, rank)), 1))
    # A hair smaller from column to column, so that rounding does not reorder them.
    kahan = kahan * (1 - 1e-9) ** np.arange(rank)
    last = np.zeros((size - rank, rank))
    last[:, -1] = 0.9 * s ** (rank - 1)
    return torch.from_numpy(np.concatenate([kahan.T, last]))


# The laws


@laws(150)
@given(factored())
def test_is_lossless(factors: Factors) -> None:
    pivoted = pivot(factors)
    assert_same_map(pivoted.dense(), factors)
    assert (pivoted.d_out, pivoted.d_in, pivoted.rank) == (factors.d_out, factors.d_in, factors.rank)
    assert (pivoted.bias is None) == (factors.bias is None)
    assert factors.bias is None or torch.equal(pivoted.bias, factors.bias)


@laws(150)
@given(factored())
def test_stores_what_it_says(factors: Factors) -> None:
    pivoted = pivot(factors)
    shape = (factors.d_out, factors.d_in, factors.rank)
    bias = 0 if factors.bias is None else factors.d_out
    assert pivoted.num_params == num_stored(*shape, "pivoted") + bias
    assert factors.num_params == num_stored(*shape, "plain") + bias
    assert pivoted.own_pivots == factors.rank


@laws(150)
@given(factored())
def test_pivots_are_rows_in_their_own_order(factors: Factors) -> None:
    pivoted = pivot(factors)
    order = pivoted.order
    rows = order.argsort()[: factors.rank]
    torch.testing.assert_close(pivoted.pivots, factors.left[rows] @ factors.right, rtol=0, atol=0)
    for entries in (order[order < factors.rank], order[order >= factors.rank]):
        assert all(a < b for a, b in pairwise(entries.tolist()))


@laws(300)
@given(factored())
def test_coefficients_are_small(factors: Factors) -> None:
    coefficients = pivot(factors).coefficients
    assert coefficients.numel() == 0 or coefficients.abs().max() <= LARGEST_COEFFICIENT


@laws(100)
@given(factored())
def test_acts_as_its_matrix_and_comes_back_as_factors(factors: Factors) -> None:
    pivoted = pivot(factors)
    x = normal(2, 3, factors.d_in, seed=5)
    expected = x @ pivoted.dense().T + (0 if pivoted.bias is None else pivoted.bias)
    scale = float(expected.abs().max()) + 1e-300
    torch.testing.assert_close(pivoted(x), expected, rtol=0, atol=1e-12 * scale)
    back = pivoted.factors()
    torch.testing.assert_close(back.dense(), pivoted.dense(), rtol=1e-12, atol=0)
    torch.testing.assert_close(back(x), pivoted(x), rtol=0, atol=1e-12 * scale)
    assert torch.equal(back.right, pivoted.pivots)


@laws(60)
@given(st.sampled_from(FULL_RANK), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_at_full_rank_of_a_wide_map_the_rows_are_themselves(kind: str, d_out: int, more: int, seed: int) -> None:
    factors = make_factors(kind, d_out, d_out + more, d_out, seed=seed)
    pivoted = pivot(factors)
    assert pivoted.coefficients.shape == (0, d_out)
    assert torch.equal(pivoted.order, torch.arange(d_out))
    assert torch.equal(pivoted.pivots, factors.left @ factors.right)


@laws(60)
@given(factored(("normal", "orthonormal")))
def test_is_of_the_map_and_not_of_its_factors(factors: Factors) -> None:
    """Another pair of factors of the same map gives the same layout."""
    mixed = normal(factors.rank, factors.rank, seed=11) + 3 * torch.eye(factors.rank, dtype=torch.float64)
    one = pivot(factors)
    two = pivot(Factors(torch.linalg.solve(mixed, factors.left, left=False), mixed @ factors.right, factors.bias))
    assert torch.equal(one.order, two.order)
    torch.testing.assert_close(one.dense(), two.dense(), rtol=0, atol=1e-9 * float(one.pivots.abs().max()))


# Swaps


@pytest.mark.parametrize("rank", [12, 20])
def test_swaps_end_where_pivoted_qr_alone_has_huge_coefficients(rank: int) -> None:
    left = maximal_volume(rank, rank + 3)
    triangle, order = scipy.linalg.qr(left.numpy().T, mode="r", pivoting=True)
    alone = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:])
    assert np.abs(alone).max() > 3 * LARGEST_COEFFICIENT, "no longer a hard case"
    factors = Factors(left, normal(rank, rank + 2, seed=1))
    pivoted = pivot(factors)
    assert pivoted.coefficients.abs().max() <= LARGEST_COEFFICIENT
    assert_same_map(pivoted.dense(), factors)
    rows = pivoted.order.argsort()[:rank]
    volume = torch.linalg.slogdet(left[rows]).logabsdet
    before = torch.linalg.slogdet(left[torch.from_numpy(order[:rank].copy())]).logabsdet
    assert volume > before + np.log(LARGEST_COEFFICIENT)


# Members of a stacked map


@laws(100)
@given(factored(), st.data())
def test_members_stack_to_the_whole(factors: Factors, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, factors.d_out - 1), max_size=3))) if factors.d_out > 1 else []
    sizes = [b - a for a, b in pairwise([0, *cuts, factors.d_out])]
    x = normal(4, factors.d_in, seed=5)
    for whole in (factors, pivot(factors)):
        members = split(whole, sizes)
        assert [member.d_out for member in members] == sizes
        torch.testing.assert_close(torch.cat([member.dense() for member in members]), whole.dense(), rtol=1e-12, atol=0)
        stacked, together = torch.cat([member(x) for member in members], -1), whole(x)
        torch.testing.assert_close(stacked, together, rtol=0, atol=1e-12 * float(together.abs().max()))
        assert all((member.bias is None) == (whole.bias is None) for member in members)
        if isinstance(whole, Pivoted):
            assert all(member.pivots is whole.pivots for member in members)
            assert sum(member.own_pivots for member in members) == whole.rank
            assert sum(len(member.coefficients) for member in members) == len(whole.coefficients)
            for member in members:
                torch.testing.assert_close(member.factors().dense(), member.dense(), rtol=1e-12, atol=0)
        else:
            assert all(member.right is whole.right for member in members)


@pytest.mark.parametrize("sizes", [[], [3, 3], [8], [4, 0, 3], [9, -2]])
def test_sizes_that_are_not_the_whole_are_refused(sizes: list[int]) -> None:
    for whole in (make_factors("normal", 7, 5, 2), pivot(make_factors("normal", 7, 5, 2))):
        with pytest.raises(ValueError, match=r"a map of 7 rows does not split into"):
            split(whole, sizes)


# Ranks


@laws(300)
@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.01, 1))
def test_rank_is_the_largest_that_fits(d_out: int, d_in: int, keep: float) -> None:
    rank = pivoted_rank_for(keep, d_out, d_in)
    budget = keep * d_out * d_in
    assert 1 <= rank <= min(d_out, d_in)
    assert rank == 1 or num_stored(d_out, d_in, rank, "pivoted") <= budget + 1e-5
    if rank < min(d_out, d_in):
        assert num_stored(d_out, d_in, rank + 1, "pivoted") > budget - 1e-5
    assert rank >= rank_for(keep, d_out, d_in)
    closed = ((d_out + d_in) - max(0.0, (d_out + d_in) ** 2 - 4 * budget) ** 0.5) / 2
    assert rank == 1 or abs(rank - closed) < 1 + 1e-4


@laws(200)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.data())
def test_a_share_that_is_a_whole_rank_gives_it(d_out: int, d_in: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    assert pivoted_rank_for(num_stored(d_out, d_in, rank, "pivoted") / (d_out * d_in), d_out, d_in) == rank


def test_known_ranks() -> None:
    assert pivoted_rank_for(1.0, 768, 768) == 768
    assert pivoted_rank_for(1.0, 768, 3072) == 768
    assert pivoted_rank_for(0.75, 4096, 4096) == 2048  # 0.75 = r / d (2 - r / d) at r = d / 2
    assert pivoted_rank_for(1e-6, 8, 8) == 1
    assert num_stored(4096, 4096, 2048, "plain") == 4096 * 4096


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01])
def test_a_share_outside_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        pivoted_rank_for(keep, 8, 8)


@pytest.mark.usefixtures("as_users_see_it")
def test_an_unknown_layout_is_refused() -> None:
    assert LAYOUTS == ("plain", "pivoted")
    with pytest.raises(ValueError, match="'pifa' is none of plain, pivoted"):
        num_stored(4, 4, 1, "pifa")  # type: ignore[arg-type]


# Refusals and types


def test_more_pivots_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 exceeds d_out = 3"):
        pivot(Factors(normal(3, 4), normal(4, 9)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_that_are_not_finite_are_refused(side: str, value: float) -> None:
    factors = make_factors("normal", 6, 5, 2)
    getattr(factors, side)[1, 1] = value
    with pytest.raises(ValueError, match="6 x 5 map of rank 2 have entries that are not finite"):
        pivot(factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_works_in_float64_and_casts_once(dtype: torch.dtype) -> None:
    factors = make_factors("normal", 9, 7, 3, biased=True)
    low = factors.to(dtype)
    pivoted = pivot(low)
    assert {t.dtype for t in (pivoted.pivots, pivoted.coefficients, pivoted.bias)} == {torch.float64}
    assert_same_map(pivoted.dense(), Factors(low.left.double(), low.right.double()))
    cast = pivot(factors).to(dtype)
    assert {t.dtype for t in (cast.pivots, cast.coefficients, cast.bias)} == {dtype}
    assert cast.order.dtype == torch.int64
    assert cast(torch.ones(2, 7, dtype=dtype)).dtype == dtype


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("pivots", "coefficients", "order", "bias", "says"),
    [
        ((2, 4), (1, 3), [0, 1, 2], None, r"\(2, 4\) and coefficients \(1, 3\) do not chain"),
        ((2, 4), (1, 2), [0, 1, 2], (4,), r"bias has shape \(4,\), expected \(3,\)"),
        ((2, 4), (1, 2), [0, 1, 1], None, "must take each of 2 ... 2 once"),
        ((2, 4), (1, 2), [0, 0, 2], None, "at most once"),
        ((2, 4), (1, 2), [-1, 0, 2], None, "an order of 3 outputs"),
        ((2, 4), (1, 2), [0, 1, 3], None, "an order of 3 outputs"),
        ((2, 4), (1, 2), [0.0, 1.0, 2.0], None, "a vector of int32 or int64, not torch.float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    pivots: tuple[int, ...], coefficients: tuple[int, ...], order: list[int], bias: tuple[int, ...] | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Pivoted(
            torch.zeros(pivots),
            torch.zeros(coefficients),
            torch.tensor(order),
            None if bias is None else torch.zeros(bias),
        )
