"""Truncation: the Eckart-Young theorem in any metric, for every rank of one factorisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import DecompositionError, Spectrum, factor, interpolate, rank_for, truncation
from eckart.lowrank.metrics import cholesky_root, eigen_root

from .reference import (
    Layer,
    laws,
    layers,
    make_layer,
    neighbours,
    optimum,
    random_orthogonal,
    separated,
    weighted_loss,
)

RELATIVE = 1e-10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def sides(draw: st.DrawFn, size: int, *, singular: bool) -> Tensor | None:
    """A root or metric: the identity, a diagonal or a full matrix; with channels that weigh nothing if `singular`."""
    form = draw(st.sampled_from(["identity", "diagonal", "matrix"]))
    seed = draw(st.integers(0, 2**16))
    if form == "identity":
        return None
    lost = draw(st.integers(0, size - 1)) if singular else 0
    values = normal(size, seed=seed).abs() + 0.1
    values[:lost] = 0
    return values if form == "diagonal" else random_orthogonal(size, seed) * values @ random_orthogonal(size, seed + 1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(target, root, metric): tall, wide, square, thin; any root, any metric that can be solved with."""
    d_out, d_in = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    target = normal(d_out, d_in, seed=draw(st.integers(0, 2**16)))
    return target, draw(sides(d_in, singular=True)), draw(sides(d_out, singular=False))


# One problem, one solution


@laws(80)
@given(problems())
def test_tail_is_the_loss_of_the_cut_and_the_least_there_is(problem) -> None:
    target, root, metric = problem
    spectrum = factor(target, root=root, metric=metric)
    whole = weighted_loss(target, root, metric)
    assert spectrum.max_rank == min(target.shape)
    assert math.isclose(spectrum.tail(0), whole, rel_tol=RELATIVE)
    for rank in range(1, spectrum.max_rank + 1):
        factors = spectrum.cut(rank)
        best, least = optimum(target, rank, root, metric)
        measured = weighted_loss(target - factors.dense(), root, metric)
        assert factors.rank == rank
        assert math.isclose(spectrum.tail(rank), least, abs_tol=RELATIVE * whole)
        assert math.isclose(measured, least, abs_tol=RELATIVE * whole)
        if separated(spectrum.energies, rank):
            assert weighted_loss(factors.dense() - best, root, metric) <= 1e-16 * whole


