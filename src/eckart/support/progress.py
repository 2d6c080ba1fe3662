"""Progress: how far work is, and what to know of it, is shown.

The library takes a `Track` and a function that is called with a line; the command line passes ones that draw and print.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
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


def begun(items: Iterable[T]) -> Iterator[T]:
    """The same items, the first of which is made now: what it waits for is not counted as a part of what follows.

    No item is held here once it was given.
    """
    rest = iter(items)
    first = [*islice(rest, 1)]

    def each() -> Iterator[T]:
        while first:
            yield first.pop()
        yield from rest

    return each()
