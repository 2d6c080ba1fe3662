"""The catalogue: laws that every entry keeps, whatever its paper, and the identities between entries.

Every test here runs over METHODS, so that a new entry is under the laws as soon as it is in the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import METHODS, DecompositionError, GradientMoments, Method, Moments, build_method, method_options
from eckart.lowrank.metrics import BlockDiagonal
from eckart.lowrank.moments import GRADIENT_STATISTICS, INPUT_STATISTICS, JointGradients

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

RELATIVE = 1e-9


@dataclass(frozen=True)
class Entry:
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def build(self) -> Method:
        return build_method(self.name, self.options)


# Settings beside the defaults, where they change the method.
OTHER_SETTINGS = (
    Entry("fwsvd", {"fisher_axis": "out"}),
    Entry("asvd-0", {"alpha": 1.0}),
    Entry("nsvd-i", {"share": 0.5}),
    Entry("nsvd-ii", {"share": 1.0}),
    Entry("nid-i", {"share": 0.5}),
    Entry("shrunk", {"share": 0.5, "bias": True}),
    Entry("kfac", {"shrink_in": 0.0, "bias": False}),
    Entry("kfac", {"shrink_out": 1.0}),
)
ENTRIES = (*map(Entry, METHODS), *OTHER_SETTINGS)
SINGLE_STAGE = tuple(entry for entry in ENTRIES if entry.build().residual is None)
NESTED = tuple(entry for entry in ENTRIES if entry.build().residual is not None)

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)
single_stage = pytest.mark.parametrize("entry", SINGLE_STAGE, ids=str)


class Run:
    """A method on a layer, given nothing but what it asks for.

    Attributes:
        root, metric: B and A of the first stage; target, floor: T, and the loss that no rank removes.
        scale: what rounding errors of its losses are relative to.
    """

    def __init__(self, method: Method, layer: Layer) -> None:
        self.method, self.layer = method, layer
        self.moments = layer.moments(method.needs)
        self.root = method.root(self.moments)
        self.metric = None if method.stage.metric is None else method.stage.metric(self.moments)
        self.factored: Any = method.factor(layer.weight, self.moments)
        first = self.factored if method.residual is None else self.factored.first
        self.target, self.floor = first.target, first.floor
        self.scale = self.factored.tail(0) + float((layer.x @ layer.weight.T).square().sum(1).mean())

    def loss(self, matrix: Tensor) -> float:
        """||A (T - M) B||^2: what the method itself minimises."""
        return weighted_loss(self.target - matrix, self.root, self.metric)


# Laws of every entry


@every_entry
@laws(16)
@given(layer=layers())
def test_every_cut_is_a_finite_map_of_its_rank(entry: Entry, layer: Layer) -> None:
    run = Run(entry.build(), layer)
    d_out, d_in = layer.weight.shape
    assert run.factored.max_rank == min(d_out, d_in)
    for rank in layer.ranks:
        factors = run.factored.cut(rank)
        assert (factors.d_out, factors.rank, factors.d_in) == (d_out, rank, d_in)
        assert (factors.bias is not None) == run.method.centred
        parts = [part for part in (factors.left, factors.right, factors.bias) if part is not None]
        assert all(torch.isfinite(part).all() for part in parts)
        assert factors.num_params == rank * (d_out + d_in) + (d_out if run.method.centred else 0)


@every_entry
@laws(16)
@given(layer=layers())
def test_tails_are_the_tail_at_every_rank(entry: Entry, layer: Layer) -> None:
    """Of nested stages: the first one's, which the second only lowers as far as its own metric agrees."""
    run = Run(entry.build(), layer)
    tails = run.factored.tails().tolist()
    assert len(tails) == run.factored.max_rank + 1
    first = run.factored if run.method.residual is None else run.factored.first
    for rank, tail in enumerate(tails):
        k1 = rank if run.method.residual is None else min(rank, max(1, round(run.method.share * rank)))
        assert math.isclose(tail, first.tail(k1), abs_tol=RELATIVE * run.scale)


@every_entry
@laws(16)
@given(layer=layers())
def test_tail_is_the_loss_of_the_cut_in_the_method_s_own_metric(entry: Entry, layer: Layer) -> None:
    run = Run(entry.build(), layer)
    nothing = torch.zeros_like(layer.weight)
    assert math.isclose(run.factored.tail(0), run.floor + run.loss(nothing), abs_tol=RELATIVE * run.scale)
    for rank in layer.ranks:
        measured = run.floor + run.loss(run.factored.cut(rank).dense())
        assert math.isclose(run.factored.tail(rank), measured, abs_tol=RELATIVE * run.scale)


