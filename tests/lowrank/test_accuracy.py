"""Accuracy: below 1e-5 of a float64 SVD in the output norm, however badly the inputs are conditioned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from eckart.lowrank import Moments, build_method, factor
from eckart.lowrank.input_moments import InputMoments
from eckart.lowrank.metrics import cholesky_root, eigen_root
from eckart.lowrank.truncation import GRAM_RESOLUTION

from .reference import make_layer, optimum, random_orthogonal, token_loss, weighted_loss

LIMIT = 1e-5
SHAPES = [(64, 64), (40, 80), (80, 40)]
SHARES = [0.1, 0.5, 0.9]
# The last two end just above and just below what the Gram matrix resolves.
CONDITIONS = [1e2, 1e4, 1e8, 0.9 * GRAM_RESOLUTION**-0.5, 1.1 * GRAM_RESOLUTION**-0.5]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
shares = pytest.mark.parametrize("share", SHARES)
conditions = pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: f"{condition:.1e}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(size: int, condition: float, seed: int) -> Tensor:
    """A matrix whose singular values fall geometrically from 1 to 1 / condition."""
    values = torch.logspace(0, -np.log10(condition), size, dtype=torch.float64)
    return random_orthogonal(size, seed) * values @ random_orthogonal(size, seed + 1)


def relative_distance(matrix: Tensor, expected: Tensor, weight: Tensor, root: Tensor | None) -> float:
    """||(M - M_ref) B|| / ||W B||."""
    return (weighted_loss(matrix - expected, root) / weighted_loss(weight, root)) ** 0.5


@shapes
@conditions
@shares
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cut_and_tail_against_the_reference(
    shape: tuple[int, int], condition: float, share: float, dtype: torch.dtype
) -> None:
    weight, root = normal(*shape).to(dtype), conditioned(shape[1], condition, seed=1)
    rank = round(share * min(shape))
    spectrum = factor(weight, root=root)
    best, least = optimum(weight, rank, root)
    factors = spectrum.cut(rank)
    assert relative_distance(factors.dense(), best, weight, root) < LIMIT
    assert abs(spectrum.tail(rank) - least) < LIMIT * least
    measured = weighted_loss(weight.double() - factors.dense(), root)
    assert abs(measured - least) < LIMIT * least


@shapes
@conditions
@shares
def test_a_weight_that_is_itself_badly_conditioned(shape: tuple[int, int], condition: float, share: float) -> None:
    """Without a root: the condition is then exactly that of what is decomposed."""
    size, rank = min(shape), round(share * min(shape))
    weight = conditioned(size, condition, seed=3) @ random_orthogonal(max(shape), seed=5)[:size]
    weight = weight if shape[0] <= shape[1] else weight.mT
    spectrum = factor(weight)
    best, least = optimum(weight, rank)
    assert relative_distance(spectrum.cut(rank).dense(), best, weight, None) < LIMIT
    assert abs(spectrum.tail(rank) - least) < LIMIT * least


@shapes
@conditions
@shares
@pytest.mark.parametrize("root_of", [cholesky_root, eigen_root])
def test_through_a_moment(shape: tuple[int, int], condition: float, share: float, root_of) -> None:
    """G has the squared condition of its root, so its small directions are rounded away: the error is of the whole."""
    weight, root = normal(*shape), conditioned(shape[1], condition, seed=1)
    moment = root @ root.mT
    rank = round(share * min(shape))
    spectrum = factor(weight, root=root_of(moment))
    best, least = optimum(weight, rank, root)
    whole = weighted_loss(weight, root)
    assert relative_distance(spectrum.cut(rank).dense(), best, weight, root) < LIMIT
    assert abs(spectrum.tail(rank) - least) < LIMIT * whole
    measured = weighted_loss(weight - spectrum.cut(rank).dense(), root)
    assert measured - least < LIMIT * whole


@shapes
@shares
@pytest.mark.parametrize("kind", ["few", "dead", "zero"])
@pytest.mark.parametrize("name", ["asvd-i", "asvd-ii", "feature-space", "sfsd"])
def test_singular_moments(shape: tuple[int, int], share: float, kind: str, name: str) -> None:
    """Against the papers' form, which inverts the root: M = [W B]_r B^+, here with numpy's pseudo-inverse."""
    layer = make_layer(*shape, 300, kind=kind)
    method, rank = build_method(name), round(share * min(shape))
    spectrum = method.factor(layer.weight, layer.moments(method.needs))
    x = layer.x - layer.x.mean(0) if method.centred else layer.x
    root = x.T / len(x) ** 0.5  # any root of the moment will do, and this one is exact
    u, s, vh = np.linalg.svd((layer.weight @ root).numpy(), full_matrices=False)
    best = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.pinv(root.numpy(), rcond=1e-10))
    whole, least = float(np.square(s).sum()), float(np.square(s[rank:]).sum())
    factors = spectrum.cut(rank)
    assert torch.isfinite(factors.dense()).all()
    apart = float((x @ (factors.dense() - best).T).square().sum(1).mean())
    assert apart**0.5 <= LIMIT * whole**0.5
    assert abs(spectrum.tail(rank) - least) <= LIMIT * whole
    assert abs(token_loss(layer.weight, factors, layer.x) - least) <= LIMIT * whole


@shapes
@shares
@pytest.mark.parametrize("compact", [False, True])
def test_a_float32_stream_costs_nothing_that_shows(shape: tuple[int, int], share: float, compact: bool) -> None:
    """Moments of float32 inputs, and stored in float32: the loss is that of exact moments, on the same tokens."""
    layer, rank = make_layer(*shape, 2000), round(share * min(shape))
    x = layer.x.float()
    inputs = InputMoments(shape[1])
    inputs.update(x)
    moments = Moments(inputs.compact() if compact else inputs)
    factors = build_method("asvd-i").factor(layer.weight.float(), moments).cut(rank)
    weight = layer.weight.float().double()
    _, least = optimum(weight, rank, x.double().T / len(x) ** 0.5)
    assert abs(token_loss(weight, factors, x.double()) - least) < LIMIT * least
