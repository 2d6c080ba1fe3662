"""Method: stages that are put together, anchored, centred and weighted, and what the sum of them costs.

The methods here are composed for the test: whatever the fields of `Method` allow has to keep the laws.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import Factored, Factors, Method, Moments, Stage, build_method, interpolate, output_error
from eckart.lowrank.metrics import (
    absolute_mean_root,
    fisher_output_metric,
    gradient_metric,
    whitening,
)

from .reference import Layer, laws, layers, make_layer, neighbours, optimum, token_loss, weighted_loss

RELATIVE = 1e-9
GRADIENTS = frozenset({"second_moment", "gradient_covariance", "fisher_in", "fisher_out"})
ANCHORED = GRADIENTS | {"cross_moment"}
METRICS = {
    "plain": None,
    "diagonal": partial(fisher_output_metric, share=0.1),
    "full": partial(gradient_metric, share=0.3),
}


def compose(
    *,
    centred: bool = False,
    metric: str = "plain",
    anchor: float | None = None,
    residual: Stage | None = None,
    share: float = 1.0,
) -> Method:
    """A method of the inputs' own moment with every part chosen freely."""
    root = whitening(centred=centred)
    return Method(
        name="composed",
        paper="",
        equation="",
        assumes="",
        fails="",
        stage=Stage(root=root, metric=METRICS[metric]),
        needs=GRADIENTS if anchor is None else ANCHORED,
        centred=centred,
        anchor=anchor,
        residual=residual,
        share=share,
    )


def metric_of(method: Method, moments: Moments) -> Tensor | None:
    return None if method.stage.metric is None else method.stage.metric(moments)


every_metric = pytest.mark.parametrize("metric", METRICS)
centred_or_not = pytest.mark.parametrize("centred", [False, True], ids=["uncentred", "centred"])


# Output error


@laws(40)
@given(layer=layers(), seed=st.integers(0, 2**16), biased=st.booleans())
def test_output_error_is_that_of_the_tokens(layer: Layer, seed: int, biased: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    d_out, d_in = layer.weight.shape
    left, right, bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((d_out, 2), (2, d_in), (d_out,))
    )
    factors = Factors(left, right, bias if biased else None)
    error, whole = output_error(layer.weight, factors, layer.moments(GRADIENTS))
    assert math.isclose(whole, float((layer.x @ layer.weight.T).square().sum(1).mean()), abs_tol=1e-9)
    measured = token_loss(layer.weight, factors, layer.x)
    assert math.isclose(error, measured, rel_tol=RELATIVE, abs_tol=RELATIVE * whole)


# Output metrics


@centred_or_not
@every_metric
@laws(20)
@given(layer=layers(), seed=st.integers(0, 2**16))
def test_tail_is_the_weighted_output_error_of_the_tokens(centred: bool, metric: str, layer: Layer, seed: int) -> None:
    """E||A (W x - M x - d)||^2, and no other map of the rank does better."""
    method, moments = compose(centred=centred, metric=metric), layer.moments(GRADIENTS)
    spectrum, side = method.factor(layer.weight, moments), metric_of(method, moments)
    whole = token_loss(layer.weight, Factors(0 * layer.weight[:, :1], 0 * layer.weight[:1]), layer.x, metric=side)
    _, least = optimum(layer.weight, 1, method.root(moments), side)
    assert math.isclose(spectrum.tail(1), least, abs_tol=RELATIVE * whole)
    for rank in layer.ranks:
        factors = spectrum.cut(rank)
        measured = token_loss(layer.weight, factors, layer.x, metric=side)
        assert math.isclose(spectrum.tail(rank), measured, abs_tol=RELATIVE * whole)
        for step in (1e-3, 0.3):
            other = neighbours(factors, step, seed)
            assert token_loss(layer.weight, other, layer.x, metric=side) >= measured - RELATIVE * whole
            if factors.bias is not None:
                shifted = dataclasses.replace(factors, bias=factors.bias + step)
                assert token_loss(layer.weight, shifted, layer.x, metric=side) > measured


@pytest.mark.parametrize("metric", ["diagonal", "full"])
def test_an_output_metric_pays_in_its_own_measure(metric: str) -> None:
    layer = make_layer(7, 6, 80)
    moments = layer.moments(GRADIENTS)
    plain, weighted = (compose(metric=name).factor(layer.weight, moments) for name in ("plain", metric))
    side = metric_of(compose(metric=metric), moments)
    losses = [token_loss(layer.weight, spectrum.cut(2), layer.x, metric=side) for spectrum in (plain, weighted)]
    assert losses[1] < 0.99 * losses[0]


# Anchored to the dense model's inputs


