"""Progress: how long work is shown. The library takes a `Track`; the command line passes one that draws a bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Iterates over `items` and shows how far it is: a description, and how many there will be."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Shows nothing."""
    return items
