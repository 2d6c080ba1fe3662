"""Factors: a linear map as data. They act, add, and multiply out like the matrix they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import Factors

from .reference import laws


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def maps(draw: st.DrawFn, d_out: int, d_in: int) -> Factors:
    rank, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    bias = normal(d_out, seed=seed + 2) if draw(st.booleans()) else None
    return Factors(normal(d_out, rank, seed=seed), normal(rank, d_in, seed=seed + 1), bias)


def bias_of(factors: Factors) -> Tensor:
    return torch.zeros(factors.d_out, dtype=torch.float64) if factors.bias is None else factors.bias


@laws(40)
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=3))
def test_acts_as_its_product(data: st.DataObject, d_out: int, d_in: int, batch: list[int]) -> None:
    factors = data.draw(maps(d_out, d_in))
    x = normal(*batch, d_in, seed=3)
    y = factors(x)
    assert y.shape == (*batch, d_out)
    torch.testing.assert_close(y, x @ (factors.left @ factors.right).T + bias_of(factors))
    torch.testing.assert_close(factors.dense(), factors.left @ factors.right)


@laws(40)
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.floats(-12, 12))
def test_balanced_is_the_same_map_in_even_lengths(data: st.DataObject, d_out: int, d_in: int, power: float) -> None:
    factors = data.draw(maps(d_out, d_in))
    left, right = factors.left * 10**power, factors.right.clone()
    right[0] = 0
    balanced = Factors(left, right, factors.bias).balanced()
    torch.testing.assert_close(balanced.dense(), left @ right)
    assert balanced.bias is factors.bias
    torch.testing.assert_close(balanced.left.norm(dim=0)[1:], balanced.right.norm(dim=1)[1:])
    assert torch.equal(balanced.left[:, 0], left[:, 0])


@laws(40)
@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_sum_acts_as_the_sum(data: st.DataObject, d_out: int, d_in: int) -> None:
    a, b, c = (data.draw(maps(d_out, d_in)) for _ in range(3))
    x = normal(6, d_in, seed=3)
    both = a + b
    assert both.rank == a.rank + b.rank
    assert (both.bias is None) == (a.bias is None and b.bias is None)
    torch.testing.assert_close(both(x), a(x) + b(x))
    torch.testing.assert_close(both.dense(), a.dense() + b.dense())
    assert torch.equal(both.left, torch.cat([a.left, b.left], 1))
    assert torch.equal(both.right, torch.cat([a.right, b.right], 0))
    torch.testing.assert_close(((a + b) + c)(x), (a + (b + c))(x))


@laws(40)
@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_counts_the_numbers_it_stores(data: st.DataObject, d_out: int, d_in: int) -> None:
    factors = data.draw(maps(d_out, d_in))
    assert (factors.d_out, factors.d_in) == (d_out, d_in)
    extra = 0 if factors.bias is None else d_out
    assert factors.num_params == factors.rank * (d_out + d_in) + extra


@pytest.mark.parametrize("biased", [False, True])
def test_to_casts_every_part(biased: bool) -> None:
    factors = Factors(normal(3, 2), normal(2, 4), normal(3) if biased else None)
    cast = factors.to(torch.bfloat16)
    assert torch.equal(cast.left, factors.left.bfloat16())
    assert torch.equal(cast.right, factors.right.bfloat16())
    assert (cast.bias is not None) == biased
    assert cast.bias is None or torch.equal(cast.bias, factors.bias.bfloat16())


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("left", "right", "bias", "says"),
    [
        ((3, 2), (1, 4), None, r"\(3, 2\).*\(1, 4\)"),
        ((3,), (1, 4), None, r"\(3,\).*\(1, 4\)"),
        ((3, 1), (4,), None, r"\(3, 1\).*\(4,\)"),
        ((3, 2), (2, 4), (4,), r"\(4,\).*\(3,\)"),
        ((3, 2), (2, 4), (3, 1), r"\(3, 1\).*\(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    left: tuple[int, ...], right: tuple[int, ...], bias: tuple[int, ...] | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Factors(torch.zeros(left), torch.zeros(right), None if bias is None else torch.zeros(bias))


def test_maps_of_different_shape_do_not_add() -> None:
    a, b = Factors(normal(3, 1), normal(1, 4)), Factors(normal(3, 1), normal(1, 5))
    with pytest.raises(ValueError, match="3 x 4 map and of a 3 x 5 map"):
        a + b


def test_is_a_value() -> None:
    factors = Factors(normal(3, 1), normal(1, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.bias = normal(3)  # type: ignore[misc]