@laws(60)
@given(problems(), st.integers(0, 2**16), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_no_other_factors_of_the_rank_do_better(problem, seed: int, scale: float) -> None:
    target, root, metric = problem
    spectrum = factor(target, root=root, metric=metric)
    for rank in range(1, spectrum.max_rank + 1):
        other = neighbours(spectrum.cut(rank), scale, seed)
        slack = RELATIVE * spectrum.tail(0)
        assert weighted_loss(target - other.dense(), root, metric) >= spectrum.tail(rank) - slack


@laws(60)
@given(problems())
def test_every_rank_is_a_slice(problem) -> None:
    target, root, metric = problem
    spectrum = factor(target, root=root, metric=metric)
    widest = spectrum.cut(spectrum.max_rank)
    for rank in range(1, spectrum.max_rank + 1):
        factors = spectrum.cut(rank)
        torch.testing.assert_close(factors.left, widest.left[:, :rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(factors.right, widest.right[:rank], rtol=1e-12, atol=1e-12)


@laws(60)
@given(problems(), st.sampled_from([0.0, 2.5]))
def test_tails_fall_from_everything_to_the_floor(problem, floor: float) -> None:
    target, root, metric = problem
    spectrum = factor(target, root=root, metric=metric, floor=floor)
    tails = [spectrum.tail(rank) for rank in range(spectrum.max_rank + 1)]
    assert tails == sorted(tails, reverse=True)
    assert tails[-1] == floor
    assert math.isclose(tails[0], floor + weighted_loss(target, root, metric), rel_tol=RELATIVE)


@laws(60)
@given(problems())
def test_basis_is_orthonormal_and_its_energies_fall(problem) -> None:
    target, root, metric = problem
    spectrum = factor(target, root=root, metric=metric)
    eye = torch.eye(spectrum.max_rank, dtype=torch.float64)
    torch.testing.assert_close(spectrum.basis.T @ spectrum.basis, eye, rtol=0, atol=1e-9)
    assert (spectrum.energies >= 0).all()
    assert (spectrum.energies.diff() <= 0).all()


@laws(40)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16), st.data())
def test_full_rank_gives_back_the_target(d_out: int, d_in: int, seed: int, data: st.DataObject) -> None:
    target = normal(d_out, d_in, seed=seed)
    root = data.draw(sides(d_in, singular=False))
    metric = data.draw(sides(d_out, singular=False))
    spectrum = factor(target, root=root, metric=metric)
    torch.testing.assert_close(spectrum.cut(spectrum.max_rank).dense(), target, rtol=1e-8, atol=1e-8)


@laws(40)
@given(problems(), st.integers(0, 2**16))
def test_bias_carries_the_mean_of_what_is_dropped(problem, seed: int) -> None:
    target, root, metric = problem
    output_mean, input_mean = normal(target.shape[0], seed=seed), normal(target.shape[1], seed=seed + 1)
    plain = factor(target, root=root, metric=metric)
    spectrum = factor(target, root=root, metric=metric, output_mean=output_mean, input_mean=input_mean)
    for rank in range(1, spectrum.max_rank + 1):
        factors = spectrum.cut(rank)
        assert torch.equal(factors.dense(), plain.cut(rank).dense())
        assert plain.cut(rank).bias is None
        assert factors.bias is not None
        torch.testing.assert_close(factors(input_mean), output_mean)


# Roots


@laws(60)
@given(layers(), st.integers(0, 2**16))
def test_any_two_roots_of_one_moment_agree(layer: Layer, seed: int) -> None:
    moment = layer.x.T @ layer.x / len(layer.x)
    cholesky = cholesky_root(moment)
    turned = cholesky @ random_orthogonal(len(moment), seed)
    spectrum = factor(layer.weight, root=cholesky)
    slack = RELATIVE * spectrum.tail(0)
    for root in (eigen_root(moment), turned):
        other = factor(layer.weight, root=root)
        for rank in layer.ranks:
            assert math.isclose(other.tail(rank), spectrum.tail(rank), abs_tol=slack)
            if separated(spectrum.energies, rank):
                apart = other.cut(rank).dense() - spectrum.cut(rank).dense()
                assert weighted_loss(apart, cholesky) <= 1e-6 * slack


@laws(40)
@given(layers(), st.sampled_from([1e-6, 0.3, 1.0, 1e6]), st.integers(0, 2**16))
def test_a_multiple_of_an_orthogonal_root_is_plain_svd(layer: Layer, gamma: float, seed: int) -> None:
    plain = factor(layer.weight)
    spectrum = factor(layer.weight, root=gamma * random_orthogonal(layer.weight.shape[1], seed))
    for rank in layer.ranks:
        measured = weighted_loss(layer.weight - spectrum.cut(rank).dense())
        assert math.isclose(measured, plain.tail(rank), abs_tol=RELATIVE * plain.tail(0))
        assert math.isclose(
            spectrum.tail(rank), gamma**2 * plain.tail(rank), abs_tol=gamma**2 * RELATIVE * plain.tail(0)
        )
        if separated(plain.energies, rank):
            torch.testing.assert_close(spectrum.cut(rank).dense(), plain.cut(rank).dense(), rtol=0, atol=1e-9)


@laws(40)
@given(problems())
def test_a_diagonal_is_a_matrix_with_zeros(problem) -> None:
    target, root, metric = problem
    vectors = [side if side is not None and side.ndim == 1 else None for side in (root, metric)]
    assume(any(side is not None for side in vectors))
    root, metric = vectors
    short = factor(target, root=root, metric=metric)
    full = factor(
        target,
        root=None if root is None else torch.diag(root),
        metric=None if metric is None else torch.diag(metric),
    )
    whole = short.tail(0)
    for rank in range(1, short.max_rank + 1):
        assert math.isclose(short.tail(rank), full.tail(rank), abs_tol=RELATIVE * whole)
        if separated(short.energies, rank):
            apart = short.cut(rank).dense() - full.cut(rank).dense()
            assert weighted_loss(apart, root, metric) <= 1e-16 * whole


# Both routes to the basis


@pytest.mark.parametrize("resolution", [0.0, 2.0], ids=["gram", "svd"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_both_routes_give_the_reference(
    monkeypatch: pytest.MonkeyPatch, resolution: float, shape: tuple[int, int]
) -> None:
    target, root = normal(*shape), normal(shape[1], shape[1], seed=1)
    monkeypatch.setattr(truncation, "GRAM_RESOLUTION", resolution)
    called = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: called.append(1) or svd(*a, **k))
    spectrum = factor(target, root=root)
    assert bool(called) == (resolution == 2.0)
    for rank in range(1, spectrum.max_rank + 1):
        best, least = optimum(target, rank, root)
        assert math.isclose(spectrum.tail(rank), least, rel_tol=1e-9, abs_tol=1e-12)
        assert weighted_loss(spectrum.cut(rank).dense() - best, root) < 1e-18 * spectrum.tail(0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 1)])
