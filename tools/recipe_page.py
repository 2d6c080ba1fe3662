"""docs/recipe.md, from the fields of `Recipe` and of its sections: every key, its type, its default, its meaning.

python tools/recipe_page.py          # writes docs/recipe.md
"""

from __future__ import annotations

import inspect
import json
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from eckart.runs.recipe import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
WIDTH = 120
HEAD = """# The recipe: every key

A recipe is one run as data, in YAML: everything that changes a number, and nothing else. Where and how fast a run goes
(device, batch size, cache, data folder) are options of the command. `eckart run RECIPE.yaml --out DIR` carries it out;
the [examples](../examples) are recipes that run as they are. An unknown key is an error that names the nearest one.

Of the budgets `keep`, `keep_total`, `max_bytes`, `speed`, `rules` and `plan` exactly one is given, but for
baselines of one size, searches that find it, and `keep_cache` alone. This page is made from the fields by `python
tools/recipe_page.py`, and a test compares them.
"""
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def page() -> str:
    """The whole document. Raises ValueError for a key without a description, by name."""
    sections = _sections(Recipe)
    return HEAD + "".join(section_text(key, section) for section, key in sections.items())


def _sections(start: type[BaseModel]) -> dict[type[BaseModel], str]:
    """The recipe and the sections in it, with the key that leads to each, in the order of the keys."""
    keys: dict[type[BaseModel], str] = {start: ""}
    for name, field in start.model_fields.items():
        for inner in _models_in(field.annotation):
            keys.setdefault(inner, name)
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def section_text(key: str, section: type[BaseModel]) -> str:
    """One section with its keys, under a heading. Raises ValueError for a key without a description."""
    first = (section.__doc__ or "").strip().split("\n")[0]
    lines = ["", f"## {key}" if key else "## A recipe", "", *_fill(_in_words(first), ""), ""]
    for name, field in section.model_fields.items():
        meaning = field.description or _attributes(section).get(name)
        if not meaning:
            raise ValueError(f"{section.__name__}.{name} has no description: give its Field one")
        facts = f"{_type(field.annotation)}{_bounds(field)}, {_default(field)}"
        lines += _fill(f"- **`{name}`** ({facts}): {meaning}", "  ")
    return "\n".join(lines) + "\n"


def _in_words(text: str) -> str:
    """A docstring's first line without its pointer into the code."""
    return re.sub(r": see `[^`]+`", "", text)


def _attributes(section: type[BaseModel]) -> dict[str, str]:
    """{name: meaning} under "Attributes:" in a docstring."""
    _, _, text = (inspect.getdoc(section) or "").partition("Attributes:")
    block = text.split("\n\n")[0]
    return {name: " ".join(words.split()) for name, words in re.findall(r"(\w+): (.+?)(?=\n {4}\w+: |\Z)", block, re.S)}


def _type(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if models := _models_in(annotation):
        key = _sections(Recipe)[models[0]]
        return f"[section](#{key})"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[annotation.__name__]


def _bounds(field: FieldInfo) -> str:
    limits = [
        f"{words} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, words in BOUNDS.items()
        if hasattr(bound, name)
    ]
    return f" {' and '.join(limits)}" if limits else ""


def _default(field: FieldInfo) -> str:
    default: Any = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if default is None or default in ([], {}):
        return "may be left out"
    if isinstance(default, BaseModel):
        return "its own defaults"
    return f"default {default if isinstance(default, str) else json.dumps(default)}"


def _fill(text: str, indent: str) -> list[str]:
    """Lines of at most `WIDTH`, broken at spaces."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = f"{indent}{word}"
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
