"""Ending: what a command says, and which status it has, when it does not end well.

Bad input and the accidents of a machine are one line that says what to do. What nobody foresaw is one line too, and the
traceback goes into a file: a user has something to send, and the terminal stays readable.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

BAD_INPUT, FAULT = 2, 1
DEBUG = "ECKART_DEBUG"
OUT_OF_MEMORY = (
    "out of memory: give a smaller --batch-size, fewer --samples or a shorter --length, or, where the command has it, "
    "--out-of-core"
)
# What torch says of memory in a RuntimeError that has no class of its own.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# A disk that is full, a quota, a limit on the size of files; and what libraries that write weights say of them in
# errors of their own.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SPACE = (*map(os.strerror, FULL), "PytorchStreamWriter failed")
# What stopped commands keep. These go on where they were, those of the second line if they have an --out.
GO_ON = ("run", "reproduce", "search", "finetune")
GO_ON_IN_OUT = ("eval", "probe")
# In the cache, unless --no-cache: what these have read of a model; they start again from there.
IN_CACHE = {"compress": "moments", "correct": "moments", "probe": "states"}

# The signal that was heard, if any: of the process, as signals are.
_HEARD: list[int] = []


class Stopped(BaseException):
    """A signal asked the process to end. As KeyboardInterrupt, it is no error that a program handles and goes on.

    Attributes:
        status: as a shell reports a process that this signal ended, 128 and its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class HandedOver(BaseException):
    """The command hands the process over to another program, which ends it.

    Attributes:
        program: runs it; called when nothing of the command line's is in the way any more.
    """

    def __init__(self, program: Callable[[], None]) -> None:
        super().__init__()
        self.program = program


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM unwind the process: locks, staging folders and workers go with it."""

    def stop(number: int, frame: FrameType | None) -> None:
        _HEARD.append(number)
        raise Stopped(number)

    # A shell script's background jobs ignore Ctrl-C, and go on doing so.
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        _HEARD.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stopped() -> None:
    """Raises Stopped where a signal was heard: what it raised then may have ended in a callback, which drops it."""
    if _HEARD:
        raise Stopped(_HEARD[0])


def way_on(words: Sequence[str]) -> str:
    """What there is of a command that was stopped, and the command line that goes on.

    Args:
        words: of its command line, without "eckart".
    """
    command = next((word for word in words if not word.startswith("-")), "")
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    line = shlex.join(["eckart", *words])
    if command == "compress" and "--out-of-core" in options:
        return f"go on with: {line}{'' if '--resume' in options else ' --resume'}"
    if command in GO_ON:
        return f"go on with: {line}"
    if command in GO_ON_IN_OUT and "--out" in options:  # with --force no result that is there counts
        return f"{'start again' if '--force' in options else 'go on'} with: {line}"
    if command in IN_CACHE and "--no-cache" not in options:
        return f"the {IN_CACHE[command]} so far are in the cache; start again with: {line}"
    return f"nothing was changed; start again with: {line}"


def tell(error: Exception) -> tuple[int, str]:
    """The status and the line of a command that ended by `error`."""
    if _is(error, NO_SPACE) or (isinstance(error, OSError) and error.errno in FULL):
        where = getattr(error, "filename", None)
        return BAD_INPUT, f"error: the disk{f' of {where}' if where else ''} is full: make room, and run this again"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is(error, NO_MEMORY)):
        return BAD_INPUT, f"error: {OUT_OF_MEMORY}"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"error: {place}{error.strerror}"
    if isinstance(error, ValueError | OSError | ImportError) or _is_decomposition(error):
        return BAD_INPUT, f"error: {error}"
    return FAULT, (
        f"error: {type(error).__name__}, which eckart did not expect: {_first_line(error)}. Please report it with "
        f"{_write(error)}, which has the traceback ({DEBUG}=1 shows it here)"
    )


def _is(error: Exception, signs: tuple[str, ...]) -> bool:
    return any(sign in str(error) for sign in signs)


def _is_decomposition(error: Exception) -> bool:
    """Whether a decomposition failed, which says what to do; looked up, because importing it takes torch's seconds."""
    lowrank = sys.modules.get("eckart.lowrank")
    return lowrank is not None and isinstance(error, lowrank.DecompositionError)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _write(error: Exception) -> Path:
    """A file with the traceback, the command and the versions."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("eckart", "torch", "transformers")]
    lines = [
        f"command: {' '.join(sys.argv)}",
        f"versions: {', '.join(versions)}, Python {platform.python_version()}, {platform.platform()}",
        "",
        *traceback.format_exception(error),
    ]
    number, name = tempfile.mkstemp(prefix="eckart-", suffix=".txt")
    with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines))
    return Path(name)
