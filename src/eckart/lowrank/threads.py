"""Threads: how many scipy's linear algebra takes beside torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

from threadpoolctl import ThreadpoolController

# Numbers of a matrix up to which one thread is as fast as several, or faster: on two cores, of 576 x 250 and 1536 x 330
# two to six times, of 2048 x 850 by a seventh; of 4096 x 1100 several are by a fifth.
ALONE = 2**21


@cache
def _scipys() -> ThreadpoolController:
    """The libraries that scipy and numpy have brought; torch has one of its own, which is not among them."""
    return ThreadpoolController().select(internal_api="openblas")


@contextmanager
def few_threads(numbers: int) -> Iterator[None]:
    """Inside, scipy and numpy take one thread for a matrix of so many numbers, where that is no slower.

    They have threads of their own, and torch's, which wait awake for the next product, are in their way.
    """
    with _scipys().limit(limits=1) if numbers <= ALONE else nullcontext():
        yield