@centred_or_not
@every_metric
@laws(15)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)), seed=st.integers(0, 2**16))
def test_floor_and_tail_are_the_error_against_the_dense_stream(
    centred: bool, metric: str, layer: Layer, seed: int
) -> None:
    """E||A (W x - M xh - d)||^2 of every rank, and no other map of the rank does better."""
    method, moments = compose(centred=centred, metric=metric, anchor=0.0), layer.moments(ANCHORED)
    spectrum, side = method.factor(layer.weight, moments), metric_of(method, moments)
    whole = token_loss(layer.weight, Factors(0 * layer.weight[:, :1], 0 * layer.weight[:1]), layer.x, metric=side)
    for rank in layer.ranks:
        factors = spectrum.cut(rank)
        measured = token_loss(layer.weight, factors, layer.x, layer.xh, side)
        assert math.isclose(spectrum.tail(rank), measured, abs_tol=RELATIVE * whole)
        for step in (1e-3, 0.3):
            other = neighbours(factors, step, seed)
            assert token_loss(layer.weight, other, layer.x, layer.xh, side) >= measured - RELATIVE * whole


@centred_or_not
@laws(20)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)))
def test_floor_is_what_least_squares_leaves(centred: bool, layer: Layer) -> None:
    spectrum: Any = compose(centred=centred, anchor=0.0).factor(layer.weight, layer.moments(ANCHORED))
    outputs, inputs = (layer.x @ layer.weight.T).numpy(), layer.xh.numpy()
    if centred:
        inputs = np.column_stack([inputs, np.ones(len(inputs))])
    solution = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    least = float(np.square(outputs - inputs @ solution).sum(1).mean())
    assert math.isclose(spectrum.floor, least, rel_tol=1e-6, abs_tol=RELATIVE * float(np.square(outputs).sum(1).mean()))
    assert math.isclose(spectrum.tail(spectrum.max_rank), spectrum.floor)


@centred_or_not
@pytest.mark.parametrize("anchor", [0.0, 0.2])
@laws(15)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)))
def test_a_stream_anchored_to_itself_is_not_anchored(centred: bool, anchor: float, layer: Layer) -> None:
    itself = dataclasses.replace(layer, xh=layer.x)
    spectrum: Any = compose(centred=centred, anchor=anchor).factor(layer.weight, itself.moments(ANCHORED))
    plain: Any = compose(centred=centred).factor(layer.weight, layer.moments(GRADIENTS))
    scale = plain.tail(0) + float((layer.x @ layer.weight.T).square().sum(1).mean())
    torch.testing.assert_close(spectrum.target, layer.weight, rtol=1e-6, atol=1e-6)
    assert spectrum.floor <= RELATIVE * scale
    for rank in layer.ranks:
        assert math.isclose(spectrum.tail(rank), plain.tail(rank), abs_tol=RELATIVE * scale)


@centred_or_not
@laws(15)
@given(layer=layers(kinds=("rich", "few"), tokens=(2, 40)))
def test_shrinking_all_the_way_keeps_the_weight_as_target(centred: bool, layer: Layer) -> None:
    if len(layer.x) == 1:  # a single token has no covariance to shrink towards
        return
    spectrum: Any = compose(centred=centred, anchor=1.0).factor(layer.weight, layer.moments(ANCHORED))
    torch.testing.assert_close(spectrum.target, layer.weight)
    lost = (layer.x - layer.xh) @ layer.weight.T
    lost = lost - lost.mean(0) if centred else lost
    assert math.isclose(spectrum.floor, float(lost.square().sum(1).mean()), rel_tol=1e-7, abs_tol=1e-9)


def test_anchoring_pays_against_the_dense_stream() -> None:
    layer = make_layer(6, 8, 200)
    plain = compose().factor(layer.weight, dataclasses.replace(layer, x=layer.xh).moments(GRADIENTS))
    anchored = compose(anchor=0.0).factor(layer.weight, layer.moments(ANCHORED))
    losses = [token_loss(layer.weight, spectrum.cut(4), layer.x, layer.xh) for spectrum in (plain, anchored)]
    assert losses[1] < 0.95 * losses[0]


# Nested


def nested_shapes() -> list[tuple[int, int]]:
    return [(24, 24), (22, 30), (30, 22)]


@pytest.mark.parametrize("shape", nested_shapes())
@pytest.mark.parametrize("name", ["nsvd-i", "nsvd-ii", "nid-i", "nid-ii"])
@pytest.mark.parametrize("share", [0.95, 0.6])
def test_nested_stages_by_hand(shape: tuple[int, int], name: str, share: float) -> None:
    """M1 of rank k1 = round(share k) in the inputs' metric, then k - k1 ranks of W - M1, stored as one pair."""
    layer = make_layer(*shape, 100)
    method = build_method(name, {"share": share})
    moments = layer.moments(method.needs)
    spectrum, root = method.factor(layer.weight, moments), method.root(moments)
    seconds = set()
    for rank in layer.ranks:
        k1 = round(share * rank)
        seconds.add(rank - k1)
        first, _ = optimum(layer.weight, k1, root) if k1 else (torch.zeros_like(layer.weight), 0.0)
        residual = layer.weight - first
        factors = spectrum.cut(rank)
        assert factors.rank == rank
        assert factors.bias is None
        assert factors.num_params == rank * sum(shape)
        torch.testing.assert_close(factors.left[:, :k1] @ factors.right[:k1], first, rtol=0, atol=1e-8)
        expected = first
        if rank > k1 and name.startswith("nsvd"):
            expected = first + optimum(residual, rank - k1)[0]
        elif rank > k1:
            expected = first + interpolate(residual, rank - k1).dense()
        torch.testing.assert_close(factors.dense(), expected, rtol=0, atol=1e-7)
        assert math.isclose(
            spectrum.tail(rank), weighted_loss(layer.weight - expected, root), rel_tol=1e-6, abs_tol=1e-6
        )
    assert seconds != {0}


