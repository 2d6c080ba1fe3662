"""Spoiled input for tests by hypothesis: plain data in which a value is another, files of which bytes changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# What stands where something else was expected: other types, empty ones, numbers out of every range, hostile names.
WRONG: st.SearchStrategy[Any] = st.sampled_from(
    (
        *(None, True, False, 0, -1, 1, 2.5, 1e308, 10**30, float("inf"), float("-inf"), float("nan")),
        *("", "x", "../x", "\udc80", "\0", "svd", "best", "keep", "a" * 3000),
        *([], [[]], [0, 0], [None], {}, {"x": 1}, {"name": "svd"}),
    )
) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places_of(inner, (*path, key))


@st.composite
def spoiled(draw: st.DrawFn, whole: Any) -> Any:
    """Plain data like `whole`, in which one to three values are others, missing, or under other keys."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_of(data))
        if not places:
            return copy.deepcopy(draw(WRONG))
        *path, last = draw(st.sampled_from(places))
        holder = data
        for step in path:
            holder = holder[step]
        how = draw(st.sampled_from(("another", "missing", "renamed", "twice")))
        if how == "another" or (isinstance(holder, list) and how in ("renamed", "missing")):
            holder[last] = copy.deepcopy(draw(WRONG))
        elif how == "missing":
            del holder[last]
        elif how == "renamed":
            holder[draw(st.text(max_size=8))] = holder.pop(last)
        else:
            holder[last] = [holder[last], copy.deepcopy(holder[last])]
    return data


def as_json(value: Any) -> str:
    """A text that JSON's reader of Python takes: lone surrogates are escaped, infinities and NaN are words."""
    return json.dumps(value)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes like `whole`, cut short, with some of them changed, or with others put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        how = draw(st.sampled_from(("cut", "flip", "insert", "zero")))
        if how == "cut":
            del content[place:]
        elif how == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif content:
            content[place] = 0 if how == "zero" else content[place] ^ 1 << draw(st.integers(0, 7))
    return bytes(content)
