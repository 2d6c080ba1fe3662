"""Corrections of a matrix Q that is there already: Q + M near W, in the laws of every cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import Factors, Method, build_method, output_error

from .reference import Layer, laws, layers, make_layer, optimum, token_loss

ANCHORED = ("asvd-i", "kfac")
METHODS = ("svd", "asvd-0", "asvd-i", "asvd-ii", "shrunk", "kfac")


def method_of(name: str, *, anchored: bool = False) -> Method:
    method = build_method(name, {"bias": False} if name == "kfac" else {})
    return method.anchored(0.1) if anchored else method


def rounded(weight: Tensor) -> Tensor:
    """A weight in steps of half its mean size: what a few bits leave of it."""
    step = weight.abs().mean() / 2 + 1e-3
    return (weight / step).round() * step


def sum_of(base: Tensor, factors: Factors) -> Factors:
    """Q + L R as one pair."""
    return Factors(base, torch.eye(base.shape[1], dtype=base.dtype)) + factors


def frobenius(matrix: Tensor) -> float:
    return float(matrix.square().sum())


@pytest.mark.parametrize("name", METHODS)
@laws(20)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)))
def test_at_full_rank_the_sum_is_the_weight(name: str, layer: Layer) -> None:
    method, base = method_of(name), rounded(layer.weight)
    factors = method.factor(layer.weight, layer.moments(method.needs), base=base).cut(min(layer.weight.shape))
    torch.testing.assert_close(base + factors.dense(), layer.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("anchored", [False, True], ids=["one-shot", "anchored"])
@pytest.mark.parametrize("name", ANCHORED)
@laws(20)
@given(layer=layers())
def test_the_loss_never_rises_with_rank(name: str, anchored: bool, layer: Layer) -> None:
    """By the method's own measure, and one-shot asvd-i by the tokens too."""
    method, base = method_of(name, anchored=anchored), rounded(layer.weight)
    spectrum = method.factor(layer.weight, layer.moments(method.needs), base=base)
    tails = spectrum.tails()
    assert (tails.diff() <= 1e-9 * tails[0].abs() + 1e-12).all()
    torch.testing.assert_close(method.tails(layer.weight, layer.moments(method.needs), base=base), tails)
    if name == "asvd-i" and not anchored:
        losses = [token_loss(layer.weight, sum_of(base, spectrum.cut(rank)), layer.x) for rank in layer.ranks]
        assert all(after <= before * (1 + 1e-9) + 1e-9 for before, after in pairwise(losses))


@laws(30)
@given(layer=layers(), data=st.data())
def test_the_tail_is_the_loss_on_the_tokens(layer: Layer, data: Any) -> None:
    """One-shot asvd-i: E||W x - (Q + L R) x||^2, and of every rank the least there is, by numpy's SVD."""
    method, base = method_of("asvd-i"), rounded(layer.weight)
    moments = layer.moments(method.needs)
    rank = data.draw(st.sampled_from(layer.ranks))
    spectrum = method.factor(layer.weight, moments, base=base)
    factors = spectrum.cut(rank)
    scale = 1e-9 * float((layer.x @ layer.weight.T).square().sum(1).mean()) + 1e-12
    measured = token_loss(layer.weight, sum_of(base, factors), layer.x)
    assert spectrum.tail(rank) == pytest.approx(measured, rel=1e-6, abs=scale)
    assert output_error(layer.weight, factors, moments, base=base)[0] == pytest.approx(measured, rel=1e-6, abs=scale)
    _, least = optimum(layer.weight - base, rank, method.root(moments))  # type: ignore[arg-type]
    assert spectrum.tail(rank) == pytest.approx(least, rel=1e-6, abs=scale)
    assert spectrum.tail(0) == pytest.approx(
        float((layer.x @ (layer.weight - base).T).square().sum(1).mean()), rel=1e-6, abs=scale
    )


@laws(30)
@given(layer=layers(), data=st.data())
def test_svd_is_the_best_of_the_residual_in_frobenius_norm(layer: Layer, data: Any) -> None:
    rank = data.draw(st.sampled_from(layer.ranks))
    base = rounded(layer.weight)
    spectrum = method_of("svd").factor(layer.weight, base=base)
    _, least = optimum(layer.weight - base, rank)
    lost = frobenius(layer.weight - base - spectrum.cut(rank).dense())
    assert lost == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert spectrum.tail(rank) == pytest.approx(least, rel=1e-6, abs=1e-12)


@laws(30)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)), data=st.data())
def test_anchored_to_the_tokens_of_two_streams(layer: Layer, data: Any) -> None:
    """Unshrunk, no other Q + M of the rank loses less on the tokens, W x against (Q + M) xh: by the neighbours of it,
    by the correction for xh = x, and at full rank by least squares."""
    plain, base = method_of("asvd-i"), rounded(layer.weight)
    method = plain.anchored(0.0)
    rank = data.draw(st.sampled_from(layer.ranks))
    moments = layer.moments(method.needs)
    spectrum = method.factor(layer.weight, moments, base=base)
    factors = spectrum.cut(rank)
    loss = token_loss(layer.weight, sum_of(base, factors), layer.x, layer.xh)
    assert spectrum.tail(rank) == pytest.approx(loss, rel=1e-6, abs=1e-9)
    assert output_error(layer.weight, factors, moments, base=base)[0] == pytest.approx(loss, rel=1e-6, abs=1e-9)
    one_shot = plain.factor(layer.weight, layer.moments(plain.needs), base=base).cut(rank)
    others = [one_shot]
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(factors.left.shape, generator=random, dtype=torch.float64)
        others.append(Factors(factors.left + 1e-3 * noise, factors.right))
    for other in others:
        assert loss <= token_loss(layer.weight, sum_of(base, other), layer.x, layer.xh) * (1 + 1e-9) + 1e-9


def test_a_nested_method_corrects_too() -> None:
    layer = make_layer(7, 6, 30)
    base, method = rounded(layer.weight), method_of("nsvd-i")
    moments = layer.moments(method.needs)
    factored = method.factor(layer.weight, moments, base=base)
    for rank in (2, 5):
        measured = token_loss(layer.weight, sum_of(base, factored.cut(rank)), layer.x)
        assert factored.tail(rank) == pytest.approx(measured, rel=1e-6)
    torch.testing.assert_close(base + factored.cut(6).dense(), layer.weight)


def test_a_bias_is_that_of_the_sum() -> None:
    """sfsd: d = W mu - (Q + M) mu, so that the error has no mean."""
    layer = make_layer(5, 6, 30)
    base, method = rounded(layer.weight), build_method("sfsd")
    factors = method.factor(layer.weight, layer.moments(method.needs), base=base).cut(2)
    errors = layer.x @ layer.weight.T - sum_of(base, factors)(layer.x)
    assert float(errors.mean(0).abs().max()) < 1e-6 * float(errors.abs().max())


def test_a_correction_of_nothing_is_the_plain_cut() -> None:
    layer = make_layer(5, 6, 30)
    method = method_of("asvd-i")
    moments = layer.moments(method.needs)
    plain = method.factor(layer.weight, moments)
    corrected = method.factor(layer.weight, moments, base=torch.zeros_like(layer.weight))
    assert torch.equal(plain.tails(), corrected.tails())
    assert torch.equal(plain.cut(3).dense(), corrected.cut(3).dense())
