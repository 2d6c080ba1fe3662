"""A recipe as plain data says the same given and spelled out, and by its names what those that run are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml

from eckart.lowrank import method_options
from eckart.runs.composition import COMPOSITIONS
from eckart.runs.recipe import AROUND, BUDGETS, Recipe, parse_recipe
from eckart.support import recipe_settings
from eckart.support.recipe_settings import name_of, settings_of

EFFORTS = ("low", "medium", "high")


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its file holds it."""
    data: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    return data


def both(**keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe as it is given, and spelled out."""
    recipe = parse_recipe({"model": "m", "calibration": "ptb", **keys})
    return plain(recipe), plain(recipe.spelled_out())


def test_the_names_are_those_that_run() -> None:
    assert recipe_settings.COMPOSITIONS.keys() == COMPOSITIONS.keys()
    assert {make().method.name for make in COMPOSITIONS.values()} == {recipe_settings.METHOD}
    assert method_options(recipe_settings.METHOD) == recipe_settings.OPTIONS
    assert set(recipe_settings.BUDGETS) == {*BUDGETS, "keep_cache"}
    assert {*recipe_settings.PLAIN, *recipe_settings.STEPS} == set(AROUND)


@pytest.mark.parametrize(
    "more", [{}, {"bits": 4}, {"recover": True}, {"keep": None, "rules": [{"keep": 0.5}]}], ids=str
)
@pytest.mark.parametrize(("name", "effort"), list(itertools.product(COMPOSITIONS, (None, *EFFORTS))))
def test_a_composition_is_known_by_its_parts(name: str, effort: str | None, more: dict[str, Any]) -> None:
    if "bits" in more and (name != "best" or effort == "high"):
        return  # gradient steps do not go with bits
    given, spelled = both(method=name, effort=effort, **{"keep": 0.5, **more})
    assert settings_of(given) == settings_of(spelled)
    assert name_of(given) == name
    assert name_of(spelled) == name


def test_a_method_keeps_its_name() -> None:
    for keys in ({}, {"layout": "pivoted"}, {"allocation": "global", "order": "anchored"}, {"refine": True}):
        for recipe in both(method="kfac", keep=0.5, **keys):
            assert name_of(recipe) == "kfac"
    assert name_of({"method": "kfac", "order": "one-shot", "plan": "mine.json"}) == "kfac"
    assert name_of({"method": "svd"}) == "svd"
    assert name_of({}) == "best"


def test_options_are_those_that_are_not_usual() -> None:
    given, spelled = both(method={"name": "best", "options": {"bias": False}}, keep=0.5)
    assert {key: value for key, value in settings_of(given).items() if key.startswith("options")} == {
        "options.bias": False
    }
    assert settings_of(given) == settings_of(spelled)
