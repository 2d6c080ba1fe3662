"""Recipe words: what a recipe does, in few words, as studies and reports name their runs. Recipes are plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

Parts = Mapping[str, Any]

# Gradient steps, of which a recipe may say that there are none.
STEPS = ("refine", "distil", "recover")


def describe(recipe: Parts) -> str:
    """A run in a few words: method, settings around it, size; "nsvd-i (share=0.9), pivoted, keep 0.7"."""
    words = [_entry(recipe.get("method", "best"))]
    if recipe.get("effort") is not None:
        words.append(f"{recipe['effort']} effort")
    if recipe.get("allocation") is not None:
        words.append(_entry(recipe["allocation"]))
    words += [str(recipe[key]) for key in ("layout", "order") if recipe.get(key) is not None]
    for key in ("joint", "refit", *STEPS):
        value = recipe.get(key)
        if value is not None:
            on = is_on(value)
            words.append(f"no {key}" if not on else key + (_options(value) if isinstance(value, Mapping) else ""))
    words += filter(None, [size_in_words(recipe)])
    places = places_in_words(recipe.get("sites") or {})
    return ", ".join(words) + (f" of {places}" if places else "")


def size_in_words(recipe: Parts) -> str:
    """How large the result may be, whatever the budget: "keep 0.7", "max_bytes 5000000"; nothing where it has none."""
    words = [f"{key} {recipe[key]:.12g}" for key in ("keep", "keep_total", "max_bytes") if recipe.get(key) is not None]
    if recipe.get("speed"):
        speed = recipe["speed"] if isinstance(recipe["speed"], Mapping) else {"times": recipe["speed"]}
        rows = "" if speed.get("rows") is None else f" at {speed['rows']} tokens"
        words.append(f"speed {speed['times']:g}{rows}")
    if recipe.get("rules"):
        words.append(
            "; ".join(f"keep {rule['keep']:g} of {places_in_words(rule) or 'all blocks'}" for rule in recipe["rules"])
        )
    if recipe.get("plan"):
        words.append(f"plan {PurePath(recipe['plan']).stem}")
    if recipe.get("keep_cache") is not None:
        words.append(f"keep_cache {recipe['keep_cache']:.12g}")
    return ", ".join(words)


def is_on(section: Any) -> bool:
    """Whether gradient steps are taken: none are by false, nor by a section with steps 0."""
    return section.get("steps") != 0 if isinstance(section, Mapping) else bool(section)


def places_in_words(section: Mapping[str, Any]) -> str:
    """Which linears, in words: "mlp, not down_proj, last 12"; nothing for all."""
    named = [*(section.get("include") or ()), *(f"not {name}" for name in section.get("exclude") or ())]
    return ", ".join([*named, *([section["blocks"]] if section.get("blocks") else [])])


def _entry(section: Any) -> str:
    """A name, or a section's name with its other keys but `limit`: "nsvd-i (share=0.9)"."""
    if not isinstance(section, Mapping):
        return str(section)
    name = str(section.get("name", "best"))
    rest = {key: value for key, value in section.items() if key not in ("name", "options", "limit")}
    return name + _options({**(section.get("options") or {}), **rest})


def _options(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
