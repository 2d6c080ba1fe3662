"""Weight files: which files of a folder hold a model's weights, what their headers say, and digests of them.

Every reader of ours looks here first, so that a damaged file, or an index that leads out of its folder, is one error.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from eckart.support.files import digest_of, write_whole

INDEX = SAFE_WEIGHTS_INDEX_NAME
# In the order in which transformers takes them, where a folder has several.
SINGLES = {SAFE_WEIGHTS_NAME: SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME: WEIGHTS_INDEX_NAME}
CONFIG = "config.json"
# {file: SHA-256} of a checkpoint as it was written. People edit the card, so it has none.
DIGESTS, EDITED = "digests.json", ("README.md",)


class CheckpointError(ValueError):
    """A checkpoint on disk does not fit its own description; the message names the tensor, the file or the number."""


@dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor: its shape, and its type as the format spells it ("BF16", "bfloat16")."""

    shape: tuple[int, ...]
    type: str

    @property
    def is_float(self) -> bool:
        return self.type.lower().startswith(("f", "bf"))


def local_folder(path: str | Path) -> Path | None:
    """The folder of a model: `path`, or where the hub's files are kept; its configuration and indexes are there then.

    None where the hub does not give them.
    """
    if Path(path).is_dir():
        return Path(path)
    folder = None
    for name in (CONFIG, *SINGLES.values()):
        with suppress(OSError, ValueError):
            file = cached_file(str(path), name)
            folder = folder if file is None else Path(file).parent
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them; none where the folder has none.

    Raises:
        CheckpointError: an index is damaged, or names a file outside the folder.
    """
    for single, index in SINGLES.items():
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in read_index(folder / index)]
    return []


def read_index(index: Path) -> list[str]:
    """The files that an index names, each once.

    Raises:
        CheckpointError: it is damaged, or names a file outside its folder.
    """
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if not _is_inside(name)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}). Save or download it again") from error
    if outside:
        raise CheckpointError(
            f"{index} names {outside[0]!r}, which is not a file of its folder: it is damaged, or made to read other "
            "files of this machine. Save or download it again"
        )
    return names


def _is_inside(name: str) -> bool:
    """Whether a relative name stays in its folder, by the rules of either system; a link in it may lead where it will,
    as the hub's cache has them."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def read_header(file: str | Path) -> dict[str, Stored]:
    """{tensor: shape and type} of a weights file. Cost: its header; of an old .bin that is no archive, all of it.

    Raises:
        CheckpointError: it is not there, not as long as its header says, or no weights file.
    """
    if str(file).endswith(".safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (it is no mapping)
                return {key: Stored(tuple(view.get_shape()), view.get_dtype()) for key, view in slices.items()}
        except (OSError, SafetensorError) as error:
            raise damaged(file, error) from error
    try:
        content = _load_pickled(file)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(file, error) from error
    return {
        key: Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def _load_pickled(file: str | Path) -> dict[str, Any]:
    """A .bin without its numbers; nothing but tensors and plain values is unpickled."""
    try:
        return torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except RuntimeError:  # of a format that cannot be mapped
        return torch.load(file, map_location="meta", weights_only=True)


def read_headers(files: Sequence[str | Path]) -> dict[str, Stored]:
    """{tensor: shape and type} of several files. Raises CheckpointError as `read_header`."""
    return {key: stored for file in files for key, stored in read_header(file).items()}


def damaged(file: str | Path, error: Exception) -> CheckpointError:
    """The error of a file that cannot be read."""
    return CheckpointError(f"{file} is damaged or missing ({_first_line(error)}). Save or download it again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_digests(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the digests of a checkpoint's files, all that are there but its card.

    Args:
        known: {file: its digest}, of files that need not be read again.

    Cost: every other file is read once.
    """
    known = known or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (DIGESTS, *EDITED))
    names = {path.relative_to(folder).as_posix(): path for path in files}
    digests = {name: known.get(name) or digest_of(path) for name, path in names.items()}
    write_whole(folder / DIGESTS, json.dumps({"sha256": digests}, indent=1) + "\n")


def verify(path: str | Path, names: Collection[str] | None = None) -> int:
    """How many files of a checkpoint are as they were written, by the digests written with it; 0: there are none.

    A file that was added later is not looked at.

    Args:
        path: a directory, or a hub name, all of which is downloaded; a single file has no digests.
        names: of the files to look at; default all.

    Raises:
        CheckpointError: files are missing or not as they were written, all in one message; or the digests are damaged.
        OSError: the hub did not give it.

    Cost: every file is read once.
    """
    folder = Path(path) if Path(path).exists() else Path(snapshot_download(str(path)))
    if not (folder / DIGESTS).is_file():
        return 0
    digests = {name: digest for name, digest in _read_digests(folder).items() if names is None or name in names}
    changed = [
        name for name, digest in digests.items() if not (folder / name).is_file() or digest_of(folder / name) != digest
    ]
    if changed:
        changes = some_of([_change(folder, name) for name in changed])
        raise CheckpointError(
            f"{folder} is not what was written, by its {DIGESTS}: {changes}. Save or download it again; if you changed "
            f"it yourself, remove {DIGESTS}"
        )
    return len(digests)


def _change(folder: Path, name: str) -> str:
    return f"{name} has changed" if (folder / name).is_file() else f"{name} is missing"


def _read_digests(folder: Path) -> dict[str, str]:
    """{file: its digest}. Raises CheckpointError where they are damaged, or lead out of the folder."""
    file = folder / DIGESTS
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        if not all(isinstance(digest, str) and _is_inside(name) for name, digest in digests.items()):
            raise ValueError("it is no list of this folder's files")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}). Save or download it again") from error
    return dict(digests)


def some_of(complaints: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return "; ".join(complaints[:5]) + (f"; and {len(complaints) - 5} more" if len(complaints) > 5 else "")
