"""Progress: how far work is, and what to know of it, is shown.

The library takes a `Track` and a function that is called with a line; the command line passes ones that draw and print.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Iterates over `items` and shows how far it is: a description, and how many there will be."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]: ...


def mute(line: str) -> None:
    """Says nothing."""


def silent(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Shows nothing."""
    return items
