"""Files: what is written appears whole or not at all, and a failure loses nothing that was there before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Squared gradients: in a calibration's folder, and with the weights of a fine-tuned model, of which they are none.
GRADIENTS = "gradients.safetensors"


def write_whole(file: Path, text: str) -> Path:
    """Write a text file that appears whole or not at all; its folder is made.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path next to `file` to write to; it becomes `file` when the block ends well, and is removed when it fails.

    The name holds the process's number: two processes that write the same file do not write into one another's.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged_directory(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A directory next to `out` that becomes `out` when the block ends well, and is removed when it fails.

    Raises:
        FileExistsError: `out` exists, is not an empty directory, and `force` is not given.
    """
    out = Path(out)
    check_free(out, force=force)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(complete: Path, out: Path) -> None:
    """Rename a directory that is complete to `out`; an older `out` is removed afterwards.

    Its files get the permissions of newly created ones: safetensors writes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in complete.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
    if not out.exists():
        complete.rename(out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    complete.rename(out)
    shutil.rmtree(old)


def check_free(out: str | Path, *, force: bool = False) -> None:
    """Raises FileExistsError where writing `out` would overwrite something and `force` is not given."""
    out = Path(out)
    if out.is_file():
        raise FileExistsError(f"{out} is a file; give another place")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(
            f"{out} exists; give another place, or --force to replace it when the new one is complete"
        )


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises OSError where the disk of a folder has fewer free bytes than `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has room for {free:,} bytes, and {what} take {needed:,}: make room and go on; what was finished "
            "before is kept"
        )
