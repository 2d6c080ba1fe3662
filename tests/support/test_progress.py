"""Progress: what is begun before it is shown."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

from eckart.support.progress import begun


class Block:
    """What can be looked for after it is gone."""


def blocks(made: list[weakref.ref[Block]], number: int) -> Iterator[Block]:
    for _ in range(number):
        block = Block()
        made.append(weakref.ref(block))
        yield block
        del block


def test_the_first_is_made_at_once_and_the_others_when_they_are_asked_for() -> None:
    made: list[weakref.ref[Block]] = []
    given = begun(blocks(made, 3))
    assert len(made) == 1
    kept = [next(given)]
    assert len(made) == 1
    kept += given
    assert [ref() for ref in made] == kept
    assert list(begun(())) == []


def test_nothing_is_held_that_was_given() -> None:
    made: list[weakref.ref[Block]] = []
    for count, _ in enumerate(begun(blocks(made, 3)), 1):
        gc.collect()
        assert sum(ref() is not None for ref in made) == 1, count
