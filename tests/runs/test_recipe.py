"""Recipes: what is written is what is read, and a slip of the pen is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from eckart.compression.tuning.refinement import Refinement
from eckart.data.mixtures import BROAD, spell_out
from eckart.lowrank import METHODS, build_method
from eckart.runs.composition import COMPOSITIONS, Composition
from eckart.runs.recipe import Recipe, load_recipe, parse_recipe

GOOD = {
    "model": "m",
    "method": {"name": "asvd-0", "options": {"alpha": 1.0}},
    "rules": [{"keep": 0.46, "blocks": "last 12"}, {"keep": 0.9}],
    "calibration": {"corpus": "ptb", "samples": 4, "length": 8, "seed": 3},
    "evaluate": ["perplexity:ptb", {"task": "perplexity:c4", "limit": 2}],
}


def test_a_recipe_survives_its_own_yaml(tmp_path: Path) -> None:
    recipe = parse_recipe(GOOD)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert recipe.evaluate[0].task == "perplexity:ptb"
    assert recipe.evaluate[1].limit == 2


SCORED = {"name": "surgical", "score": "perplexity:ptb"}
# Everything that may be around a method, in short and in whole.
AROUND: list[dict[str, Any]] = [
    {"keep": 0.5},
    {"keep_total": 0.8, "method": "sfsd", "sites": {"include": ["mlp"], "exclude": ["down_proj"], "blocks": "last 2"}},
    {"max_bytes": 10_000, "method": {"name": "best", "options": {"bias": False}}, "layout": "plain", "refine": False},
    {"keep": 0.5, "method": "asvd-i", "allocation": "global", "order": "anchored", "joint": True, "refit": True},
    {"keep": 0.5, "method": "svd", "refine": True, "distil": {"steps": 3}, "rank_multiple": 8},
    {"keep": 0.5, "refine": {"steps": 4}, "distil": True},
    {"keep": 0.5, "method": "best-distilled"},
    {"keep": 0.5, "method": "svd", "recover": True},
    {"keep": 0.5, "recover": {"steps": 3, "rate": 0.01, "batch": 2, "corpus": "cola"}},
    {"keep": 0.5, "method": "fwsvd", "calibration": {"fisher": "recorded"}, "allocation": "global", "recover": False},
    {"keep": 0.5, "method": "svd", "allocation": {**SCORED, "tolerance": 0.01, "limit": 5}},
    {"method": "sfsd", "allocation": SCORED},
    {"rules": [{"keep": 0.5, "include": ["mlp"]}], "joint": True},
    {"plan": "plan.json", "order": "sequential"},
    {"max_bytes": 10_000, "bits": "auto", "turns": 2},
    {"keep": 0.5, "method": "asvd-i", "bits": 4, "group": 32},
    {"rules": [{"keep": 0.5, "include": ["mlp"]}], "bits": 8},
]


@pytest.mark.parametrize("keys", AROUND)
def test_what_is_around_a_method_survives_yaml(tmp_path: Path, keys: dict[str, Any]) -> None:
    recipe = parse_recipe({"model": "m", **keys})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def parts(composition: Composition) -> tuple[object, ...]:
    """A composition in what can be compared: two methods of one name hold different functions."""
    return (
        *(composition.method.name, composition.method.options, composition.allocation, composition.layout),
        *(composition.order, composition.joint, composition.refit, composition.refinement, composition.distillation),
        *(composition.recovery, composition.bits, composition.group, composition.turns),
    )


@pytest.mark.parametrize("keys", AROUND)
def test_a_recipe_that_is_spelled_out_outlives_the_meaning_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: dict[str, Any]
) -> None:
    recipe = parse_recipe({"model": "m", **keys})
    before, whole = recipe.composition, recipe.spelled_out()
    assert whole.spelled_out() == whole
    assert whole.method.name == before.method.name in METHODS
    (tmp_path / "recipe.yaml").write_text(whole.to_yaml())
    for name in COMPOSITIONS:
        monkeypatch.setitem(COMPOSITIONS, name, lambda: Composition(build_method("svd")))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == whole
    if recipe.plan is not None or recipe.rules is not None:  # these decide the ranks, whatever the allocation
        before = replace(before, allocation=again.composition.allocation)
    if recipe.plan is not None:
        before = replace(before, layout=again.composition.layout, joint=again.composition.joint)
    before = replace(before, allocation=before.allocation.spelled_out())
    assert parts(again.composition) == parts(before)
    for name in ("keep", "keep_total", "max_bytes", "speed", "rules", "plan", "sites", "rank_multiple"):
        assert getattr(again, name) == getattr(recipe, name)
    assert again.calibration.corpus == spell_out(recipe.calibration.corpus)
    assert again.calibration.model_copy(update={"corpus": recipe.calibration.corpus}) == recipe.calibration


@pytest.mark.parametrize("name", METHODS)
def test_a_method_alone_has_nothing_around_it(name: str) -> None:
    recipe = parse_recipe({"model": "m", "method": name, "keep": 0.5})
    assert parts(recipe.composition) == parts(Composition(build_method(name)))
    assert parts(recipe.spelled_out().composition) == parts(Composition(build_method(name)))


def test_the_default_is_best() -> None:
    recipe = parse_recipe({"model": "m", "keep": 0.5})
    assert recipe.method.name == "best"
    assert parts(recipe.composition) == parts(COMPOSITIONS["best"]())


def test_efforts_are_steps_of_the_same_composition() -> None:
    compositions = {
        effort: parse_recipe({"model": "m", "keep": 0.5, "effort": effort}).composition
        for effort in ("low", "medium", "high")
    }
    assert parts(compositions["medium"]) == parts(COMPOSITIONS["best"]())
    assert [composition.order for composition in compositions.values()] == ["one-shot", "anchored", "anchored"]
    assert [composition.refinement for composition in compositions.values()] == [None, None, Refinement()]
    # What the recipe says itself goes before what an effort brings.
    own = parse_recipe({"model": "m", "keep": 0.5, "effort": "low", "order": "anchored", "refine": {"steps": 2}})
    assert (own.composition.order, own.composition.refinement) == ("anchored", Refinement(steps=2))
    spelled = own.spelled_out()
    assert spelled.effort is None
    assert parts(spelled.composition) == parts(own.composition)


def test_a_baseline_stays_as_it_is() -> None:
    recipe = parse_recipe({"model": "m", "method": "llm-pruner", "keep": 0.5})
    assert recipe.spelled_out() is recipe


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give exactly one of keep, keep_total, max_bytes, speed, rules, plan"),
        ({"keep": 0.5, "effort": "most"}, "effort: Input should be 'low', 'medium' or 'high'"),
        ({"keep": 0.5, "method": "asvd-i", "effort": "low"}, "effort is for a composition (best, best-distilled), and"),
        ({"method": "int8", "effort": "low"}, "int8 is no low-rank method: leave out effort"),
        ({"keep": 0.5, "max_bytes": 5}, "give exactly one of"),
        ({"keep": 0.5, "allocation": SCORED, "keep_total": 0.5}, "give exactly one of"),
        ({"allocation": "global"}, "give exactly one of"),
        ({"allocation": {"name": "sensitivity", "score": "perplexity:ptb"}}, "give exactly one of"),
        ({"keep_total": 1.1}, "keep_total: Input should be less than or equal to 1"),
        ({"max_bytes": 0}, "max_bytes: Input should be greater than 0"),
        ({"rules": [{"keep": 0.5}], "sites": {"include": ["mlp"]}}, "leave out sites: what is in rules decides that"),
        ({"rules": [{"keep": 0.5}], "allocation": "global"}, "leave out allocation: what is in rules decides that"),
        (
            {"plan": "p", "sites": {"blocks": "last 1"}, "layout": "plain"},
            "leave out sites and layout: what is in plan",
        ),
        ({"plan": "p", "joint": False}, "leave out joint: what is in plan decides that"),
        ({"plan": "p", "allocation": SCORED}, "leave out allocation"),
        ({"keep": 0.5, "allocation": {"name": "per-role"}}, "allocation: per-role needs shares, such as"),
        (
            {"keep": 0.5, "allocation": {"name": "glbal"}},
            "allocation.name: unknown allocation 'glbal'; did you mean 'global'?",
        ),
        (
            {"keep": 0.5, "allocation": {"name": "global", "exat": True}},
            "unknown key 'exat' in allocation; did you mean 'ex",
        ),
        ({"keep": 0.5, "sites": {"block": "last 1"}}, "unknown key 'block' in sites; did you mean 'blocks'?"),
        ({"keep": 0.5, "refine": {"steps": -1}}, "refine.steps: Input should be greater than or equal to 0"),
        ({"keep": 0.5, "refine": {"rate": 1.0}}, "refine.rate: Input should be less than 1"),
        ({"keep": 0.5, "distil": {"batch": 0}}, "distil.batch: Input should be greater than 0"),
        ({"keep": 0.5, "recover": {"steps": -1}}, "recover.steps: Input should be greater than or equal to 0"),
        ({"keep": 0.5, "recover": {"corpse": "cola"}}, "unknown key 'corpse' in recover; did you mean 'corpus'?"),
        ({"method": "int8", "recover": True}, "int8 is no low-rank method: leave out recover"),
        (
            {"keep": 0.5, "method": "svd", "calibration": {"fisher": "recorded"}},
            "fisher: recorded goes with a method that needs Fisher sums alone, as fwsvd, and svd needs no gradient",
        ),
        (
            {"keep": 0.5, "calibration": {"fisher": "recorded"}},
            "best needs gradient_covariance and token_weights: leave it out",
        ),
        ({"method": "int8", "calibration": {"fisher": "recorded"}}, "int8 needs no gradient"),
        (
            {"keep": 0.5, "calibration": {"fisher": "none"}},
            "calibration.fisher: Input should be 'gathered' or 'recorded'",
        ),
        ({"keep": 0.5, "layout": "round"}, "layout: Input should be 'plain' or 'pivoted'"),
        ({"keep": 0.5, "order": "last"}, "order: Input should be 'one-shot', 'sequential' or 'anchored'"),
        ({"keep": 0.5, "rank_multiple": 0}, "rank_multiple: Input should be greater than 0"),
        ({"keep": 0.5, "method": {"name": "best", "options": {"share": 0.5}}}, "method kfac has no setting 'share'"),
        ({"method": "int8", "layout": "pivoted"}, "int8 is no low-rank method: leave out layout"),
        (
            {"method": "llm-pruner", "keep": 0.5, "sites": {"include": ["mlp"]}, "refine": True},
            "leave out refine and sites",
        ),
        ({"method": "llm-pruner", "keep_total": 0.5}, "llm-pruner takes keep, and no other budget"),
        ({"method": "int8", "bits": 4}, "int8 has bits of its own: leave out bits"),
        ({"keep": 0.5, "group": 32}, "group goes with bits: leave it out"),
        ({"keep": 0.5, "turns": 1}, "turns goes with bits: leave it out"),
        ({"keep": 0.5, "bits": 5}, "bits: Input should be 'auto', 8, 4, 3 or 2"),
        ({"keep": 0.5, "bits": 4, "group": 4}, "group: Input should be greater than or equal to 8"),
        ({"keep": 0.5, "bits": "auto"}, "bits: auto goes with max_bytes and the allocation global"),
        (
            {"max_bytes": 9, "bits": "auto", "allocation": "uniform"},
            "auto goes with max_bytes and the allocation global",
        ),
        ({"max_bytes": 9, "bits": 4, "method": "svd"}, "bits with max_bytes goes with the allocation global"),
        ({"keep": 0.5, "bits": 8, "layout": "pivoted"}, "bits does not go with layout: pivoted"),
        ({"keep": 0.5, "bits": 8, "joint": True, "refit": True}, "bits does not go with joint and refit"),
        ({"plan": "p.json", "bits": 8}, "bits does not go with a plan, which says them: leave it out"),
        ({"speed": 1.5, "bits": 8}, "bits does not go with speed"),
        ({"keep": 0.5, "bits": 8, "effort": "high"}, "leave out refine, or give effort medium"),
        ({"keep": 0.5, "bits": 8, "distil": True, "recover": True}, "off their codes: leave out distil and recover"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^recipe: [^;]*(; (did you mean|its settings)[^;]*)?$") as caught:
        parse_recipe({"model": "m", **keys})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "calibration", "corpus"),
    [
        ("m", {}, BROAD),
        ("m", None, BROAD),
        ("m", {"samples": 32}, BROAD),
        ("m", {"corpus": None}, BROAD),
        ("builtin", {"samples": 32}, "builtin"),
        ("builtin", "c4", "c4"),
        ("m", "broad*3+mine.jsonl", "broad*3+mine.jsonl"),
        ("m", {"corpus": "ptb"}, "ptb"),
    ],
)
def test_the_text_is_broad_where_nobody_names_one(model: str, calibration: Any, corpus: str) -> None:
    recipe = parse_recipe({"model": model, "keep": 0.5, "calibration": calibration})
    assert recipe.calibration.corpus == corpus
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    if not calibration:
        assert parse_recipe({"model": model, "keep": 0.5}) == recipe


def test_a_method_may_be_a_bare_name() -> None:
    assert parse_recipe({"model": "m", "method": "sfsd", "keep": 0.5}).method.name == "sfsd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kep": 0.7}, "unknown key 'kep'; did you mean 'keep'?"),
        ({"calibration": {"sampels": 4}}, "unknown key 'sampels' in calibration; did you mean 'samples'?"),
        ({"rules": [{"keep": 0.5, "block": "last 2"}]}, "unknown key 'block' in rules.0; did you mean 'blocks'?"),
        ({"evaluate": [{"task": "x", "limt": 4}]}, "did you mean 'limit'?"),
        ({"method": "asvd-4"}, "did you mean"),
        ({"method": {"name": "svd", "options": {"alpha": 1}}}, "method svd has no setting 'alpha'"),
        ({"keep": 70}, "keep: Input should be less than or equal to 1, and is 70: it is the share that is kept"),
        ({"max_bytes": "8GB"}, "unable to parse string as an integer, and is '8GB': whole bytes, such as 8000000000"),
        ({"keep": 0.5, "max_bytes": 9}, "speed, rules, plan, not keep and max_bytes"),
        ({"keep": 0}, "keep: Input should be greater than 0"),
        ({"keep": 0.5}, "give exactly one of keep, keep_total, max_bytes, speed, rules, plan"),
        ({"rules": None}, "give exactly one of keep, keep_total, max_bytes, speed, rules, plan"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"calibration": "ptb*two+c4"}, "calibration: 'ptb*two+c4': weight 'two' of 'ptb' is no positive number"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        parse_recipe({**GOOD, **change}, where="r.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "expected keys and values"), ("", "model: Field required")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(file)
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


def test_recipes_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(GOOD).model = "other"  # type: ignore[misc]
    assert isinstance(parse_recipe(GOOD), Recipe)