@single_stage
@laws(16)
@given(layer=layers())
def test_tail_is_the_least_there_is(entry: Entry, layer: Layer) -> None:
    run = Run(entry.build(), layer)
    for rank in layer.ranks:
        best, least = optimum(run.target, rank, run.root, run.metric)
        assert math.isclose(run.factored.tail(rank) - run.floor, least, abs_tol=RELATIVE * run.scale)
        if separated(run.factored.energies, rank):
            apart = weighted_loss(run.factored.cut(rank).dense() - best, run.root, run.metric)
            assert apart <= 1e-14 * run.scale


@single_stage
@laws(8)
@given(layer=layers(), seed=st.integers(0, 2**16))
def test_no_method_and_no_neighbour_beats_another_in_its_own_metric(entry: Entry, layer: Layer, seed: int) -> None:
    run = Run(entry.build(), layer)
    rivals = [Run(other.build(), layer).factored for other in ENTRIES]
    for rank in layer.ranks:
        best = run.factored.tail(rank) - run.floor - RELATIVE * run.scale
        matrices = [rival.cut(rank).dense() for rival in rivals]
        matrices += [neighbours(run.factored.cut(rank), step, seed).dense() for step in (1e-3, 0.1)]
        assert min(map(run.loss, matrices)) >= best


