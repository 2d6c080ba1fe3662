"""The catalogue: laws that every entry keeps, whatever its paper, what it refuses and what it says of itself.

Every test here runs over METHODS, so that a new entry is under the laws as soon as it is in the table.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.lowrank import METHODS, DecompositionError, InputMoments, Moments, build_method, method_options
from eckart.lowrank.catalogue import ANCHOR_SHRINKAGE, anchored
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.lowrank.method import Prepared
from eckart.lowrank.moments import GRADIENT_STATISTICS, TOKEN_WEIGHTS

from .entries import ENTRIES, NESTED, OTHER_SETTINGS, RELATIVE, Case, Entry, every_entry, single_stage
from .reference import (
    Layer,
    laws,
    layers,
    make_layer,
    neighbours,
    optimum,
    separated,
    token_loss,
    weighted_loss,
)

# Laws of every entry


@every_entry
@laws(16)
@given(layer=layers())
def test_every_cut_is_a_finite_map_of_its_rank(entry: Entry, layer: Layer) -> None:
    case = Case(entry.build(), layer)
    d_out, d_in = layer.weight.shape
    assert case.factored.max_rank == min(d_out, d_in)
    for rank in layer.ranks:
        factors = case.factored.cut(rank)
        assert (factors.d_out, factors.rank, factors.d_in) == (d_out, rank, d_in)
        assert (factors.bias is not None) == case.method.centred
        parts = [part for part in (factors.left, factors.right, factors.bias) if part is not None]
        assert all(torch.isfinite(part).all() for part in parts)
        assert factors.num_params == rank * (d_out + d_in) + (d_out if case.method.centred else 0)


@every_entry
@laws(16)
@given(layer=layers())
def test_tails_are_the_tail_at_every_rank(entry: Entry, layer: Layer) -> None:
    """Of nested stages: the first one's, which the second only lowers as far as its own metric agrees."""
    case = Case(entry.build(), layer)
    tails = case.factored.tails().tolist()
    assert len(tails) == case.factored.max_rank + 1
    first = case.factored if case.method.residual is None else case.factored.first
    for rank, tail in enumerate(tails):
        k1 = rank if case.method.residual is None else min(rank, max(1, round(case.method.share * rank)))
        assert math.isclose(tail, first.tail(k1), abs_tol=RELATIVE * case.scale)


@every_entry
@laws(16)
@given(layer=layers())
def test_tail_is_the_loss_of_the_cut_in_the_method_s_own_metric(entry: Entry, layer: Layer) -> None:
    case = Case(entry.build(), layer)
    nothing = torch.zeros_like(layer.weight)
    assert math.isclose(case.factored.tail(0), case.floor + case.loss(nothing), abs_tol=RELATIVE * case.scale)
    for rank in layer.ranks:
        measured = case.floor + case.loss(case.factored.cut(rank).dense())
        assert math.isclose(case.factored.tail(rank), measured, abs_tol=RELATIVE * case.scale)


@single_stage
@laws(16)
@given(layer=layers())
def test_tail_is_the_least_there_is(entry: Entry, layer: Layer) -> None:
    case = Case(entry.build(), layer)
    for rank in layer.ranks:
        best, least = optimum(case.target, rank, case.root, case.metric)
        assert math.isclose(case.factored.tail(rank) - case.floor, least, abs_tol=RELATIVE * case.scale)
        if separated(case.factored.energies, rank):
            apart = weighted_loss(case.factored.cut(rank).dense() - best, case.root, case.metric)
            assert apart <= 1e-14 * case.scale


@single_stage
@laws(8)
@given(layer=layers(), seed=st.integers(0, 2**16))
def test_no_method_and_no_neighbour_beats_another_in_its_own_metric(entry: Entry, layer: Layer, seed: int) -> None:
    case = Case(entry.build(), layer)
    rivals = [Case(other.build(), layer).factored for other in ENTRIES]
    for rank in layer.ranks:
        best = case.factored.tail(rank) - case.floor - RELATIVE * case.scale
        matrices = [rival.cut(rank).dense() for rival in rivals]
        matrices += [neighbours(case.factored.cut(rank), step, seed).dense() for step in (1e-3, 0.1)]
        assert min(map(case.loss, matrices)) >= best


