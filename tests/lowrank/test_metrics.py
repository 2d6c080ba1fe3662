"""Metrics: roots are roots, shrinkage keeps the trace, and a matrix that cannot be used is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import DecompositionError, GradientMoments, Moments
from eckart.lowrank.metrics import (
    BlockDiagonal,
    absolute_mean_root,
    apply_metric,
    cholesky_root,
    eigen_root,
    eigh,
    fisher_input_root,
    fisher_output_metric,
    gradient_metric,
    of_second_moment,
    scaled_eigenvectors,
    shrink,
    solve_metric,
    weigh_inputs,
    whitening,
)

from .reference import Layer, laws, layers, make_layer

ROOTS = (cholesky_root, eigen_root)
EVERYTHING = frozenset({"second_moment", "fisher_in", "gradient_covariance"})
SHARES = st.sampled_from([0.0, 0.01, 0.3, 1.0])


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def assert_root(root: Tensor, moment: Tensor) -> None:
    scale = float(moment.diagonal().sum()) or 1.0
    torch.testing.assert_close(root @ root.T, moment, rtol=0, atol=1e-13 * scale)


# Roots


@pytest.mark.parametrize("root", ROOTS)
@laws(40)
@given(layer=layers())
def test_root_times_its_transpose_is_the_moment(root, layer: Layer) -> None:
    moment = second_moment(layer.x)
    assert_root(root(moment), moment)
    centred = layer.x - layer.x.mean(0)
    moments = layer.moments(EVERYTHING)
    assert_root(of_second_moment(root)(moments), moment)
    scale = moment.diagonal().sum() or 1.0
    root_c = root(moments.require_inputs().covariance)
    # The covariance is a difference, so its rounding error is relative to the second moment.
    torch.testing.assert_close(root_c @ root_c.T, second_moment(centred), rtol=0, atol=1e-13 * float(scale))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3])
@laws(20)
@given(layer=layers())
def test_a_whitening_is_the_cholesky_root_of_its_shrunk_moment(centred: bool, share: float, layer: Layer) -> None:
    moments = layer.moments(EVERYTHING)
    inputs = moments.require_inputs()
    root = whitening(share, centred=centred)(moments)
    expected = shrink(inputs.covariance if centred else inputs.second_moment, share)
    assert torch.equal(root.moment(), expected)
    assert torch.equal(root.root(), cholesky_root(expected))
    vectors = torch.randn(inputs.d_in, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(root.apply(vectors), expected @ vectors, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(weigh_inputs(layer.weight, root), layer.weight @ root.root(), rtol=0, atol=1e-12 * scale)


def test_cholesky_root_is_triangular_where_there_is_one() -> None:
    root = cholesky_root(second_moment(make_layer(3, 6, 40).x))
    assert torch.equal(root, root.tril())
    assert (root.diagonal() > 0).all()


def test_cholesky_root_of_a_moment_without_one_is_the_eigenvalue_root() -> None:
    moment = second_moment(make_layer(3, 6, 40, kind="dead").x)
    assert torch.equal(cholesky_root(moment), eigen_root(moment))


def test_eigen_root_counts_an_eigenvalue_that_rounding_made_negative_as_zero() -> None:
    root = eigen_root(torch.diag(torch.tensor([4.0, -1e-17], dtype=torch.float64)))
    assert torch.equal(root @ root.T, torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)))


@laws(30)
@given(layer=layers())
def test_scaled_eigenvectors_are_orthogonal_up_to_a_scalar(layer: Layer) -> None:
    moment = second_moment(layer.x)
    root = scaled_eigenvectors(moment)
    largest = float(np.linalg.eigvalsh(moment.numpy())[-1])
    expected = largest * torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close(root @ root.T, expected, rtol=0, atol=1e-12 * max(largest, 1))


@laws(30)
@given(layer=layers(), alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_diagonal_roots_are_their_definitions(layer: Layer, alpha: float) -> None:
    moments = layer.moments(EVERYTHING)
    torch.testing.assert_close(absolute_mean_root(moments, alpha), layer.x.abs().mean(0) ** alpha)
    fisher = layer.dw.square().mean(0)
    rough = {"rtol": 1e-5, "atol": 0.0}  # squares of the gradient are taken in float32
    torch.testing.assert_close(fisher_input_root(moments), fisher.sum(0).sqrt(), **rough)
    rows = fisher.sum(1)
    expected = (0.75 * rows + 0.25 * rows.mean()).sqrt()
    torch.testing.assert_close(fisher_output_metric(moments, 0.25), expected, **rough)


# Shrinkage


@laws(30)
@given(layer=layers(), share=SHARES)
def test_shrinkage_moves_to_the_mean_diagonal(layer: Layer, share: float) -> None:
    moment = second_moment(layer.x)
    before = moment.clone()
    shrunk = shrink(moment, share)
    assert torch.equal(moment, before)
    eye = torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close(shrunk, (1 - share) * moment + share * moment.trace() / len(moment) * eye)
    torch.testing.assert_close(shrunk.trace(), moment.trace())
    torch.testing.assert_close(shrink(moment.diagonal(), share), shrunk.diagonal())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        shrink(torch.eye(2), share)


# The output metric


@laws(30)
@given(layer=layers(), share=st.sampled_from([0.05, 0.3, 1.0]))
def test_gradient_metric_is_a_root_of_the_shrunk_covariance(layer: Layer, share: float) -> None:
    metric = gradient_metric(layer.moments(EVERYTHING), share)
    covariance = shrink(second_moment(layer.dy), share)
    assert torch.equal(metric, metric.triu())
    torch.testing.assert_close(metric.T @ metric, covariance, rtol=1e-10, atol=1e-12)


def test_a_gradient_covariance_that_stays_singular_is_refused() -> None:
    moments = Moments(gradients=GradientMoments(3, 4))
    moments.require_gradients().update_covariance(torch.ones(2, 3), None)
    with pytest.raises(DecompositionError, match=r"\(3, 3\) \(eigenvalues .* is singular at shrinkage 0\.0; raise"):
        gradient_metric(moments, 0.0)
    assert torch.isfinite(gradient_metric(moments, 0.3)).all()


@pytest.mark.parametrize("kind", ["single", "stacked"])
def test_a_metric_is_solved_with_in_any_type(kind: str) -> None:
    """Triangular as gradient metrics are, or not; of float32 or float64; what comes out has the matrix's type."""
    random = torch.Generator().manual_seed(0)
    full = torch.randn(5, 5, generator=random, dtype=torch.float64) + 4 * torch.eye(5, dtype=torch.float64)
    for metric in (full, full.triu(), full.triu().float()):
        side = metric if kind == "single" else BlockDiagonal((metric, metric.triu()))
        matrix = torch.randn(side.shape[0], 3, generator=random, dtype=torch.float64)
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
            solved = solve_metric(side, matrix.to(dtype))
            assert solved.dtype == apply_metric(side, matrix.to(dtype)).dtype == dtype
            torch.testing.assert_close(apply_metric(side, solved).double(), matrix, rtol=tolerance, atol=tolerance)