def test_nothing_to_approximate_is_approximated(shape: tuple[int, int]) -> None:
    spectrum = factor(torch.zeros(shape))
    for rank in range(1, min(shape) + 1):
        assert torch.equal(spectrum.cut(rank).dense(), torch.zeros(shape, dtype=torch.float64))
        assert spectrum.tail(rank) == 0


def test_does_not_change_its_arguments() -> None:
    target, root, metric = normal(4, 6), normal(6, 6, seed=1), normal(4, 4, seed=2)
    copies = [t.clone() for t in (target, root, metric)]
    factor(target, root=root, metric=metric).cut(2)
    assert all(torch.equal(t, c) for t, c in zip((target, root, metric), copies, strict=True))


# Column interpolation


def low_rank(d_out: int, d_in: int, rank: int, seed: int) -> Tensor:
    return normal(d_out, rank, seed=seed) @ normal(rank, d_in, seed=seed + 1)


@laws(60)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 7), st.integers(0, 2**16))
def test_interpolation_keeps_columns_exactly(d_out: int, d_in: int, true_rank: int, seed: int) -> None:
    matrix = low_rank(d_out, d_in, true_rank, seed)
    singular = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for rank in range(1, min(d_out, d_in) + 1):
        factors = interpolate(matrix, rank)
        columns = [
            next(j for j in range(d_in) if torch.equal(factors.right[:, j], unit))
            for unit in torch.eye(rank, dtype=torch.float64)
        ]
        assert torch.equal(factors.left, matrix[:, columns])
        assert torch.equal(factors.dense()[:, columns], matrix[:, columns])
        # Between the best there is and the bound of pivoted QR (Golub and Van Loan, 5.4.1).
        error = float(np.linalg.norm((matrix - factors.dense()).numpy(), 2))
        least = float(singular[rank]) if rank < len(singular) else 0.0
        slack = 1e-10 * (1 + float(singular[0]))
        assert least - slack <= error <= math.sqrt(max(d_in - rank, 1)) * 2**rank * least + slack


