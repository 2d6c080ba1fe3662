"""Identities between entries of the catalogue: settings and roots that must give the same answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import GradientMoments, Moments, build_method
from eckart.lowrank.metrics import BlockDiagonal
from eckart.lowrank.moments import JointGradients

from .entries import RELATIVE, Case, Entry, every_entry
from .reference import (
    Layer,
    laws,
    layers,
    make_layer,
    optimum,
    separated,
    weighted_loss,
)


@laws(16)
@given(layer=layers(), share=st.floats(0, 1))
def test_shrunk_runs_from_asvd_i_to_svd(layer: Layer, share: float) -> None:
    assert_same_answers(Entry("shrunk", {"share": 0.0}), Entry("asvd-i"), layer)
    assert_same_answers(Entry("shrunk", {"share": 0.0, "bias": True}), Entry("sfsd"), layer)
    scale = float(layer.x.square().sum(1).mean()) / layer.x.shape[1]
    if scale > 0:
        assert_same_answers(Entry("shrunk", {"share": 1.0}), Entry("svd"), layer, ratio=scale)
    assert Case(Entry("shrunk", {"share": share}).build(), layer).factored.max_rank == min(layer.weight.shape)


@laws(16)
@given(layer=layers(kinds=("rich",), tokens=(12, 24)))
def test_kfac_without_the_gradient_side_is_shrunk(layer: Layer) -> None:
    """Shrunk all the way the output metric is a multiple of the identity."""
    for bias in (False, True):
        one = Case(Entry("kfac", {"shrink_out": 1.0, "bias": bias}).build(), layer)
        two = Case(Entry("shrunk", {"bias": bias}).build(), layer)
        for rank in layer.ranks:
            a, b = one.factored.cut(rank).dense(), two.factored.cut(rank).dense()
            assert math.isclose(two.loss(a), two.loss(b), abs_tol=RELATIVE * two.scale)


def joined(first: Layer, second: Layer, needs: frozenset[str]) -> tuple[Tensor, Moments]:
    """Two layers that read the same input, as the one that they are."""
    parts = [replace(second, x=first.x, xh=first.xh).moments(needs), first.moments(needs)]
    gradients = [part.gradients for part in parts if isinstance(part.gradients, GradientMoments)]
    return torch.cat([second.weight, first.weight]), Moments(parts[0].inputs, JointGradients(tuple(gradients)))


@every_entry
@laws(12)
@given(layer=layers(kinds=("rich", "few")), other=st.integers(1, 6))
def test_linears_that_read_one_input_are_one_linear(entry: Entry, layer: Layer, other: int) -> None:
    """The joint cut is at the optimum in the joint metric, and its blocks see no output but their own."""
    method = entry.build()
    more = make_layer(other, layer.weight.shape[1], len(layer.dy), seed=other)
    weight, moments = joined(layer, more, method.needs)
    joint: Any = method.factor(weight, moments)
    first = joint if method.residual is None else joint.first
    assert joint.max_rank == min(weight.shape)
    metric = first.metric
    if isinstance(metric, BlockDiagonal):
        metric = torch.block_diag(*metric.blocks)
    root = method.root(moments)
    for rank in (1, joint.max_rank):
        loss = weighted_loss(first.target - joint.cut(rank).dense(), root, metric)
        assert math.isclose(joint.tail(rank), first.floor + loss, abs_tol=RELATIVE * joint.tail(0))
        if method.residual is None:
            assert math.isclose(loss, optimum(first.target, rank, root, metric)[1], abs_tol=RELATIVE * joint.tail(0))


def assert_same_answers(first: Entry, second: Entry, layer: Layer, ratio: float = 1.0) -> None:
    """Equal tails (up to `ratio`), equal losses in the first's metric, and equal maps where the cut is unique."""
    a, b = Case(first.build(), layer), Case(second.build(), layer)
    for rank in layer.ranks:
        assert math.isclose(a.factored.tail(rank), ratio * b.factored.tail(rank), abs_tol=RELATIVE * a.scale)
        one, two = a.factored.cut(rank).dense(), b.factored.cut(rank).dense()
        assert math.isclose(a.loss(one), a.loss(two), abs_tol=RELATIVE * a.scale)
        if separated(a.factored.energies, rank):
            assert weighted_loss(one - two, a.root, a.metric) <= 1e-14 * a.scale


@pytest.mark.parametrize("other", ["asvd-ii", "feature-space"])
@laws(30)
@given(layer=layers())
def test_the_same_moment_gives_the_same_method(other: str, layer: Layer) -> None:
    assert_same_answers(Entry("asvd-i"), Entry(other), layer)


@laws(30)
@given(layer=layers(kinds=("rich", "few", "dead")))
def test_eigenvectors_without_their_eigenvalues_are_plain_svd(layer: Layer) -> None:
    """asvd-iii, whose gamma is the root of the largest eigenvalue; any other gamma is in test_truncation."""
    gamma_squared = float(np.linalg.eigvalsh((layer.x.T @ layer.x / len(layer.x)).numpy())[-1])
    if gamma_squared > 0:  # a single channel that is dead has no direction to turn
        assert_same_answers(Entry("svd"), Entry("asvd-iii"), layer, 1 / gamma_squared)


@laws(30)
@given(layer=layers())
def test_asvd_0_with_alpha_zero_is_svd(layer: Layer) -> None:
    plain, scaled = Case(build_method("svd"), layer), Case(build_method("asvd-0", {"alpha": 0.0}), layer)
    for rank in layer.ranks:
        assert torch.equal(scaled.factored.cut(rank).left, plain.factored.cut(rank).left)
        assert torch.equal(scaled.factored.cut(rank).right, plain.factored.cut(rank).right)
        assert scaled.factored.tail(rank) == plain.factored.tail(rank)


@pytest.mark.parametrize(("first", "second"), [("nsvd-i", "nsvd-ii"), ("nid-i", "nid-ii")])
@pytest.mark.parametrize("shape", [(9, 9), (6, 12), (12, 6)])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_nested_methods_do_not_depend_on_the_root(
    first: str, second: str, shape: tuple[int, int], share: float
) -> None:
    layer = make_layer(*shape, 60, seed=1)
    a, b = (Case(build_method(name, {"share": share}), layer) for name in (first, second))
    for rank in layer.ranks:
        torch.testing.assert_close(a.factored.cut(rank).dense(), b.factored.cut(rank).dense(), rtol=1e-6, atol=1e-6)
        assert math.isclose(a.factored.tail(rank), b.factored.tail(rank), abs_tol=RELATIVE * a.scale)


@pytest.mark.parametrize(
    ("name", "base"), [("nsvd-i", "asvd-i"), ("nsvd-ii", "asvd-ii"), ("nid-i", "asvd-i"), ("nid-ii", "asvd-ii")]
)
@laws(8)
@given(layer=layers())
def test_a_nested_method_with_all_the_rank_in_its_first_stage_is_that_stage(name: str, base: str, layer: Layer) -> None:
    plain, nested = Case(build_method(base), layer), Case(build_method(name, {"share": 1.0}), layer)
    for rank in layer.ranks:
        assert torch.equal(nested.factored.cut(rank).left, plain.factored.cut(rank).left)
        assert torch.equal(nested.factored.cut(rank).right, plain.factored.cut(rank).right)
        assert math.isclose(nested.factored.tail(rank), plain.factored.tail(rank), abs_tol=RELATIVE * plain.scale)
