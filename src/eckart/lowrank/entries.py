"""Entries: tables of functions from settings to values, with an error for a name or a setting that is not there."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


def check_entry(table: Mapping[str, object], kind: str, name: str) -> None:
    """Raises ValueError where the table has no `name`; the message has the nearest known one.

    Args:
        kind: what the table holds, for the message.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(table)}")


def entry_options(table: Mapping[str, Callable[..., object]], kind: str, name: str) -> dict[str, Any]:
    """{setting: default} of the entry `name`.

    Args:
        kind: what the table holds, for the messages.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    check_entry(table, kind, name)
    return {p.name: p.default for p in inspect.signature(table[name]).parameters.values()}


def build_entry(
    table: Mapping[str, Callable[..., Value]], kind: str, name: str, options: Mapping[str, Any] | None = None
) -> Value:
    """The value that the entry `name` builds from its settings.

    Raises:
        ValueError: an unknown name or setting, or a value that the entry refuses.
    """
    known, options = entry_options(table, kind, name), options or {}
    for option in options:
        if option not in known:
            raise ValueError(f"{kind} {name} has no setting {option!r}; its settings: {', '.join(known) or 'none'}")
    return table[name](**options)
