"""Memory: what was freed goes back to the system, so that a later stage does not come on top of it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return freed main memory to the system; nothing where the C library is not glibc.

    glibc keeps what is freed below 32 MiB in case it is needed again, and what lies between two pieces that are still
    used for good: of a forward and backward pass that is gigabytes.

    Cost: milliseconds, and a page fault for each 4 KiB that are used again.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no such handle
        return None