def test_a_covariance_kept_in_float32_has_its_root_in_float32() -> None:
    random = torch.Generator().manual_seed(0)
    gradients = GradientMoments(6, 4)
    gradients.update_covariance(torch.randn(50, 6, generator=random), None)
    exact = gradient_metric(Moments(gradients=gradients), 0.3)
    state = gradients.sums | {"gradient_covariance": gradients.sums["gradient_covariance"].float()}
    kept = Moments(gradients=GradientMoments.from_state(0, gradients.tokens, state))
    single = gradient_metric(kept, 0.3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact.double(), rtol=1e-5, atol=1e-5)
    # Shrunk by next to nothing, its root would be rounding.
    assert gradient_metric(kept, 1e-6).dtype == torch.float64


# What cannot be decomposed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("root", [*ROOTS, scaled_eigenvectors, eigh])
def test_a_moment_that_is_not_finite_is_refused(root, value: float) -> None:
    moment = torch.eye(3, dtype=torch.float64)
    moment[1, 1] = value
    with pytest.raises(DecompositionError, match=r"moment \(3, 3\) .* not finite"):
        root(moment)


def test_an_eigensolver_that_fails_is_reported_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(DecompositionError, match=r"\(3, 3\) matrix did not converge; largest entry 7"):
        eigen_root(7 * torch.eye(3))
