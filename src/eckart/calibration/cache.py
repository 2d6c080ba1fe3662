"""Cache: moments in safetensors files, which appear whole or not at all and carry a checksum of what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.lowrank import GradientMoments, InputMoments
from eckart.support.files import GRADIENTS, set_aside, whole_file

# Metadata key of what made a file, among the counts of its entries; no site and no group has such a name.
MADE_BY = "made by"
# Metadata key of the checksum. A file of an older eckart has none, and is believed.
CHECKSUM = "checksum"
# Not the names of entries. safetensors itself may write the last one.
RESERVED = (MADE_BY, CHECKSUM, "format")


class Store:
    """A folder of moments: a file a block, and one of all gradient statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"

    def holds(self, block: int) -> bool:
        """Whether a block's moments are in the folder, undamaged; a damaged file is set aside."""
        return is_sound(self._path(block))

    def read(self, block: int) -> dict[str, InputMoments]:
        """{input group: moments} of a block."""
        entries = read_entries(self._path(block))
        return {group: InputMoments.from_state(int(counts[0]), sums) for group, (counts, sums) in entries.items()}

    def write(self, block: int, inputs: Mapping[str, InputMoments]) -> None:
        """Write a block's moments."""
        write_entries(
            self._path(block), {group: ((moments.count,), moments.sums) for group, moments in inputs.items()}, None
        )

    def read_gradients(self) -> dict[str, GradientMoments] | None:
        """{site name: gradient statistics}; None where there are none. A damaged file is set aside."""
        path = self.folder / GRADIENTS
        return read_gradients(path) if is_sound(path) else None

    def write_gradients(self, gradients: Mapping[str, GradientMoments]) -> None:
        """Write the gradient statistics of all sites."""
        write_gradients(self.folder / GRADIENTS, gradients)


def write_gradients(
    path: Path, gradients: Mapping[str, GradientMoments], *, made_by: Mapping[str, Any] | None = None
) -> None:
    """Write {site name: gradient statistics}.

    Args:
        made_by: plain data on what made them, see `read_making`.
    """
    entries = {site: ((moments.examples, moments.tokens), moments.sums) for site, moments in gradients.items()}
    write_entries(path, entries, made_by)


def read_gradients(path: Path) -> dict[str, GradientMoments]:
    """{site name: gradient statistics} of a file of `write_gradients`.

    Raises:
        ValueError: it is no such file, is cut short, or its numbers are not those that were written.
    """
    try:
        return {
            site: GradientMoments.from_state(int(counts[0]), int(counts[1]), sums)
            for site, (counts, sums) in read_entries(path).items()
        }
    except (SafetensorError, KeyError, IndexError) as error:
        raise ValueError(f"{path} holds no gradient statistics: {error}") from error


class GradientFile(Mapping[str, GradientMoments]):
    """{site name: gradient statistics} of a file of `write_gradients`; a site's are read whenever they are asked for.

    Nothing of it is kept in memory: the covariances of a large block take gigabytes.

    Raises:
        ValueError: it is no such file, is cut short, or its numbers are not those that were written.

    Cost: one read of the file, and one of a site's part of it for each time it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                _check(path, file)
                metadata, self._keys = file.metadata() or {}, sorted(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} holds no gradient statistics: {error}") from error
        self._counts = {name: json.loads(numbers) for name, numbers in metadata.items() if name not in RESERVED}

    def __getitem__(self, site: str) -> GradientMoments:
        counts = self._counts[site]
        with safe_open(self.path, framework="pt") as file:
            sums = {
                key.rpartition("|")[2]: file.get_tensor(key).clone()  # else the file stays mapped, which is resident
                for key in self._keys
                if key.rpartition("|")[0] == site
            }
        return GradientMoments.from_state(int(counts[0]), int(counts[1]), sums)

    def __contains__(self, site: object) -> bool:  # Mapping's own would read the statistics
        return site in self._counts

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def read_making(path: Path) -> dict[str, Any]:
    """What made a file of moments; empty where it does not say."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads((file.metadata() or {}).get(MADE_BY, "{}")))


def is_sound(path: Path) -> bool:
    """Whether the file exists and holds what was written; one that does not is set aside, see `set_aside`.

    Cost: one read of the file.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            _check(path, file)
        return True
    except (SafetensorError, ValueError):
        set_aside(path)
        return False


def checksum_of(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of a file's metadata and, in this order, of each tensor's name, type, shape and numbers."""
    state = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != CHECKSUM}, sort_keys=True).encode())
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _check(path: Path, file: Any) -> None:
    """Raises ValueError where an open file does not hold what was written."""
    metadata, names = file.metadata() or {}, sorted(file.keys())
    entries = {name.rpartition("|")[0] for name in names}
    # An older file has no checksum, and no entry without numbers: such a one is the checksum's own, with another name.
    if set(metadata) - set(RESERVED) != entries or (
        CHECKSUM in metadata
        and metadata[CHECKSUM] != checksum_of(metadata, ((name, file.get_tensor(name)) for name in names))
    ):
        raise ValueError(f"{path} is damaged: its numbers are not those that were written")


def write_entries(
    path: Path,
    entries: Mapping[str, tuple[tuple[int, ...], dict[str, Tensor]]],
    made_by: Mapping[str, Any] | None,
) -> None:
    """Write {name of an entry: (its counts, its sums)}, and what made them."""
    tensors = {
        f"{name}|{key}": value.cpu().contiguous() for name, (_, sums) in entries.items() for key, value in sums.items()
    }
    metadata = {name: json.dumps(numbers) for name, (numbers, _) in entries.items()}
    if made_by is not None:
        metadata[MADE_BY] = json.dumps(made_by)
    metadata[CHECKSUM] = checksum_of(metadata, sorted(tensors.items()))
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def read_entries(path: Path) -> dict[str, tuple[list[int], dict[str, Tensor]]]:
    """What `write_entries` has written. The sums are mapped from the file.

    Raises:
        ValueError, SafetensorError: the file does not hold what was written.
    """
    with safe_open(path, framework="pt") as file:
        _check(path, file)
        entries: dict[str, tuple[list[int], dict[str, Tensor]]] = {
            name: (json.loads(numbers), {}) for name, numbers in (file.metadata() or {}).items() if name not in RESERVED
        }
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, _, statistic = key.rpartition("|")
            entries[name][1][statistic] = file.get_tensor(key)
    return entries