@laws(30)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16))
def test_interpolation_at_full_rank_is_exact(d_out: int, d_in: int, seed: int) -> None:
    matrix = normal(d_out, d_in, seed=seed)
    factors = interpolate(matrix, min(d_out, d_in))
    torch.testing.assert_close(factors.dense(), matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lost", ["columns", "rows", "everything"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_interpolation_of_fewer_columns_than_the_rank(lost: str, rank: int) -> None:
    """A residual may have less rank than its stage is given: dead channels, a layer that is already low-rank."""
    matrix = normal(6, 5)
    if lost == "columns":
        matrix[:, 1:] = 0
    elif lost == "rows":
        matrix[1:] = 0
    else:
        matrix[:] = 0
    factors = interpolate(matrix, rank)
    assert factors.rank == rank
    torch.testing.assert_close(factors.dense(), matrix, rtol=1e-12, atol=1e-12)


# Ranks


@pytest.mark.parametrize(
    ("keep", "d_out", "d_in", "rank"),
    [
        (0.5, 4096, 4096, 1024),  # 0.5 * 4096 / 2
        (0.8, 4096, 4096, 1638),  # 1638.4
        (0.8, 11008, 4096, 2388),  # 0.8 * 45088768 / 15104 = 2388.17
        (0.8, 4096, 11008, 2388),
        (1.0, 6, 3, 2),  # 18 / 9
        (0.3, 768, 3072, 184),  # 184.32
        (0.01, 4, 4, 1),  # 0.02, but no layer has rank 0
    ],
)
def test_rank_for_a_share_by_hand(keep: float, d_out: int, d_in: int, rank: int) -> None:
    assert rank_for(keep, d_out, d_in) == rank


@laws(100)
@given(st.floats(0.01, 1), st.integers(1, 5000), st.integers(1, 5000))
def test_rank_for_a_share_is_the_largest_that_fits(keep: float, d_out: int, d_in: int) -> None:
    rank, budget = rank_for(keep, d_out, d_in), keep * d_out * d_in
    assert 1 <= rank <= min(d_out, d_in)
    assert rank == 1 or rank * (d_out + d_in) <= budget * (1 + 1e-12)
    assert (rank + 1) * (d_out + d_in) > budget * (1 - 1e-12)


@pytest.mark.parametrize("rank", [0, -1, 5, 4096])
def test_a_rank_out_of_reach_is_refused_with_the_numbers(rank: int) -> None:
    spectrum, says = factor(normal(4, 6)), rf"rank {rank} is not in 1 \.\.\. min\(d_out, d_in\) = 4"
    with pytest.raises(ValueError, match=says):
        spectrum.cut(rank)
    with pytest.raises(ValueError, match=says):
        interpolate(normal(4, 6), rank)
    if rank != 0:
        with pytest.raises(ValueError, match=says):
            spectrum.tail(rank)


# What cannot be factored


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["target", "root", "metric", "diagonal root", "diagonal metric"])
def test_an_entry_that_is_not_finite_is_refused(value: float, where: str) -> None:
    target, root, metric = normal(4, 6), normal(6, 6, seed=1), normal(4, 4, seed=2)
    if where.startswith("diagonal"):
        root, metric = normal(6, seed=1), normal(4, seed=2)
    broken = {"target": target, "root": root, "metric": metric}[where.split()[-1]]
    broken.view(-1)[2] = value
    with pytest.raises(ValueError, match="4 x 6 matrix has entries that are not finite"):
        factor(target, root=root, metric=metric)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (6, 4), (6, 6, 6), ()])
def test_a_root_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"root has shape .*, expected \(6, 6\) or its diagonal \(6,\)"):
        factor(normal(4, 6), root=torch.ones(shape))


@pytest.mark.parametrize("shape", [(6,), (6, 6), (4, 6), (4, 4, 4), ()])
def test_a_metric_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"metric has shape .*, expected \(4, 4\) or its diagonal \(4,\)"):
        factor(normal(4, 6), metric=torch.ones(shape))


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_metric_that_cannot_be_solved_with_is_refused(diagonal: bool) -> None:
    metric = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    with pytest.raises(DecompositionError, match=r"output metric .*singular"):
        factor(normal(4, 6), metric=metric if diagonal else torch.diag(metric)).cut(2)


def test_a_decomposition_that_fails_is_reported_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_settings: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(DecompositionError, match=r"SVD of a \(3, 4\) matrix did not converge; largest entry 5"):
        factor(5 * torch.eye(3, 4) * torch.tensor([[1.0], [1.0], [0.0]]))


def test_a_spectrum_holds_every_rank_of_one_layer() -> None:
    layer = make_layer(4, 6, 30)
    spectrum = factor(layer.weight.float())
    assert isinstance(spectrum, Spectrum)
    assert spectrum.target.dtype == spectrum.basis.dtype == spectrum.energies.dtype == torch.float64
    assert (spectrum.basis.shape, spectrum.energies.shape) == ((4, 4), (4,))
