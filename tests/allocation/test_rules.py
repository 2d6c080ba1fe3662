"""The same share at every selected site: SFSD's rule, choosing, and the budgets it takes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from eckart.allocation import Rule, plan, stored_params
from eckart.lowrank import LAYOUTS, Layout, pivoted_rank_for
from eckart.models.sites import find_sites
from eckart.support.sizes import num_params
from tiny import DEFAULT_CONFIGS, FAMILY_CONFIGS, tiny_model

ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


# The rule: SFSD Eq. 3


@pytest.mark.parametrize("keep", [0.99, 0.75, 0.7, 0.5, 0.46, 0.1, 0.0001])
@pytest.mark.parametrize("model_type", ALL)
def test_ranks_are_those_of_sfsd_equation_3(model_type: str, keep: float) -> None:
    sites = find_sites(tiny_model(model_type))
    made = plan(tiny_model(model_type), keep)
    exact = Fraction(str(keep))
    for s in sites:
        rank = made.rank(s)
        assert rank == max(1, math.floor(exact * s.d_out * s.d_in / (s.d_out + s.d_in)))
        assert rank == 1 or stored_params(s, rank) <= exact * s.num_params < stored_params(s, rank + 1)
    assert made.ranks.keys() == {s.name for s in sites}
    assert made.notes == {}


def test_pivoted_ranks_are_larger_for_the_same_numbers(model: Any) -> None:
    plain, pivoted = plan(model, 0.6), plan(model, 0.6, layout="pivoted")
    for s in plain.sites:
        assert pivoted.rank(s) == pivoted_rank_for(0.6, s.d_out, s.d_in) > plain.ranks[s.name]
        assert stored_params(s, pivoted.rank(s), "pivoted") <= 0.6 * s.num_params


def test_a_joint_group_keeps_the_share_of_its_stack(model: Any) -> None:
    groups = {s.input_group for s in find_sites(model)}
    made = plan(model, 0.5, joint=groups)
    assert made.joint == groups
    # q is 32 x 32, k and v are 16 x 32: floor(0.5 x 64 x 32 / (64 + 32))
    assert {made.ranks[f"model.layers.0.self_attn.{role}_proj"] for role in "qkv"} == {10}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keep_one_leaves_everything_dense(model: Any, layout: Layout) -> None:
    made = plan(model, 1, layout=layout)
    assert set(made.ranks.values()) == {None}
    assert made.kept_params == made.dense_params == sum(s.num_params for s in find_sites(model))
    assert made.notes == {}


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, 70])
def test_keep_is_a_share_kept(model: Any, keep: float) -> None:
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]: it is the share of parameters kept, not removed"):
        plan(model, keep)


@pytest.mark.parametrize("multiple", [1, 2, 4, 8, 16])
def test_ranks_are_rounded_down_to_a_multiple(model: Any, multiple: int) -> None:
    exact, rounded = plan(model, 0.8), plan(model, 0.8, rank_multiple=multiple)
    for s in exact.sites:
        rank, down = exact.rank(s), rounded.rank(s)
        assert rank is not None
        assert down is not None
        if rank >= multiple:
            assert down % multiple == 0
            assert rank - multiple < down <= rank
        else:
            assert down == rank  # less than one multiple: as it is, never zero
    assert rounded.kept_params <= exact.kept_params


def test_a_rank_multiple_is_positive(model: Any) -> None:
    with pytest.raises(ValueError, match="rank_multiple 0 is not positive"):
        plan(model, 0.5, rank_multiple=0)


# The other budgets


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep_total", [0.6, 0.75, 0.9])
def test_a_share_of_the_model_is_met(model: Any, keep_total: float, layout: Layout) -> None:
    made = plan(model, keep_total=keep_total, layout=layout)
    whole = num_params(model)
    after = whole - made.dense_params + made.kept_params
    # Each of the 21 linears may fall short of its share by less than one more rank.
    assert keep_total * whole - 21 * 80 < after <= keep_total * whole


def test_a_share_of_the_model_is_the_same_share_everywhere(model: Any) -> None:
    made = plan(model, keep_total=0.7, include="mlp")
    kept = made.kept_params - sum(s.num_params for s in made.sites if s.part != "mlp")
    share = kept / sum(s.num_params for s in made.sites if s.part == "mlp")
    assert share < 0.7
    assert made.ranks == plan(model, share, include="mlp").ranks


def test_exactly_one_budget(model: Any) -> None:
    message = "give exactly one of keep, keep_total, max_bytes, rules, not "
    for arguments, which in (
        ({}, "none"),
        ({"keep": 0.5, "rules": [Rule(0.5)]}, "keep and rules"),
        ({"keep": 0.5, "keep_total": 0.5}, "keep and keep_total"),
        ({"max_bytes": 10**6, "rules": [Rule(0.5)]}, "max_bytes and rules"),
    ):
        with pytest.raises(ValueError, match=message + which):
            plan(model, **arguments)


# Choosing


def test_what_is_not_chosen_stays_dense(model: Any) -> None:
    made = plan(model, 0.5, include=["mlp"], exclude=["down_proj"], blocks="last 2")
    assert made.ranks.keys() == {f"model.layers.{b}.mlp.{role}_proj" for b in (1, 2) for role in ("gate", "up")}
    assert len(made.sites) == len(find_sites(model))
    untouched = sum(s.num_params for s in made.sites if s.name not in made.ranks)
    assert made.kept_params == untouched + 4 * 9 * (32 + 48)


def test_the_first_rule_that_chooses_a_site_decides(model: Any) -> None:
    rules = [Rule(1, include=("q_proj",)), Rule(0.3, include=("attention",), blocks="first 1"), Rule(0.6)]
    made = plan(model, rules=rules)
    alone = {keep: plan(model, keep) for keep in (0.3, 0.6)}
    for s in made.sites:
        if s.role == "self_attn.q_proj":
            assert made.ranks[s.name] is None
        elif s.part == "attention" and s.block == 0:
            assert made.rank(s) == alone[0.3].rank(s)
        else:
            assert made.rank(s) == alone[0.6].rank(s)
    assert plan(model, rules=list(reversed(rules))).ranks == alone[0.6].ranks


def test_rules_keep_joint_groups_together(model: Any) -> None:
    joint = {s.input_group for s in find_sites(model)}
    made = plan(model, rules=[Rule(0.4, include=("attention",)), Rule(0.6)], joint=joint, layout="pivoted")
    attention, mlp = (plan(model, keep, joint=joint, layout="pivoted") for keep in (0.4, 0.6))
    for s in made.sites:
        assert made.rank(s) == (attention if s.part == "attention" else mlp).rank(s)
    with pytest.raises(
        ValueError, match=r"joint model\.layers\.0\.self_attn\.q_proj\+k_proj\+v_proj: its linears share"
    ):
        plan(model, rules=[Rule(0.4, include=("q_proj",)), Rule(0.6)], joint=joint)


def test_last_12_of_32_blocks_at_keep_046() -> None:
    deep = tiny_model("llama", num_hidden_layers=32)
    made = plan(deep, 0.46, blocks="last 12")
    assert {s.block for s in made.sites if made.rank(s) is not None} == set(range(20, 32))
    assert len(made.ranks) == 12 * 7
    # 20 of 32 blocks whole and 12 at 0.46 or, by rounding down, a little less
    assert 0.72 < made.kept_params / made.dense_params <= (20 + 12 * 0.46) / 32


def test_a_bare_string_is_one_pattern(model: Any) -> None:
    assert plan(model, 0.5, include="mlp") == plan(model, 0.5, include=["mlp"])
    assert plan(model, 0.5, exclude="mlp") == plan(model, 0.5, exclude=("mlp",))
    assert plan(model, keep_total=0.8, include="mlp") == plan(model, keep_total=0.8, include=["mlp"])