@pytest.mark.parametrize("shape", nested_shapes())
@pytest.mark.parametrize("name", ["nid-i", "nid-ii"])
def test_interpolated_columns_of_the_weight_are_kept(shape: tuple[int, int], name: str) -> None:
    layer = make_layer(*shape, 100)
    method = build_method(name, {"share": 0.5})
    factors = method.factor(layer.weight, layer.moments(method.needs)).cut(10)
    kept = (factors.dense() - layer.weight).abs().amax(0) < 1e-12
    assert int(kept.sum()) == 5


@laws(25)
@given(layer=layers(), share=st.sampled_from([0.3, 0.5, 0.95]))
def test_a_second_stage_is_between_its_first_stage_and_the_best(layer: Layer, share: float) -> None:
    """In the inputs' metric it costs nothing compared with M1 alone, and gains nothing on all the rank spent there."""
    base, method = build_method("asvd-i"), build_method("nsvd-i", {"share": share})
    moments = layer.moments(method.needs)
    first, spectrum = base.factor(layer.weight, moments), method.factor(layer.weight, moments)
    slack = RELATIVE * first.tail(0)
    for rank in layer.ranks:
        k1 = max(1, round(share * rank))
        assert first.tail(rank) - slack <= spectrum.tail(rank) <= first.tail(k1) + slack
        error, alone = (layer.weight - cut.dense() for cut in (spectrum.cut(rank), first.cut(k1)))
        assert error.norm() <= alone.norm() * (1 + 1e-12)


RESIDUALS = {
    "plain": Stage(),
    "interpolative": Stage(interpolative=True),
    "scaled": Stage(root=partial(absolute_mean_root, alpha=1.0)),
    "weighted": Stage(metric=partial(gradient_metric, share=0.3)),
}


@pytest.mark.parametrize("residual", RESIDUALS)
@centred_or_not
@every_metric
@pytest.mark.parametrize("anchor", [None, 0.0])
def test_nested_stages_keep_the_laws_of_the_first(
    residual: str, centred: bool, metric: str, anchor: float | None
) -> None:
    """Whatever the first stage is: the tail is measured in its metric, and the bias fits the sum."""
    layer = make_layer(7, 9, 80)
    method = compose(centred=centred, metric=metric, anchor=anchor, residual=RESIDUALS[residual], share=0.5)
    moments = layer.moments(method.needs)
    spectrum, side, read = method.factor(layer.weight, moments), metric_of(method, moments), layer.read(method.needs)
    assert isinstance(spectrum, Factored)
    zero = Factors(0 * layer.weight[:, :1], 0 * layer.weight[:1])
    whole = token_loss(layer.weight, zero, layer.x, read, side)
    for rank in layer.ranks:
        factors = spectrum.cut(rank)
        assert factors.rank == rank
        assert (factors.bias is not None) == centred
        measured = token_loss(layer.weight, factors, layer.x, read, side)
        assert math.isclose(spectrum.tail(rank), measured, rel_tol=1e-7, abs_tol=RELATIVE * whole)
        if factors.bias is not None:
            torch.testing.assert_close(factors(read.mean(0)), layer.weight @ layer.x.mean(0), rtol=1e-9, atol=1e-9)
    assert math.isclose(
        spectrum.tail(0), compose(centred=centred, metric=metric, anchor=anchor).factor(layer.weight, moments).tail(0)
    )


def test_a_second_stage_is_cut_in_its_own_metric() -> None:
    layer = make_layer(7, 9, 80)
    method = compose(residual=RESIDUALS["weighted"], share=0.5)
    moments = layer.moments(method.needs)
    side = gradient_metric(moments, 0.3)
    residual = layer.weight - compose().factor(layer.weight, moments).cut(2).dense()
    lost = layer.weight - method.factor(layer.weight, moments).cut(4).dense()
    assert math.isclose(weighted_loss(lost, metric=side), optimum(residual, 2, metric=side)[1], rel_tol=1e-9)


# Fields


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"composed: .* share .* is outside \(0, 1\]"):
        compose(residual=Stage(), share=share)


def test_what_needs_gradients_says_so() -> None:
    assert compose().needs_gradients
    assert not dataclasses.replace(compose(), needs=frozenset({"second_moment"})).needs_gradients


def test_a_method_without_a_root_has_none() -> None:
    assert build_method("svd").root(Moments()) is None


@pytest.mark.usefixtures("as_users_see_it")
@centred_or_not
@pytest.mark.parametrize("anchor", [None, 0.0])
def test_inputs_of_another_width_are_refused(centred: bool, anchor: float | None) -> None:
    method = compose(centred=centred, anchor=anchor)
    with pytest.raises(ValueError, match="width 7, expected 6"):
        method.factor(make_layer(5, 6, 20).weight, make_layer(5, 7, 20).moments(method.needs))
