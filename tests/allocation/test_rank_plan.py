"""Plans of ranks: what they store, where a rank does not pay, and as JSON that people edit by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.allocation import RankPlan, Rule, plan, settle, stored_params
from eckart.lowrank import LAYOUTS, Layout
from eckart.models.sites import find_sites
from tiny import tiny_model

from .curves import block, site


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


QKV = {"a.0.q": 5, "a.0.k": 5, "a.0.v": 5}


# What is stored


def test_a_llama_7b_layer_at_keep_07() -> None:
    # 4096 x 11008: floor(0.7 x 4096 x 11008 / 15104)
    sites = [site(11008, 4096)]
    assert settle(sites, {"a.0.w": 2089}).kept_params == 2089 * 15104
    assert sites[0].break_even_rank == 2985


def test_the_pivoted_layout_stores_less() -> None:
    sites = [site(48, 32), site(16, 16, "a.1.w")]
    made = settle(sites, {"a.0.w": 7}, layout="pivoted")
    assert made.kept_params == 7 * (48 + 32 - 7) + 16 * 16
    assert stored_params(sites[0], 7, "pivoted") == 7 * (48 + 32 - 7)
    assert stored_params(sites[0], 7) == 7 * (48 + 32)
    assert stored_params(sites[0], None, "pivoted") == 48 * 32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_joint_group_counts_its_right_factor_once(layout: Layout) -> None:
    sites = block()
    alone = settle(sites, QKV, layout=layout)
    joint = settle(sites, QKV, layout=layout, joint=["a.0.q"])
    rest = sum(s.num_params for s in sites[3:])
    fewer = 5 if layout == "pivoted" else 0
    assert joint.kept_params == rest + 5 * (32 + 16 - fewer)
    assert alone.kept_params == rest + 5 * (32 + 3 * 16 - 3 * fewer)
    assert [unit.name for unit in joint.units] == ["a.0.q+k+v", "a.0.o", "a.0.up", "a.0.down"]


def test_a_dense_joint_group_stores_its_weights() -> None:
    sites = block()
    for ranks in ({}, dict.fromkeys(QKV)):
        assert settle(sites, ranks, joint=["a.0.q"]).kept_params == sum(s.num_params for s in sites)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_no_settled_site_stores_more_than_its_weight(d_out: int, d_in: int, data: Any) -> None:
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    for layout in LAYOUTS:
        made = settle([site(d_out, d_in)], {"a.0.w": rank}, layout=layout)
        assert made.kept_params <= d_out * d_in
        # Every rank below full pays off in the pivoted layout.
        if layout == "pivoted":
            assert (made.ranks["a.0.w"] is None) == (rank == min(d_out, d_in))


# Where a rank does not pay


def test_past_break_even_a_site_stays_dense_with_a_note() -> None:
    sites = [site(32, 48, "a.0.w"), site(32, 48, "a.1.w")]
    assert sites[0].break_even_rank == 19
    made = settle(sites, {"a.0.w": 20, "a.1.w": 19})
    assert made.ranks == {"a.0.w": None, "a.1.w": 19}
    assert made.notes == {"a.0.w": "rank 20 is past break-even (19): stays dense"}
    assert made.kept_params == 32 * 48 + 19 * 80


def test_at_full_rank_a_pivoted_site_stays_dense_with_a_note() -> None:
    made = settle([site(32, 48)], {"a.0.w": 32}, layout="pivoted")
    assert made.ranks == {"a.0.w": None}
    assert made.notes == {"a.0.w": "rank 32 is full, and stores as much as the dense weight: stays dense"}
    assert settle([site(32, 48)], {"a.0.w": 31}, layout="pivoted").notes == {}


def test_a_joint_group_is_settled_as_one() -> None:
    sites = block()
    # 32 x 16 stacked: 10 pays, though 10 x (8 + 16) is more than the 8 x 16 of k alone; 11 does not.
    assert settle(sites, dict.fromkeys(QKV, 10), joint=["a.0.q"]).ranks == dict.fromkeys(QKV, 10)
    made = settle(sites, dict.fromkeys(QKV, 11), joint=["a.0.q"])
    assert made.ranks == dict.fromkeys(QKV)
    assert made.notes == dict.fromkeys(QKV, "rank 11 is past break-even (10): stays dense")


def test_a_row_vector_has_no_rank_that_pays() -> None:
    made = settle([site(1, 48)], {"a.0.w": 1})
    assert made.ranks == {"a.0.w": None}
    assert "a.0.w" in made.notes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, -1, 33])
def test_an_impossible_rank_gives_the_limit(rank: int, layout: Layout) -> None:
    with pytest.raises(ValueError, match=rf"a\.0\.w: rank {rank} is not in 1 \.\.\. min\(d_out, d_in\) = 32"):
        settle([site(32, 48)], {"a.0.w": rank}, layout=layout)


def test_a_joint_rank_is_limited_by_the_stack() -> None:
    with pytest.raises(ValueError, match=r"a\.0\.q\+k\+v: rank 17 is not in 1 \.\.\. min\(d_out, d_in\) = 16"):
        settle(block(), dict.fromkeys(QKV, 17), joint=["a.0.q"])


@pytest.mark.parametrize("ranks", [{**QKV, "a.0.v": 4}, {**QKV, "a.0.v": None}, {"a.0.q": 5, "a.0.k": 5}])
def test_unequal_ranks_in_a_joint_group_name_it(ranks: dict[str, int | None]) -> None:
    message = r"joint a\.0\.q\+k\+v: its linears share a right factor and need one rank.*a\.0\.k 5, a\.0\.v (4|dense)"
    with pytest.raises(ValueError, match=message):
        settle(block(), ranks, joint=["a.0.q"])
    with pytest.raises(ValueError, match=message):
        RankPlan(tuple(block()), ranks, joint=frozenset({"a.0.q"}))


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="layout 'packed' is none of plain, pivoted"):
        settle(block(), QKV, layout="packed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no site reads 'a\.0\.z'; joint names input groups, such as 'a\.0\.q'"):
        settle(block(), QKV, joint=["a.0.z"])


# plan.json


def test_a_plan_comes_back_from_json(model: Any) -> None:
    made = plan(model, 0.55, include=["mlp", "q_proj"], blocks="0,2")
    text = made.to_json()
    again = RankPlan.from_json(text, find_sites(model))
    assert again == made
    assert again.to_json() == text
    written = json.loads(text)
    planned = sum(site.num_params for site in find_sites(model) if site.name in made.ranks)
    assert written["planned_params"] == planned < made.dense_params
    kept = sum(stored_params(site, made.rank(site)) for site in find_sites(model) if site.name in made.ranks)
    assert written["keep"] == pytest.approx(kept / planned, abs=1e-6)
    assert 0.4 < made.keep <= 0.55
    assert (written["dense_params"], written["kept_params"]) == (made.dense_params, made.kept_params)


def test_layout_and_joint_groups_come_back_from_json(model: Any) -> None:
    joint = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"}
    made = plan(model, 0.5, layout="pivoted", joint=joint)
    again = RankPlan.from_json(made.to_json(), find_sites(model))
    assert again == made
    assert (again.layout, again.joint) == ("pivoted", joint)


def test_a_plan_without_them_is_plain(model: Any) -> None:
    written = json.loads(plan(model, 0.5).to_json())
    del written["layout"], written["joint"]
    assert RankPlan.from_json(json.dumps(written), find_sites(model)) == plan(model, 0.5)


def test_a_dense_site_comes_back_as_one(model: Any) -> None:
    made = plan(model, rules=[Rule(1, include=("mlp",)), Rule(0.5)])
    assert RankPlan.from_json(made.to_json(), find_sites(model)).ranks == made.ranks


def edited(model: Any, change: dict[str, Any], **others: Any) -> RankPlan:
    plain = json.loads(plan(model, 0.5).to_json()) | others
    plain["ranks"].update(change)
    return RankPlan.from_json(json.dumps(plain), find_sites(model))


def test_a_plan_may_be_edited_by_hand(model: Any) -> None:
    made = edited(model, {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": None})
    assert made.ranks["model.layers.0.mlp.up_proj"] == 3
    assert made.ranks["model.layers.1.mlp.up_proj"] is None
    past = edited(model, {"model.layers.0.mlp.up_proj": 25})
    assert past.notes == {"model.layers.0.mlp.up_proj": "rank 25 is past break-even (19): stays dense"}
    assert edited(model, {"model.layers.0.mlp.up_proj": 25}, layout="pivoted").notes == {}


@pytest.mark.parametrize(
    ("change", "others", "message"),
    [
        ({"model.layers.9.mlp.up_proj": 3}, {}, "the plan names model.layers.9.mlp.up_proj, which this model has not"),
        ({"model.layers.0.mlp.up_proj": 3.5}, {}, "mlp.up_proj: rank 3.5 is neither a whole number nor null"),
        ({"model.layers.0.mlp.up_proj": "3"}, {}, "mlp.up_proj: rank '3' is neither a whole number nor null"),
        ({"model.layers.0.mlp.up_proj": True}, {}, "mlp.up_proj: rank True is neither a whole number nor null"),
        ({"model.layers.0.mlp.up_proj": 0}, {}, "mlp.up_proj: rank 0 is not in 1"),
        ({"model.layers.0.mlp.up_proj": 33}, {}, "mlp.up_proj: rank 33 is not in 1"),
        ({}, {"layout": "packed"}, "layout 'packed' is none of plain, pivoted"),
        ({}, {"layout": ["plain"]}, "layout .'plain'. is none of plain, pivoted"),
        ({}, {"joint": "q_proj"}, "joint 'q_proj' is not a list of input groups"),
        ({}, {"joint": [3]}, "joint .3. is not a list of input groups"),
        ({}, {"joint": ["model.layers.0.mlp.up_proj"]}, "no site reads 'model.layers.0.mlp.up_proj'"),
        (
            {"model.layers.0.mlp.up_proj": 3},
            {"joint": ["model.layers.0.mlp.gate_proj"]},
            r"joint model.layers.0.mlp.gate_proj\+up_proj: its linears share",
        ),
    ],
)
def test_a_wrong_edit_names_what_is_wrong(
    model: Any, change: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("layers.", r"layers\.")):
        edited(model, change, **others)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"ranks": 3}', '{"ranks": null}'])
def test_what_is_no_plan_is_refused(model: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"not a rank plan: .*expected JSON with a map 'ranks'"):
        RankPlan.from_json(text, find_sites(model))