@single_stage
@laws(16)
@given(layer=layers())
def test_every_rank_is_a_slice_and_tails_fall(entry: Entry, layer: Layer) -> None:
    case = Case(entry.build(), layer)
    widest = case.factored.cut(case.factored.max_rank)
    for rank in layer.ranks:
        factors = case.factored.cut(rank)
        torch.testing.assert_close(factors.left, widest.left[:, :rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(factors.right, widest.right[:rank], rtol=1e-12, atol=1e-12)
    tails = [case.factored.tail(rank) for rank in (0, *layer.ranks)]
    assert tails == sorted(tails, reverse=True)
    assert tails[-1] == case.floor


@every_entry
@laws(16)
@given(layer=layers(kinds=("rich",), tokens=(30, 60)))
def test_full_rank_gives_back_the_weight(entry: Entry, layer: Layer) -> None:
    case = Case(entry.build(), layer)
    factors = case.factored.cut(case.factored.max_rank)
    torch.testing.assert_close(factors.dense(), case.target, rtol=1e-7, atol=1e-7)
    if case.method.anchor is None:
        torch.testing.assert_close(case.target, layer.weight, rtol=1e-9, atol=1e-9)
    if factors.bias is not None:
        outputs = layer.x @ layer.weight.T
        expected = outputs.mean(0) - layer.read(case.method.needs).mean(0) @ case.target.T
        torch.testing.assert_close(factors.bias, expected, rtol=0, atol=1e-7)


@single_stage
@laws(16)
@given(layer=layers())
def test_full_rank_loses_nothing_that_the_metric_can_see(entry: Entry, layer: Layer) -> None:
    case = Case(entry.build(), layer)
    assert case.loss(case.factored.cut(case.factored.max_rank).dense()) <= RELATIVE * case.scale


@single_stage
def test_exact_is_said_of_the_methods_whose_tail_is_the_output_error(entry: Entry) -> None:
    layer = make_layer(5, 6, 50, seed=3)
    case = Case(entry.build(), layer)
    same = []
    for rank in layer.ranks:
        error = token_loss(layer.weight, case.factored.cut(rank), layer.x, layer.read(case.method.needs))
        same.append(math.isclose(case.factored.tail(rank), error, rel_tol=1e-8, abs_tol=RELATIVE * case.scale))
    assert all(same) == case.method.exact


@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_taken_to_float64(entry: Entry, dtype: torch.dtype) -> None:
    layer = make_layer(5, 6, 50)
    method = entry.build()
    moments, weight = layer.moments(method.needs), layer.weight.to(dtype)
    factors, expected = method.factor(weight, moments).cut(3), method.factor(weight.double(), moments).cut(3)
    assert torch.equal(factors.left, expected.left)
    assert torch.equal(factors.right, expected.right)
    assert factors.left.dtype == torch.float64


@every_entry
def test_a_root_made_before_changes_nothing(entry: Entry) -> None:
    layer = make_layer(5, 6, 50)
    case = Case(entry.build(), layer)
    factored = case.method.factor(layer.weight, case.moments, prepared=Prepared(case.root, None, is_shared=True))
    assert torch.equal(factored.cut(3).left, case.factored.cut(3).left)
    assert torch.equal(factored.cut(3).right, case.factored.cut(3).right)
    assert factored.tail(3) == case.factored.tail(3)


# What every entry refuses


@every_entry
def test_a_missing_statistic_is_named(entry: Entry) -> None:
    layer, method = make_layer(5, 6, 20), entry.build()
    for name in method.needs - {TOKEN_WEIGHTS}:  # which calibration reads, and no factor
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
    kept = {"second_moment": "covariance", "cross_moment": "cross_covariance"}
    for name in method.needs - {TOKEN_WEIGHTS}:
        moments = layer.moments(method.needs)
        if name in INPUT_STATISTICS:
            sums = {key: total.clone() for key, total in moments.require_inputs().sums.items()}
            sums[kept.get(name, name)].view(-1)[3] = value
            moments = Moments(InputMoments.from_state(moments.require_inputs().count, sums), moments.gradients)
        else:
            moments.require_gradients().sums[name].view(-1)[3] = value
        with pytest.raises((ValueError, DecompositionError), match="not finite"):
            method.factor(layer.weight, moments)


@every_entry
@pytest.mark.parametrize("rank", [-1, 0, 6, 7, 1000])
def test_a_rank_out_of_reach_is_refused_with_the_numbers(entry: Entry, rank: int) -> None:
    factored, says = Case(entry.build(), make_layer(5, 6, 20)).factored, rf"rank {rank} is not in 1 \.\.\. .* = 5"
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


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("asvd-i", {}, ANCHOR_SHRINKAGE),
        ("nsvd-i", {"share": 0.9}, ANCHOR_SHRINKAGE),  # of the rank
        ("kfac", {}, ANCHOR_SHRINKAGE),
        ("kfac", {"shrink_in": 0.3}, 0.3),
        ("kfac", {"shrink_in": 0.0}, ANCHOR_SHRINKAGE),
        ("kfac", {"shrink_out": 0.5}, ANCHOR_SHRINKAGE),
        ("shrunk", {"share": 0.4}, 0.4),
    ],
)
def test_an_anchor_is_shrunk_as_far_as_the_method_shrinks_its_inputs(
    name: str, options: dict[str, float], share: float
) -> None:
    method = build_method(name, options)
    assert anchored(method) == method.anchored(share)
