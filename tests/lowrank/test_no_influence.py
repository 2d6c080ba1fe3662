"""No influence: a linear whose gradient or input is always zero is factored all the same, and loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import GradientMoments, InputMoments, Method, Moments, build_method, pivot
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.lowrank.metrics import BlockDiagonal, gradient_metric, is_nothing
from eckart.lowrank.moments import GRADIENT_STATISTICS, JointGradients
from eckart.lowrank.truncation import factor

from .entries import Entry, every_entry
from .reference import laws

SHAPES = ((7, 5), (5, 7), (6, 6))


def seen(method: Method, x: Tensor, dy: Tensor, xh: Tensor | None = None) -> Moments:
    """The statistics that the method needs of these inputs (n, d_in) and gradients (n, d_out)."""
    inputs = InputMoments(x.shape[1], method.needs & INPUT_STATISTICS)
    crossed = "cross_moment" in method.needs
    inputs.update(x if xh is None or not crossed else xh, reference=x if crossed else None)
    return Moments(inputs, gradients_of(x, dy) if method.needs_gradients else None)


def gradients_of(x: Tensor, dy: Tensor) -> GradientMoments:
    gradients = GradientMoments(dy.shape[1], x.shape[1], GRADIENT_STATISTICS)
    gradients.update_fisher(dy.T @ x)
    gradients.update_covariance(dy, None)
    return gradients


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(method: Method, weight: Tensor, moments: Moments, rank: int) -> Tensor:
    """Every number is finite and no loss is measured; returns the cut."""
    for hint in (None, rank):
        factored = method.factor(weight, moments, rank=hint)
        factors = factored.cut(rank)
        assert torch.isfinite(factors.dense()).all()
        assert factored.tail(rank) == 0
        assert not factored.tails().any()
        assert factored.losses(5) == [0.0] * 5
        assert torch.isfinite(pivot(factors).dense()).all()
    return factors.dense()


@every_entry
@given(shape=st.sampled_from(SHAPES), rank=st.integers(1, 5), seed=st.integers(0, 10**6))
@laws(5)
def test_with_a_gradient_of_zero_it_is_cut_in_its_inputs_metric(
    entry: Entry, shape: tuple[int, int], rank: int, seed: int
) -> None:
    method = entry.build()
    if not method.needs_gradients:
        return
    weight, x = random(*shape, seed=seed), random(40, shape[1], seed=seed + 1)
    cut = check(method, weight, seen(method, x, torch.zeros(40, shape[0])), rank)
    root = None if "fisher_in" in method.needs else method.root(seen(method, x, torch.ones(40, shape[0])))
    expected = factor(weight, root=root).cut(rank).dense()
    torch.testing.assert_close(cut.double(), expected.double(), rtol=0, atol=1e-4)


@every_entry
@given(shape=st.sampled_from(SHAPES), rank=st.integers(1, 5), seed=st.integers(0, 10**6))
@laws(5)
def test_with_an_input_of_zero_it_is_cut_by_plain_svd(
    entry: Entry, shape: tuple[int, int], rank: int, seed: int
) -> None:
    method = entry.build()
    weight, x = random(*shape, seed=seed), torch.zeros(40, shape[1])
    dy = random(40, shape[0], seed=seed + 1)
    if not method.needs & INPUT_STATISTICS:
        return
    if "gradient_covariance" in method.needs:
        dy = torch.zeros_like(dy)  # the two metrics of the other case are compared below
    cut = check(method, weight, seen(method, x, dy), rank) if method.residual is None else None
    if cut is None:
        cut = method.factor(weight, seen(method, x, dy)).cut(rank).dense()
        assert method.factor(weight, seen(method, x, dy)).tail(rank) == 0
    left_out = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    error = (weight.double() - cut).norm()
    if "interp" in entry.name or entry.name.startswith("nid"):
        assert error < weight.norm()
    else:
        torch.testing.assert_close(error, left_out, rtol=1e-4, atol=1e-5)


def test_with_an_input_of_zero_and_gradients_the_output_metric_decides() -> None:
    method = build_method("kfac")
    weight, x, dy = random(6, 6, seed=0), torch.zeros(40, 6), random(40, 6, seed=1)
    moments = seen(method, x, dy)
    cut = check(method, weight, moments, 3)
    expected = factor(weight, metric=gradient_metric(moments, 0.3)).cut(3).dense()
    torch.testing.assert_close(cut, expected, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kfac", "shrunk", "asvd-i", "sfsd"])
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_anchored_to_an_input_that_is_always_the_same(name: str, constant: float) -> None:
    method = build_method(name).anchored(0.1)
    weight, x, dy = random(7, 5, seed=2), random(40, 5, seed=3), random(40, 7, seed=4)
    moments = seen(method, x, dy, torch.full((40, 5), constant))
    moments = Moments(moments.require_inputs().compact(), moments.gradients)  # as calibration keeps them
    factored = method.factor(weight, moments)
    factors = factored.cut(2)
    assert torch.isfinite(factors.dense()).all()
    assert torch.isfinite(torch.tensor(factored.tail(2)))
    if method.centred:  # the bias then gives the mean output
        output = factors.dense().double() @ moments.require_inputs().mean + factors.bias
        torch.testing.assert_close(output, weight.double() @ x.double().mean(0), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
@laws(10)
def test_one_of_a_stack_without_influence_moves_nothing_of_the_others(seed: int, rank: int) -> None:
    method = build_method("kfac", {"bias": False})
    x = random(60, 6, seed=seed)
    weights, dys = [random(5, 6, seed=seed + 1), random(4, 6, seed=seed + 2)], [random(60, 5, seed=seed + 3)]
    lone = method.factor(weights[0], seen(method, x, dys[0]))
    idle = gradients_of(x, torch.zeros(60, 4))
    inputs = seen(method, x, dys[0]).inputs
    moments = Moments(inputs, JointGradients((gradients_of(x, dys[0]), idle)))
    metric = gradient_metric(moments, 0.3)
    assert isinstance(metric, BlockDiagonal)
    stacked = method.factor(torch.cat(weights), moments)
    assert stacked.tail(rank) == pytest.approx(lone.tail(rank), rel=1e-4, abs=1e-6 * lone.tail(0))
    cut = stacked.cut(rank).dense()
    assert torch.isfinite(cut).all()
    torch.testing.assert_close(cut[:5], lone.cut(rank).dense(), rtol=0, atol=1e-3)
    # Its own rows are the least-squares ones on what the others keep: no worse than dropping it.
    assert (weights[1].double() - cut[5:]).norm() < 2 * weights[1].norm()


def test_a_stack_without_influence_has_no_metric() -> None:
    x = random(9, 4, seed=0)
    idle = JointGradients(tuple(gradients_of(x, torch.zeros(9, rows)) for rows in (3, 2)))
    metric = gradient_metric(Moments(None, idle), 0.0)
    assert isinstance(metric, Tensor)
    assert metric.shape == (5,)
    assert is_nothing(metric)
    assert not is_nothing(None)


def test_moments_know_that_they_are_zero() -> None:
    x, dy = random(9, 4, seed=0), random(9, 3, seed=1)
    assert gradients_of(x, torch.zeros(9, 3)).are_zero
    assert not gradients_of(x, dy).are_zero
    assert not GradientMoments(3, 4).are_zero, "nothing was seen"
    inputs = InputMoments(4)
    assert not inputs.are_zero, "nothing was seen"
    inputs.update(torch.zeros(5, 4))
    assert inputs.are_zero
    inputs.update(x)
    assert not inputs.are_zero
