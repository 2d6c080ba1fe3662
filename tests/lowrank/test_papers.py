"""Entries of the catalogue in their papers' own words: the formula, computed from the tokens without the library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.lowrank import build_method

from .entries import RELATIVE, Case
from .reference import (
    KINDS,
    Layer,
    as_matrix,
    laws,
    layers,
    make_layer,
    neighbours,
    optimum,
    separated,
    token_loss,
    weighted_loss,
)


@laws(30)
@given(layer=layers())
def test_svd_is_the_papers_pair(layer: Layer) -> None:
    """W2 = U sqrt(S), W1 = sqrt(S) V^T: another pair with the same product, and the tail is the Frobenius error."""
    case = Case(build_method("svd"), layer)
    u, s, vh = np.linalg.svd(layer.weight.numpy(), full_matrices=False)
    for rank in layer.ranks:
        product = (u[:, :rank] * np.sqrt(s[:rank])) @ (np.sqrt(s[:rank])[:, None] * vh[:rank])
        matrix = case.factored.cut(rank).dense().numpy()
        error = float(np.square(layer.weight.numpy() - matrix).sum())
        assert math.isclose(case.factored.tail(rank), error, abs_tol=RELATIVE * case.scale)
        if separated(case.factored.energies, rank):
            np.testing.assert_allclose(matrix, product, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["asvd-i", "asvd-ii", "feature-space", "sfsd"])
@laws(30)
@given(layer=layers())
def test_tail_is_the_output_error_on_the_calibration_tokens(name: str, layer: Layer) -> None:
    case = Case(build_method(name), layer)
    for rank in layer.ranks:
        error = token_loss(layer.weight, case.factored.cut(rank), layer.x)
        assert math.isclose(case.factored.tail(rank), error, abs_tol=RELATIVE * case.scale)


@pytest.mark.parametrize("centred", [False, True])
@laws(30)
@given(layer=layers())
def test_feature_space_methods_are_principal_components_of_the_outputs(centred: bool, layer: Layer) -> None:
    """SFSD Eq. 4-5 from the outputs themselves: y is projected on its leading components, about its mean or not."""
    case = Case(build_method("sfsd" if centred else "feature-space"), layer)
    outputs = (layer.x @ layer.weight.T).numpy()
    mean = outputs.mean(0) if centred else np.zeros(outputs.shape[1])
    energies, components = np.linalg.eigh((outputs - mean).T @ (outputs - mean) / len(outputs))
    for rank in layer.ranks:
        basis = components[:, ::-1][:, :rank]
        expected = mean + (outputs - mean) @ basis @ basis.T
        error = float(np.square(outputs - expected).sum(1).mean())
        assert math.isclose(case.factored.tail(rank), error, abs_tol=RELATIVE * case.scale)
        if separated(case.factored.energies, rank) and energies[-1] > 1e-9 * case.scale:
            predicted = case.factored.cut(rank)(layer.x).numpy()
            assert np.square(predicted - expected).sum(1).mean() <= 1e-12 * case.scale


@laws(40)
@given(layer=layers())
def test_the_mean_in_the_bias_never_costs_and_pays_with_it(layer: Layer) -> None:
    plain, centred = (Case(build_method(name), layer).factored for name in ("asvd-i", "sfsd"))
    slack = RELATIVE * plain.tail(0)
    for rank in layer.ranks:
        factors = centred.cut(rank)
        without = type(factors)(factors.left, factors.right)
        best = token_loss(layer.weight, plain.cut(rank), layer.x)
        assert token_loss(layer.weight, factors, layer.x) <= best + slack
        assert token_loss(layer.weight, without, layer.x) >= best - slack


@laws(30)
@given(layer=layers())
def test_sfsd_as_its_equations_are_printed(layer: Layer) -> None:
    """Components of E[y y^T], and the bias V_c V_c^T W mean(x) of Eq. 4.

    S_k, the variance along a component, is its eigenvalue only where the components are of the covariance: of E[y y^T]
    the eigenvalue has the squared mean along it besides. The bias takes just that out of the loss, and the centred
    components, which spend no rank on it, never lose more.
    """
    printed, centred = (Case(build_method("sfsd", {"centred": c}), layer) for c in (False, True))
    outputs = layer.x @ layer.weight.T
    mean = outputs.mean(0)
    for case, along in ((printed, True), (centred, False)):
        projected = outputs @ case.factored.basis
        variances = (projected - projected.mean(0)).square().mean(0)
        expected = variances + along * projected.mean(0).square()
        torch.testing.assert_close(case.factored.energies, expected, rtol=0, atol=RELATIVE * case.scale)
    for rank in layer.ranks:
        factors = printed.factored.cut(rank)
        dropped = printed.factored.basis[:, rank:]
        assert factors.bias is not None
        rest = mean - printed.factored.basis[:, :rank] @ (printed.factored.basis[:, :rank].T @ mean)
        torch.testing.assert_close(factors.bias, rest, rtol=1e-9, atol=1e-9)
        error = token_loss(layer.weight, factors, layer.x)
        given_back = float((dropped.T @ mean).square().sum())
        assert math.isclose(printed.factored.tail(rank) - given_back, error, abs_tol=RELATIVE * printed.scale)
        best = token_loss(layer.weight, centred.factored.cut(rank), layer.x)
        assert best <= error + RELATIVE * printed.scale


def test_the_printed_components_lose_more_where_inputs_have_a_mean() -> None:
    layer = make_layer(6, 8, 100)
    printed, centred = (Case(build_method("sfsd", {"centred": c}), layer).factored.cut(2) for c in (False, True))
    assert token_loss(layer.weight, printed, layer.x) > 1.01 * token_loss(layer.weight, centred, layer.x)
    assert build_method("sfsd").identity == {"name": "sfsd", "options": {}}
    assert build_method("sfsd", {"centred": False}).identity["options"] == {"centred": False}


def test_the_mean_in_the_bias_pays_where_inputs_have_a_mean() -> None:
    layer = make_layer(6, 8, 100)
    plain, centred = (Case(build_method(name), layer).factored.cut(2) for name in ("asvd-i", "sfsd"))
    best = token_loss(layer.weight, plain, layer.x)
    assert token_loss(layer.weight, centred, layer.x) < 0.95 * best
    assert token_loss(layer.weight, type(centred)(centred.left, centred.right), layer.x) > 1.05 * best


@pytest.mark.parametrize("axis", ["in", "out"])
@laws(30)
@given(layer=layers(), seed=st.integers(0, 2**16))
def test_fwsvd_is_the_least_fisher_weighted_error(axis: str, layer: Layer, seed: int) -> None:
    """sum f (W - M)^2, f the Fisher information of a weight's input feature (or output feature), by brute force."""
    factored = Case(build_method("fwsvd", {"fisher_axis": axis}), layer).factored
    fisher = layer.dw.square().mean(0).sum(0 if axis == "in" else 1)
    if axis == "out":  # shrunk by one per cent, to be solvable
        fisher = 0.99 * fisher + 0.01 * fisher.mean()
    side = {"root" if axis == "in" else "metric": fisher.sqrt()}
    for rank in layer.ranks:
        factors = factored.cut(rank)
        lost = (layer.weight - factors.dense()).square() * (fisher if axis == "in" else fisher[:, None])
        _, least = optimum(layer.weight, rank, **side)
        whole = weighted_loss(layer.weight, **side)
        # Gradients are squared in float32, so the weights of the optimum are right to 1e-7.
        assert math.isclose(float(lost.sum()), least, abs_tol=1e-6 * whole)
        other = layer.weight - neighbours(factors, 0.3, seed).dense()
        assert weighted_loss(other, **side) >= least - RELATIVE * whole


@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_method_see_the_same_tokens(kind: str) -> None:
    """Guards the tests above: what they call a method's metric is that of the raw tokens."""
    layer = make_layer(5, 6, 40, kind=kind)
    moment = (layer.x.T @ layer.x / len(layer.x)).numpy()
    root = as_matrix(Case(build_method("asvd-i"), layer).root, 6)
    np.testing.assert_allclose(root @ root.T, moment, rtol=0, atol=1e-12 * (1 + moment.max()))
    scaled = as_matrix(Case(build_method("asvd-0"), layer).root, 6)
    np.testing.assert_allclose(np.square(np.diag(scaled)), layer.x.abs().mean(0).numpy(), atol=1e-12)
