"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from eckart.support.memory import _trim, give_back

# Pieces that glibc keeps in a heap, of which every second is freed: nothing at the end of the heap is.
PROGRAM = """
import ctypes, sys
from pathlib import Path
from eckart.support.memory import give_back

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(100_000) for _ in range(1000)]
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[::2]:
    libc.free(piece)
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists() or _trim() is None, reason="no glibc")
def test_what_lies_between_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000_000


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_keeps_it(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse(_name: object) -> object:
        raise error

    _trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    try:
        give_back()
        assert _trim() is None
    finally:
        _trim.cache_clear()
