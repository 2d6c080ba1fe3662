"""Files: what is written appears whole or not at all, and a failure loses nothing that was there before."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

# (thread, path) of what this process has claimed, see `claimed`.
_CLAIMS: set[tuple[int, Path]] = set()
NO_LOCKS = "the file system has no locks"
# Seconds after which a half-written file that nobody touches has been left by a process that was killed.
ABANDONED = 24 * 3600
# Squared gradients: in a calibration's folder, and with the weights of a fine-tuned model, of which they are none.
GRADIENTS = "gradients.safetensors"
# Every checkpoint, and every adapter, has one of them.
OURS = ("config.json", "compression.json", "adapter_config.json")


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

    The name holds the process's number: two processes that write the same file do not write into one another's. What
    a killed one has left is removed once it is a day old; its number tells nothing on another machine.

    Raises:
        OSError: the disk is full.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    for left in file.parent.glob(f"{glob.escape(file.name)}.*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    try:
        with full_disk_named(file):
            yield partial
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder that nobody else writes to."""
    for partial in folder.glob("*.partial"):
        partial.unlink(missing_ok=True)


@contextmanager
def full_disk_named(place: Path) -> Iterator[None]:
    """Raises OSError that names what is written where the disk is full inside; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(place.parent).free
        raise OSError(
            errno.ENOSPC,
            f"cannot write {place} ({error}; its disk has {free:,} bytes free): make room and give the same command "
            "again; what was finished before is kept",
        ) from error


@contextmanager
def claimed(out: str | Path) -> Iterator[Path]:
    """Inside, nobody else writes `out`, a file or a directory; gives its real path. Who has it may claim it again.

    The system takes the lock, on the file `.<name>.eckart-lock` next to `out`, back when the process ends, however that
    is.
    Where a killed process was replacing `out`, the older one is put back; what it had of a new one is removed.

    Raises:
        ValueError: another process or thread has claimed it.
        OSError: no file can be made next to `out`, or its file system has no locks (NFS has them where its lock
            service runs).
    """
    out = Path(os.path.realpath(out))
    owner = (threading.get_ident(), out)
    if owner in _CLAIMS:
        yield out
        return
    path = _next_to(out, "lock")
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft lock is a file, which a kill leaves
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is making {out}; wait for it, or give another place") from None
    except NotImplementedError as error:
        raise OSError(errno.ENOSYS, f"{NO_LOCKS} ({error}): give a place on another", str(path)) from error
    except OSError as error:  # of the place that was asked for, not of the lock next to it
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(error.errno, f"{NO_LOCKS} ({error.strerror}): give a place on another", str(path)) from error
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(out)) from error
    try:
        _CLAIMS.add(owner)
        _tidy(out)
        yield out
    finally:
        _CLAIMS.remove(owner)
        with suppress(OSError):  # where a file cannot be removed while it is open
            path.unlink()  # before it is let go of: who opened it meanwhile finds it gone, and is refused
        lock.release()


@contextmanager
def staged_directory(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A directory next to `out` that becomes `out` when the block ends well, and is removed when it fails.

    It is claimed meanwhile. A caller that computes before it writes claims `out` itself, before it computes.

    Raises:
        FileExistsError: `out` exists, is not an empty directory, and `force` is not given.
        ValueError, OSError: as `claimed`.
    """
    with claimed(out) as place:
        check_free(out, force=force)
        staging = _next_to(place, "partial")
        staging.mkdir()
        try:
            with full_disk_named(place):
                yield staging
            put_in_place(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def put_in_place(complete: Path, out: Path) -> None:
    """Rename a directory that is complete to `out`, which is claimed; an older `out` is removed afterwards.

    Its files get the permissions of newly created ones: safetensors writes files that only their owner can read. A kill
    between the two renames leaves the older one as `.<name>.eckart-old`; `claimed` puts it back.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in complete.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
    if not out.exists():
        complete.rename(out)
        return
    old = _next_to(out, "old")
    out.rename(old)
    complete.rename(out)
    _tidy(out)


def _next_to(out: Path, what: str) -> Path:
    """The path of what belongs to `out` while it is claimed: its lock, its partial one, the old one."""
    return out.with_name(f".{out.name}.eckart-{what}")


def _tidy(out: Path) -> None:
    """Put back an older `out` that a killed process was replacing, and remove what is of no use any more."""
    old, partial = _next_to(out, "old"), _next_to(out, "partial")
    if partial.exists():
        shutil.rmtree(partial)
    if old.exists() and not out.exists():
        old.rename(out)
    elif old.exists():
        old.rename(partial)  # what is called old is whole: it may have to be put back
        shutil.rmtree(partial)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def set_aside(path: Path) -> None:
    """Rename a damaged file of a cache, with a warning that names it: what it held is computed again."""
    damaged = path.with_name(f"{path.name}.damaged")
    path.replace(damaged)
    warnings.warn(
        f"{path} is damaged: its bytes are not those that were written. It is {damaged.name} now, and what it held is "
        "computed again; is the disk failing?",
        stacklevel=3,
    )


def check_free(out: str | Path, *, force: bool = False) -> None:
    """Raises FileExistsError where writing `out` would overwrite something and `force` is not given."""
    out = Path(out)
    if out.is_file():
        raise FileExistsError(f"{out} is a file; give another place")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(
            f"{out} exists; give another place, or --force to replace it when the new one is complete"
        )


def check_replaceable(out: str | Path, *, force: bool = False, reads: Iterable[str | Path] = ()) -> None:
    """Refuse a place for a checkpoint that is not free, or that `force` would take something else away with.

    Args:
        reads: what the command reads. Names that are no files are passed over.

    Raises:
        FileExistsError: as `check_free`; or `out` is, or holds, the working directory or something of `reads`; or it
            holds what no checkpoint has.
    """
    check_free(out, force=force)
    place = Path(os.path.realpath(out))
    for needed in (Path.cwd(), *map(Path, reads)):
        if needed.exists() and Path(os.path.realpath(needed)).is_relative_to(place):
            raise FileExistsError(f"{out} is, or holds, {needed}, which is needed; give another place")
    inside = sorted(place.iterdir()) if place.is_dir() else []
    strange = [entry.name for entry in inside if entry.is_dir()]
    if inside and not any((place / name).is_file() for name in OURS):
        strange = strange or [inside[0].name]
    if strange:
        raise FileExistsError(
            f"{out} holds {strange[0]}, which is no part of a checkpoint, and --force replaces nothing else; move it "
            "away, or give another place"
        )


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises OSError where the disk of a folder has fewer free bytes than `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has room for {free:,} bytes, and {what} take {needed:,}: make room and go on; what was finished "
            "before is kept"
        )
