"""Doors: hidden states of all batches between two blocks, in memory or on disk. A block's door is its input."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.calibration.cache import CHECKSUM, checksum_of
from eckart.support.files import check_room

NAME = "hidden"


class Doors(Protocol):
    """Hidden states of all batches at the door of one block and, as they are computed, at the next."""

    def read(self, index: int) -> Tensor:
        """A batch's at this door."""
        ...

    def write(self, index: int, hidden: Tensor) -> None:
        """A batch's at the next door. It is not read at this one again."""
        ...

    def turn(self) -> None:
        """Every batch is at the next door, which is this one from now on."""
        ...


class Held:
    """Doors in memory: a batch's states replace those that they were computed from."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}

    def read(self, index: int) -> Tensor:
        """See `Doors`."""
        return self._states[index]

    def write(self, index: int, hidden: Tensor) -> None:
        """See `Doors`."""
        self._states[index] = hidden

    def turn(self) -> None:
        """See `Doors`."""


class Spill:
    """`Doors` in files: a folder for each door, a file for each batch.

    A door's folder has its name once every batch is in it, so that a killed walk resumes at a whole one. A
    file is read and written in one go and not kept mapped: what is mapped counts as resident.

    Attributes:
        door: the one that all batches have reached; set it to resume from another that is whole.

    Args:
        folder: for the doors.
        batches: their number.
        first: the door that the first states are at.
        door: one that is whole; None before there is any.
        step: from one door to the next; -1 goes backward.
        device: of the tensors that are read.

    Raises:
        OSError: the disk is full; the doors that are whole stay.
    """

    def __init__(
        self,
        folder: Path,
        batches: int,
        *,
        first: int = 0,
        door: int | None = None,
        step: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.batches, self.step, self.device = folder, batches, step, device
        self.door = first - step if door is None else door
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, index: int) -> Tensor:
        """See `Doors`."""
        return self.read_at(self.door, index)

    def read_at(self, door: int, index: int) -> Tensor:
        """A batch's at a door that is whole.

        Raises:
            OSError: they are not those that were written. All doors are removed: what resumes computes them again.
        """
        path = _file(self._folder(door), index)
        try:
            with safe_open(path, framework="pt") as file:
                hidden = file.get_tensor(NAME).clone()
                kept = (file.metadata() or {}).get(CHECKSUM)
        except SafetensorError:
            hidden, kept = torch.empty(0), ""
        if kept is not None and kept != checksum_of({}, [(NAME, hidden)]):
            shutil.rmtree(self.folder)
            raise OSError(
                f"{path} is damaged: its numbers are not those that were written. The hidden states are removed; go on "
                "with --resume, which computes them again; is the disk failing?"
            )
        return hidden.to(self.device)

    def write(self, index: int, hidden: Tensor) -> None:
        """See `Doors`."""
        partial = self._partial
        if index == 0:
            shutil.rmtree(partial, ignore_errors=True)
            check_room(self.folder, self.batches * hidden.numel() * hidden.element_size(), "the hidden states")
            partial.mkdir()
        path = _file(partial, index)
        try:
            plain = hidden.detach().cpu().contiguous()
            save_file({NAME: plain}, path, {CHECKSUM: checksum_of({}, [(NAME, plain)])})
            with path.open("r+b") as stream:
                os.fsync(stream.fileno())
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"cannot write hidden states to {path} ({error}); what was finished before is kept"
            ) from error

    def turn(self) -> None:
        """See `Doors`. The previous door stays until it is cleared."""
        self.door += self.step
        place = self._folder(self.door)
        shutil.rmtree(place, ignore_errors=True)  # of an earlier walk that had to start over
        place.with_suffix(".partial").rename(place)

    def clear(self) -> None:
        """Remove the doors that all batches have passed."""
        for door in whole_doors(self.folder):
            if (self.door - door) * self.step > 0:
                shutil.rmtree(self._folder(door))

    def _folder(self, door: int) -> Path:
        return self.folder / f"door-{door:03d}"

    @property
    def _partial(self) -> Path:
        return self._folder(self.door + self.step).with_suffix(".partial")


def whole_doors(folder: Path) -> list[int]:
    """The doors whose states are all there, ascending."""
    matches = [re.fullmatch(r"door-(\d+)", place.name) for place in folder.glob("door-*")]
    return sorted(int(match[1]) for match in matches if match)


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"
