"""Allocation: which site gets which rank, what it costs, and plans that people edit by hand."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest

from eckart.allocation import RankPlan, Rule, plan, settle, stored_params, summarise
from eckart.compression import compress
from eckart.models.families import FAMILIES
from eckart.models.sites import Site, find_sites, low_rank_modules
from eckart.sizes import num_params
from tiny import DEFAULT_CONFIGS, tiny_model

ALL = sorted({*FAMILIES, *DEFAULT_CONFIGS})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def site(d_out: int, d_in: int, name: str = "a.0.w") -> Site:
    return Site(name, "w", "mlp", 0, name, d_in, d_out, False)


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


def test_a_llama_7b_layer_at_keep_07() -> None:
    # 4096 x 11008: floor(0.7 x 4096 x 11008 / 15104)
    sites = [site(11008, 4096)]
    assert settle(sites, {"a.0.w": 2089}).kept_params == 2089 * 15104
    assert site(11008, 4096).break_even_rank == 2985


def test_keep_one_leaves_everything_dense(model: Any) -> None:
    made = plan(model, 1)
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


def test_either_keep_or_rules(model: Any) -> None:
    for arguments in ({}, {"keep": 0.5, "rules": [Rule(0.5)]}):
        with pytest.raises(ValueError, match="give either keep or rules"):
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


def test_last_12_of_32_blocks_at_keep_046() -> None:
    deep = tiny_model("llama", num_hidden_layers=32)
    made = plan(deep, 0.46, blocks="last 12")
    assert {s.block for s in made.sites if made.rank(s) is not None} == set(range(20, 32))
    assert len(made.ranks) == 12 * 7
    summary = summarise(made, deep)
    assert summary["sites_low_rank"] == 84
    assert summary["sites_dense"] == 20 * 7
    # 20 of 32 blocks whole and 12 at 0.46 or, by rounding down, a little less
    assert 0.72 < summary["keep_of_linears"] <= (20 + 12 * 0.46) / 32


# Counting


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bert"])
def test_the_summary_is_what_compression_then_does(model_type: str) -> None:
    dense, spare = tiny_model(model_type), tiny_model(model_type)
    made = plan(dense, 0.6, blocks="last 2")
    summary = summarise(made, dense)
    before = num_params(dense)
    compress(dense, "svd", made)
    assert (summary["sites_low_rank"], summary["sites_dense"]) == (
        len(low_rank_modules(dense)),
        len(find_sites(spare)) // 3,
    )
    assert summary["keep_of_model"] == pytest.approx(num_params(dense) / before)
    assert summary["keep_of_linears"] == pytest.approx(made.kept_params / made.dense_params)


# Break-even


def test_past_break_even_a_site_stays_dense_with_a_note() -> None:
    sites = [site(32, 48, "a.0.w"), site(32, 48, "a.1.w")]
    assert sites[0].break_even_rank == 19
    made = settle(sites, {"a.0.w": 20, "a.1.w": 19})
    assert made.ranks == {"a.0.w": None, "a.1.w": 19}
    assert made.notes == {"a.0.w": "rank 20 is past break-even (19): left dense"}
    assert made.kept_params == 32 * 48 + 19 * 80


def test_a_row_vector_has_no_rank_that_pays() -> None:
    made = settle([site(1, 48)], {"a.0.w": 1})
    assert made.ranks == {"a.0.w": None}
    assert "a.0.w" in made.notes


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_an_impossible_rank_gives_the_limit(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"a\.0\.w: rank {rank} is not in 1 \.\.\. min\(d_out, d_in\) = 32"):
        settle([site(32, 48)], {"a.0.w": rank})


# plan.json


def test_a_plan_comes_back_from_json(model: Any) -> None:
    made = plan(model, 0.55, include=["mlp", "q_proj"], blocks="0,2")
    text = made.to_json()
    again = RankPlan.from_json(text, find_sites(model))
    assert again == made
    assert again.to_json() == text
    written = json.loads(text)
    assert written["keep"] == pytest.approx(made.kept_params / made.dense_params, abs=1e-6)
    assert (written["dense_params"], written["kept_params"]) == (made.dense_params, made.kept_params)


def test_a_dense_site_comes_back_as_one(model: Any) -> None:
    made = plan(model, rules=[Rule(1, include=("mlp",)), Rule(0.5)])
    assert RankPlan.from_json(made.to_json(), find_sites(model)).ranks == made.ranks


def edited(model: Any, change: dict[str, Any]) -> RankPlan:
    plain = json.loads(plan(model, 0.5).to_json())
    plain["ranks"].update(change)
    return RankPlan.from_json(json.dumps(plain), find_sites(model))


def test_a_plan_may_be_edited_by_hand(model: Any) -> None:
    made = edited(model, {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": None})
    assert made.ranks["model.layers.0.mlp.up_proj"] == 3
    assert made.ranks["model.layers.1.mlp.up_proj"] is None
    past = edited(model, {"model.layers.0.mlp.up_proj": 25})
    assert past.notes == {"model.layers.0.mlp.up_proj": "rank 25 is past break-even (19): left dense"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.mlp.up_proj": 3}, "the plan names model.layers.9.mlp.up_proj, which this model has not"),
        ({"model.layers.0.mlp.up_proj": 3.5}, "mlp.up_proj: rank 3.5 is neither a whole number nor null"),
        ({"model.layers.0.mlp.up_proj": "3"}, "mlp.up_proj: rank '3' is neither a whole number nor null"),
        ({"model.layers.0.mlp.up_proj": True}, "mlp.up_proj: rank True is neither a whole number nor null"),
        ({"model.layers.0.mlp.up_proj": 0}, "mlp.up_proj: rank 0 is not in 1"),
        ({"model.layers.0.mlp.up_proj": 33}, "mlp.up_proj: rank 33 is not in 1"),
    ],
)
def test_a_wrong_edit_names_the_site(model: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        edited(model, change)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"ranks": 3}', '{"ranks": null}'])
def test_what_is_no_plan_is_refused(model: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"not a rank plan: .*expected JSON with a map 'ranks'"):
        RankPlan.from_json(text, find_sites(model))


def test_a_bare_string_is_one_pattern() -> None:
    model = tiny_model("llama")
    assert plan(model, 0.5, include="mlp") == plan(model, 0.5, include=["mlp"])
    assert plan(model, 0.5, exclude="mlp") == plan(model, 0.5, exclude=("mlp",))
