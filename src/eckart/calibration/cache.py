"""Cache: moments in safetensors files, which appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.lowrank import GradientMoments, InputMoments
from eckart.support.files import GRADIENTS, whole_file

# Metadata key of what made a file, among the counts of its entries; no site and no group has such a name.
MADE_BY = "made by"


class Store:
    """A folder of moments: a file a block, and one of all gradient statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"

    def holds(self, block: int) -> bool:
        """Whether a block's moments are in the folder."""
        return is_whole(self._path(block))

    def read(self, block: int) -> dict[str, InputMoments]:
        """{input group: moments} of a block."""
        entries = _read_file(self._path(block))
        return {group: InputMoments.from_state(int(counts[0]), sums) for group, (counts, sums) in entries.items()}

    def write(self, block: int, inputs: Mapping[str, InputMoments]) -> None:
        """Write a block's moments."""
        _write_file(
            self._path(block), {group: ((moments.count,), moments.sums) for group, moments in inputs.items()}, None
        )

    def read_gradients(self) -> dict[str, GradientMoments] | None:
        """{site name: gradient statistics}; None where there are none."""
        path = self.folder / GRADIENTS
        return read_gradients(path) if is_whole(path) else None

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
    _write_file(path, entries, made_by)


def read_gradients(path: Path) -> dict[str, GradientMoments]:
    """{site name: gradient statistics} of a file of `write_gradients`.

    Raises:
        ValueError: it is no such file, or is cut short.
    """
    try:
        return {
            site: GradientMoments.from_state(int(counts[0]), int(counts[1]), sums)
            for site, (counts, sums) in _read_file(path).items()
        }
    except (SafetensorError, KeyError, IndexError) as error:
        raise ValueError(f"{path} holds no gradient statistics: {error}") from error


def read_making(path: Path) -> dict[str, Any]:
    """What made a file of moments; empty where it does not say."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads((file.metadata() or {}).get(MADE_BY, "{}")))


def is_whole(path: Path) -> bool:
    """Whether the file exists and is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def _write_file(
    path: Path,
    entries: Mapping[str, tuple[tuple[int, ...], dict[str, Tensor]]],
    made_by: Mapping[str, Any] | None,
) -> None:
    tensors = {
        f"{name}|{key}": value.cpu().contiguous() for name, (_, sums) in entries.items() for key, value in sums.items()
    }
    metadata = {name: json.dumps(numbers) for name, (numbers, _) in entries.items()}
    if made_by is not None:
        metadata[MADE_BY] = json.dumps(made_by)
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def _read_file(path: Path) -> dict[str, tuple[list[int], dict[str, Tensor]]]:
    with safe_open(path, framework="pt") as file:
        entries: dict[str, tuple[list[int], dict[str, Tensor]]] = {
            name: (json.loads(numbers), {})
            for name, numbers in (file.metadata() or {}).items()
            if name not in (MADE_BY, "format")
        }
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, _, statistic = key.rpartition("|")
            entries[name][1][statistic] = file.get_tensor(key)
    return entries
