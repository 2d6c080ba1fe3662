"""Recipe settings: what tells one recipe from another beside model and size. Recipes are plain data.

A recipe may be as it was given, with a composition's name (best), or spelled out, with all that the name stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eckart.support.recipe_words import STEPS, Parts, is_on, places_in_words

# What says how large the result may be.
BUDGETS = ("keep", "keep_total", "max_bytes", "speed", "rules", "plan", "keep_cache")
# What is done around a method where a recipe does not say.
PLAIN: Parts = {"allocation": "uniform", "layout": "plain", "order": "one-shot", "joint": False, "refit": False}
# What rules and a plan decide of that, so that a recipe does not say it.
DECIDED = {"rules": ("allocation",), "plan": ("allocation", "layout", "joint")}
# The same of the compositions, {name: {effort: parts}}, the effort that each has by itself first. Those that run are in
# `runs.composition`, which needs torch; a test holds the two to each other.
BEST: Parts = {**PLAIN, "allocation": "global", "layout": "pivoted", "order": "anchored"}
EFFORTS: Mapping[str, Parts] = {
    "medium": BEST,
    "low": {**BEST, "order": "one-shot"},
    "high": {**BEST, "refine": {"steps": 36, "rate": 0.0003}},
}
DISTIL: Parts = {"steps": 64, "rate": 0.0005, "batch": 8}
COMPOSITIONS: Mapping[str, Mapping[str, Parts]] = {
    "best": EFFORTS,
    "best-distilled": {effort: {**EFFORTS[effort], "distil": DISTIL} for effort in ("high", "medium", "low")},
}
# The method of both, and what its settings are where nothing is said.
METHOD, OPTIONS = "kfac", {"shrink_in": 0.1, "shrink_out": 0.3, "bias": True, "weighted": True}
# What other keys are where nothing is said; of an allocation too.
DEFAULTS: Parts = {"dtype": "auto", "rank_multiple": 1, "turns": 0}
OF_ALLOCATION: Parts = {"shares": {}, "weights": "equal", "exact": False}


def name_of(recipe: Parts) -> str:
    """The name of its composition, also where the parts of one are spelled out; else that of its method."""
    name, _ = _method(recipe)
    if name != METHOD:
        return name
    given = {key: recipe[key] for key in ("bits", "rules", "plan", "recover") if recipe.get(key) is not None}
    own = _around(recipe)
    if own == _around({**given, "method": METHOD}):  # bare, as where a plan decides the rest
        return name
    for composition, efforts in COMPOSITIONS.items():
        if any(own == _around({**given, "method": composition, "effort": effort}) for effort in efforts):
            return composition
    return name


def settings_of(recipe: Parts) -> dict[str, Any]:
    """All that makes its numbers beside model, method and size, flat: {"layout": "plain", "calibration.corpus": "ptb"}.

    One composition has the same settings as it is given and spelled out. Of gradient steps the key is whether there are
    any, with their settings below it; of an allocation it is the name, or "by rules".
    """
    name, options = _method(recipe)
    apart = ("model", "method", "effort", "evaluate", *BUDGETS)
    settings = {**DEFAULTS, **{key: value for key, value in recipe.items() if key not in apart and value is not None}}
    if isinstance(settings.get("calibration"), str):
        settings["calibration"] = {"corpus": settings["calibration"]}
    for key in (*PLAIN, *STEPS):
        settings.pop(key, None)  # which some budgets decide
    return _flat(
        {
            **settings,
            **_around(recipe),
            "sites": places_in_words(recipe.get("sites") or {}),
            "options": _beside(OPTIONS if name == METHOD or name in COMPOSITIONS else {}, options),
        }
    )


def _around(recipe: Parts) -> dict[str, Any]:
    """What is done around the method, with a composition's parts filled in, but for what rules or a plan decide."""
    name, _ = _method(recipe)
    efforts = COMPOSITIONS.get(name)
    parts = PLAIN if efforts is None else efforts[recipe.get("effort") or next(iter(efforts))]
    if recipe.get("bits") is not None:  # what a composition would pivot is then stored plain
        parts = {**parts, "layout": "plain"}
    around = {key: parts.get(key, False) if recipe.get(key) is None else recipe[key] for key in (*PLAIN, *STEPS)}
    around |= {key: _steps(around[key]) for key in STEPS}
    section = around["allocation"]
    whole = dict(section) if isinstance(section, Mapping) else {"name": section}
    around["allocation"] = _beside(OF_ALLOCATION, whole)
    by = next((budget for budget in DECIDED if recipe.get(budget)), None)
    if by is None:
        return around
    return {key: value for key, value in around.items() if key not in DECIDED[by]} | {
        "allocation": {"name": f"by {by}"}
    }


def _beside(usual: Parts, section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section says that is not usual."""
    return {key: value for key, value in section.items() if key not in usual or usual[key] != value}


def _steps(section: Any) -> Any:
    """The settings of gradient steps; False where there are none."""
    if not is_on(section):
        return False
    return dict(section) if isinstance(section, Mapping) else {}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            flat[key] = value
            continue
        if key in STEPS:
            flat[key] = True
        elif key == "allocation":
            flat[key] = value["name"]
        flat |= {f"{key}.{name}": each for name, each in value.items() if (key, name) != ("allocation", "name")}
    return flat


def _method(recipe: Parts) -> tuple[str, Mapping[str, Any]]:
    section = recipe.get("method", "best")
    if not isinstance(section, Mapping):
        return str(section), {}
    return str(section.get("name", "best")), section.get("options") or {}