@single_stage
@laws(16)
@given(layer=layers())
def test_every_rank_is_a_slice_and_tails_fall(entry: Entry, layer: Layer) -> None:
    run = Run(entry.build(), layer)
    widest = run.factored.cut(run.factored.max_rank)
    for rank in layer.ranks:
        factors = run.factored.cut(rank)
        torch.testing.assert_close(factors.left, widest.left[:, :rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(factors.right, widest.right[:rank], rtol=1e-12, atol=1e-12)
    tails = [run.factored.tail(rank) for rank in (0, *layer.ranks)]
    assert tails == sorted(tails, reverse=True)
    assert tails[-1] == run.floor


@every_entry
@laws(16)
@given(layer=layers(kinds=("rich",), tokens=(30, 60)))
def test_full_rank_gives_back_the_weight(entry: Entry, layer: Layer) -> None:
    run = Run(entry.build(), layer)
    factors = run.factored.cut(run.factored.max_rank)
    torch.testing.assert_close(factors.dense(), run.target, rtol=1e-7, atol=1e-7)
    if run.method.anchor is None:
        assert torch.equal(run.target, layer.weight)
    if factors.bias is not None:
        outputs = layer.x @ layer.weight.T
        wanted = outputs.mean(0) - layer.read(run.method.needs).mean(0) @ run.target.T
        torch.testing.assert_close(factors.bias, wanted, rtol=0, atol=1e-7)


@single_stage
@laws(16)
@given(layer=layers())
def test_full_rank_loses_nothing_that_the_metric_can_see(entry: Entry, layer: Layer) -> None:
    run = Run(entry.build(), layer)
    assert run.loss(run.factored.cut(run.factored.max_rank).dense()) <= RELATIVE * run.scale


@single_stage
def test_exact_is_said_of_the_methods_whose_tail_is_the_output_error(entry: Entry) -> None:
    layer = make_layer(5, 6, 50, seed=3)
    run = Run(entry.build(), layer)
    same = []
    for rank in layer.ranks:
        error = token_loss(layer.weight, run.factored.cut(rank), layer.x, layer.read(run.method.needs))
        same.append(math.isclose(run.factored.tail(rank), error, rel_tol=1e-8, abs_tol=RELATIVE * run.scale))
    assert all(same) == run.method.exact


@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_taken_to_float64(entry: Entry, dtype: torch.dtype) -> None:
    layer = make_layer(5, 6, 50)
    method = entry.build()
    moments, weight = layer.moments(method.needs), layer.weight.to(dtype)
    found, wanted = method.factor(weight, moments).cut(3), method.factor(weight.double(), moments).cut(3)
    assert torch.equal(found.left, wanted.left)
    assert torch.equal(found.right, wanted.right)
    assert found.left.dtype == torch.float64


@every_entry
def test_a_root_made_before_changes_nothing(entry: Entry) -> None:
    layer = make_layer(5, 6, 50)
    run = Run(entry.build(), layer)
    found = run.method.factor(layer.weight, run.moments, root=run.root)
    assert torch.equal(found.cut(3).left, run.factored.cut(3).left)
    assert torch.equal(found.cut(3).right, run.factored.cut(3).right)
    assert found.tail(3) == run.factored.tail(3)


# What every entry refuses


@every_entry
def test_a_missing_statistic_is_named(entry: Entry) -> None:
    layer, method = make_layer(5, 6, 20), entry.build()
    for name in method.needs:
        with pytest.raises(ValueError, match=rf"{name} was not collected|statistics of the (inputs|gradient)"):
            method.factor(layer.weight, layer.moments(method.needs - {name}))
    if method.needs:
        with pytest.raises(ValueError, match="calibrate first"):
            method.factor(layer.weight)
    else:
        assert method.factor(layer.weight).cut(1).rank == 1


@every_entry
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(entry: Entry, value: float) -> None:
    layer, method = make_layer(5, 6, 20), entry.build()
    weight = layer.weight.clone()
    weight[2, 3] = value
    with pytest.raises((ValueError, DecompositionError), match="not finite"):
        method.factor(weight, layer.moments(method.needs))
    for name in method.needs:
        moments = layer.moments(method.needs)
        source = moments.inputs if name in INPUT_STATISTICS else moments.gradients
        source.sums[name].view(-1)[3] = value
        with pytest.raises((ValueError, DecompositionError), match="not finite"):
            method.factor(layer.weight, moments)


@every_entry
@pytest.mark.parametrize("rank", [-1, 0, 6, 7, 1000])
def test_a_rank_out_of_reach_is_refused_with_the_numbers(entry: Entry, rank: int) -> None:
    factored, says = Run(entry.build(), make_layer(5, 6, 20)).factored, rf"rank {rank} is not in 1 \.\.\. .* = 5"
    with pytest.raises(ValueError, match=says):
        factored.cut(rank)
    if rank != 0:
        with pytest.raises(ValueError, match=says):
            factored.tail(rank)


@pytest.mark.usefixtures("as_users_see_it")
@every_entry
def test_moments_of_another_layer_are_refused(entry: Entry) -> None:
    method, other = entry.build(), make_layer(4, 7, 20)
    if method.needs:
        with pytest.raises(ValueError, match="expected"):
            method.factor(make_layer(5, 6, 20).weight, other.moments(method.needs))


# What every entry says of itself


@pytest.mark.parametrize("name", METHODS)
def test_entry_is_documented(name: str) -> None:
    method = build_method(name)
    assert method.name == name
    assert METHODS[name].__doc__
    assert all([method.paper, method.equation, method.assumes, method.fails])
    assert method.options == method_options(name)
    assert method.needs <= INPUT_STATISTICS | GRADIENT_STATISTICS
    assert method.needs_gradients == bool(method.needs & GRADIENT_STATISTICS)


@pytest.mark.parametrize("entry", OTHER_SETTINGS, ids=str)
def test_settings_are_recorded(entry: Entry) -> None:
    assert entry.build().options == {**method_options(entry.name), **entry.options}


@pytest.mark.parametrize(("wrong", "near"), [("asvd-1", "asvd-i"), ("nsvd_ii", "nsvd-ii"), ("sfds", "sfsd")])
def test_an_unknown_method_names_the_nearest(wrong: str, near: str) -> None:
    for call in (build_method, method_options):
        with pytest.raises(ValueError, match=f"unknown method '{wrong}'; did you mean '{near}"):
            call(wrong)


def test_a_method_like_no_other_lists_them_all() -> None:
    with pytest.raises(ValueError, match="unknown method 'zzz'; known: " + ", ".join(METHODS)):
        build_method("zzz")


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_setting_is_refused_with_the_known_ones(name: str) -> None:
    listed = ", ".join(method_options(name)) or "none"
    with pytest.raises(ValueError, match=f"method {name} has no setting 'colour'; its settings: {listed}"):
        build_method(name, {"colour": 1})


@pytest.mark.parametrize("entry", NESTED, ids=str)
@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(entry: Entry, share: float) -> None:
    with pytest.raises(ValueError, match=rf"{entry.name}: .* share {share} is outside \(0, 1\]"):
        build_method(entry.name, {"share": share})


@pytest.mark.usefixtures("as_users_see_it")
def test_a_third_fisher_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="'in' or 'out', not 'both'"):
        build_method("fwsvd", {"fisher_axis": "both"})


# Identities between entries


@laws(16)
@given(layer=layers(), share=st.floats(0, 1))
def test_shrunk_runs_from_asvd_i_to_svd(layer: Layer, share: float) -> None:
    assert_same_answers(Entry("shrunk", {"share": 0.0}), Entry("asvd-i"), layer)
    assert_same_answers(Entry("shrunk", {"share": 0.0, "bias": True}), Entry("sfsd"), layer)
    scale = float(layer.x.square().sum(1).mean()) / layer.x.shape[1]
    if scale > 0:
        assert_same_answers(Entry("shrunk", {"share": 1.0}), Entry("svd"), layer, ratio=scale)
    assert Run(Entry("shrunk", {"share": share}).build(), layer).factored.max_rank == min(layer.weight.shape)


@laws(16)
@given(layer=layers(kinds=("rich",), tokens=(12, 24)))
def test_kfac_without_the_gradient_side_is_shrunk(layer: Layer) -> None:
    """Shrunk all the way the output metric is a multiple of the identity."""
    for bias in (False, True):
        one = Run(Entry("kfac", {"shrink_out": 1.0, "bias": bias}).build(), layer)
        two = Run(Entry("shrunk", {"bias": bias}).build(), layer)
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
    found: Any = method.factor(weight, moments)
    first = found if method.residual is None else found.first
    assert found.max_rank == min(weight.shape)
    metric = first.metric
    if isinstance(metric, BlockDiagonal):
        metric = torch.block_diag(*metric.blocks)
    root = method.root(moments)
    for rank in (1, found.max_rank):
        loss = weighted_loss(first.target - found.cut(rank).dense(), root, metric)
        assert math.isclose(found.tail(rank), first.floor + loss, abs_tol=RELATIVE * found.tail(0))
        if method.residual is None:
            assert math.isclose(loss, optimum(first.target, rank, root, metric)[1], abs_tol=RELATIVE * found.tail(0))


def assert_same_answers(first: Entry, second: Entry, layer: Layer, ratio: float = 1.0) -> None:
    """Equal tails (up to `ratio`), equal losses in the first's metric, and equal maps where the cut is unique."""
    a, b = Run(first.build(), layer), Run(second.build(), layer)
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
    plain, found = Run(build_method("svd"), layer), Run(build_method("asvd-0", {"alpha": 0.0}), layer)
    for rank in layer.ranks:
        assert torch.equal(found.factored.cut(rank).left, plain.factored.cut(rank).left)
        assert torch.equal(found.factored.cut(rank).right, plain.factored.cut(rank).right)
        assert found.factored.tail(rank) == plain.factored.tail(rank)


@pytest.mark.parametrize(("first", "second"), [("nsvd-i", "nsvd-ii"), ("nid-i", "nid-ii")])
@pytest.mark.parametrize("shape", [(9, 9), (6, 12), (12, 6)])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_nested_methods_do_not_depend_on_the_root(
    first: str, second: str, shape: tuple[int, int], share: float
) -> None:
    layer = make_layer(*shape, 60, seed=1)
    a, b = (Run(build_method(name, {"share": share}), layer) for name in (first, second))
    for rank in layer.ranks:
        torch.testing.assert_close(a.factored.cut(rank).dense(), b.factored.cut(rank).dense(), rtol=1e-6, atol=1e-6)
        assert math.isclose(a.factored.tail(rank), b.factored.tail(rank), abs_tol=RELATIVE * a.scale)


@pytest.mark.parametrize(
    ("name", "base"), [("nsvd-i", "asvd-i"), ("nsvd-ii", "asvd-ii"), ("nid-i", "asvd-i"), ("nid-ii", "asvd-ii")]
)
@laws(8)
@given(layer=layers())
def test_a_nested_method_with_all_the_rank_in_its_first_stage_is_that_stage(name: str, base: str, layer: Layer) -> None:
    plain, found = Run(build_method(base), layer), Run(build_method(name, {"share": 1.0}), layer)
    for rank in layer.ranks:
        assert torch.equal(found.factored.cut(rank).left, plain.factored.cut(rank).left)
        assert torch.equal(found.factored.cut(rank).right, plain.factored.cut(rank).right)
        assert math.isclose(found.factored.tail(rank), plain.factored.tail(rank), abs_tol=RELATIVE * plain.scale)


# The papers' own words


@laws(30)
@given(layer=layers())
def test_svd_is_the_papers_pair(layer: Layer) -> None:
    """W2 = U sqrt(S), W1 = sqrt(S) V^T: another pair with the same product, and the tail is the Frobenius error."""
    run = Run(build_method("svd"), layer)
    u, s, vh = np.linalg.svd(layer.weight.numpy(), full_matrices=False)
    for rank in layer.ranks:
        product = (u[:, :rank] * np.sqrt(s[:rank])) @ (np.sqrt(s[:rank])[:, None] * vh[:rank])
        found = run.factored.cut(rank).dense().numpy()
        error = float(np.square(layer.weight.numpy() - found).sum())
        assert math.isclose(run.factored.tail(rank), error, abs_tol=RELATIVE * run.scale)
        if separated(run.factored.energies, rank):
            np.testing.assert_allclose(found, product, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["asvd-i", "asvd-ii", "feature-space", "sfsd"])
@laws(30)
@given(layer=layers())
def test_tail_is_the_output_error_on_the_calibration_tokens(name: str, layer: Layer) -> None:
    run = Run(build_method(name), layer)
    for rank in layer.ranks:
        error = token_loss(layer.weight, run.factored.cut(rank), layer.x)
        assert math.isclose(run.factored.tail(rank), error, abs_tol=RELATIVE * run.scale)


@pytest.mark.parametrize("centred", [False, True])
@laws(30)
@given(layer=layers())
def test_feature_space_methods_are_principal_components_of_the_outputs(centred: bool, layer: Layer) -> None:
    """SFSD Eq. 4-5 from the outputs themselves: y is projected on its leading components, about its mean or not."""
    run = Run(build_method("sfsd" if centred else "feature-space"), layer)
    outputs = (layer.x @ layer.weight.T).numpy()
    mean = outputs.mean(0) if centred else np.zeros(outputs.shape[1])
    energies, components = np.linalg.eigh((outputs - mean).T @ (outputs - mean) / len(outputs))
    for rank in layer.ranks:
        basis = components[:, ::-1][:, :rank]
        wanted = mean + (outputs - mean) @ basis @ basis.T
        error = float(np.square(outputs - wanted).sum(1).mean())
        assert math.isclose(run.factored.tail(rank), error, abs_tol=RELATIVE * run.scale)
        if separated(run.factored.energies, rank) and energies[-1] > 1e-9 * run.scale:
            found = run.factored.cut(rank)(layer.x).numpy()
            assert np.square(found - wanted).sum(1).mean() <= 1e-12 * run.scale


@laws(40)
@given(layer=layers())
def test_the_mean_in_the_bias_never_costs_and_pays_with_it(layer: Layer) -> None:
    plain, centred = (Run(build_method(name), layer).factored for name in ("asvd-i", "sfsd"))
    slack = RELATIVE * plain.tail(0)
    for rank in layer.ranks:
        factors = centred.cut(rank)
        without = type(factors)(factors.left, factors.right)
        best = token_loss(layer.weight, plain.cut(rank), layer.x)
        assert token_loss(layer.weight, factors, layer.x) <= best + slack
        assert token_loss(layer.weight, without, layer.x) >= best - slack


def test_the_mean_in_the_bias_pays_where_inputs_have_a_mean() -> None:
    layer = make_layer(6, 8, 100)
    plain, centred = (Run(build_method(name), layer).factored.cut(2) for name in ("asvd-i", "sfsd"))
    best = token_loss(layer.weight, plain, layer.x)
    assert token_loss(layer.weight, centred, layer.x) < 0.95 * best
    assert token_loss(layer.weight, type(centred)(centred.left, centred.right), layer.x) > 1.05 * best


@pytest.mark.parametrize("axis", ["in", "out"])
@laws(30)
@given(layer=layers(), seed=st.integers(0, 2**16))
def test_fwsvd_is_the_least_fisher_weighted_error(axis: str, layer: Layer, seed: int) -> None:
    """sum f (W - M)^2, f the Fisher information of a weight's input feature (or output feature), by brute force."""
    found = Run(build_method("fwsvd", {"fisher_axis": axis}), layer).factored
    fisher = layer.dw.square().mean(0).sum(0 if axis == "in" else 1)
    if axis == "out":  # shrunk by one per cent, to be solvable
        fisher = 0.99 * fisher + 0.01 * fisher.mean()
    side = {"root" if axis == "in" else "metric": fisher.sqrt()}
    for rank in layer.ranks:
        factors = found.cut(rank)
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
    root = as_matrix(Run(build_method("asvd-i"), layer).root, 6)
    np.testing.assert_allclose(root @ root.T, moment, rtol=0, atol=1e-12 * (1 + moment.max()))
    scaled = as_matrix(Run(build_method("asvd-0"), layer).root, 6)
    np.testing.assert_allclose(np.square(np.diag(scaled)), layer.x.abs().mean(0).numpy(), atol=1e-12)
