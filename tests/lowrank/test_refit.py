"""Refit: a left factor that least squares would choose, and nothing lost where it was chosen so already."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.lowrank import METHODS, Factors, build_method
from eckart.lowrank.method import output_error
from eckart.lowrank.refit import refit_left

from .reference import Layer, laws, layers, make_layer, token_loss

BOTH = frozenset({"second_moment", "cross_moment"})


def random_factors(layer: Layer, rank: int, biased: bool) -> Factors:
    random = torch.Generator().manual_seed(rank)
    d_out, d_in = layer.weight.shape
    shape = {"generator": random, "dtype": torch.float64}
    bias = torch.randn(d_out, **shape) if biased else None
    return Factors(torch.randn(d_out, rank, **shape), torch.randn(rank, d_in, **shape), bias)


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@laws(24)
@given(layer=layers(), rank=st.integers(1, 4))
def test_refit_is_least_squares_on_the_tokens(crossed: bool, biased: bool, layer: Layer, rank: int) -> None:
    rank = min(rank, *layer.weight.shape)
    moments = layer.moments(BOTH if crossed else frozenset({"second_moment"}))
    before = random_factors(layer, rank, biased)
    after = refit_left(layer.weight, before, moments)
    assert (after.bias is not None) == biased
    read = layer.xh if crossed else layer.x
    kept = (read @ before.right.T).numpy()
    rows = np.hstack([kept, np.ones((len(kept), 1))]) if biased else kept
    outputs = (layer.x @ layer.weight.T).numpy()
    residuals = outputs - rows @ np.linalg.lstsq(rows, outputs, rcond=1e-9)[0]
    least = float(np.square(residuals).sum(1).mean())
    scale = 1 + float(np.square(outputs).sum(1).mean())
    assert abs(token_loss(layer.weight, after, layer.x, read) - least) < 1e-4 * scale
    assert abs(output_error(layer.weight, after, moments)[0] - least) < 1e-4 * scale


@pytest.mark.parametrize("name", METHODS)
@laws(12)
@given(layer=layers(kinds=("rich",), tokens=(12, 24)))
def test_refit_never_costs_and_leaves_the_optimal_alone(name: str, layer: Layer) -> None:
    method = build_method(name)
    moments = layer.moments(method.needs | {"second_moment"})
    scale = 1 + output_error(layer.weight, build_method("svd").factor(layer.weight).cut(1), moments)[1]
    for rank in layer.ranks:
        before = method.factor(layer.weight, moments).cut(rank)
        after = refit_left(layer.weight, before, moments)
        costs = [output_error(layer.weight, factors, moments)[0] for factors in (before, after)]
        assert costs[1] <= costs[0] + 1e-5 * scale
        if method.exact:
            assert abs(costs[1] - costs[0]) < 1e-5 * scale


def test_refit_needs_moments() -> None:
    layer = make_layer(4, 5, 12)
    factors = random_factors(layer, 2, False)
    with pytest.raises(ValueError, match="calibrate"):
        refit_left(layer.weight, factors, layer.moments(frozenset()))
