"""Unfinished: the sums of a long pass over the text so far, in a file, from which a killed one goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eckart.calibration.cache import is_sound, read_entries, read_making, write_entries
from eckart.lowrank import GradientMoments, InputMoments
from eckart.support.files import check_room

# Name of the file, among the moments of the same calibration.
UNFINISHED = "unfinished.safetensors"
# Seconds between two writes: at least so many, and so many times what a write takes, which is then 2 % of the pass.
LEAST, TIMES = 60.0, 50.0
# Before an input group's name among the entries; a group has the name of a site.
INPUTS = "inputs of "


class Unfinished:
    """The file of one pass, whose path says what it depends on. It appears whole or not at all.

    Args:
        path: of the file.
        batches: how many samples are in each batch of the pass; a file of other batches is not gone on from.
    """

    def __init__(self, path: Path, batches: Sequence[int]) -> None:
        self.path, self.batches = path, list(batches)
        self._due = time.monotonic() + LEAST

    def restore(self, gradients: dict[str, GradientMoments], inputs: Mapping[str, InputMoments]) -> int:
        """Put what the file has into both, in place, where it has all of them: the number of batches in the sums.

        0 where there is no such file. A damaged one is set aside.

        Args:
            gradients: by site. inputs: by group. Without a token so far.
        """
        if not is_sound(self.path):
            return 0
        making = read_making(self.path)
        names = {*gradients, *(INPUTS + group for group in inputs)}
        if making.get("batches") != self.batches or not names <= set(making["names"]):
            return 0
        entries = read_entries(self.path)
        for name, blank in gradients.items():
            (examples, tokens), sums = entries.pop(name)
            gradients[name] = GradientMoments.from_state(examples, tokens, _own(sums, blank.device))
        for group, blank_inputs in inputs.items():
            (count,), sums = entries.pop(INPUTS + group)
            blank_inputs.go_on_from(count, _own(sums, blank_inputs.device))
        return int(making["done"])

    def keep(self, done: int, gradients: Mapping[str, GradientMoments], inputs: Mapping[str, InputMoments]) -> None:
        """Write the sums over the first `done` batches, if it is time to.

        Raises:
            OSError: the disk is full. What was written before stays.
        """
        start = time.monotonic()
        if start < self._due or done == len(self.batches):
            return
        entries: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {
            name: ((moments.examples, moments.tokens), moments.sums) for name, moments in gradients.items()
        }
        entries |= {INPUTS + group: ((moments.count,), moments.running) for group, moments in inputs.items()}
        size = sum(total.numel() * total.element_size() for _, sums in entries.values() for total in sums.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_room(self.path.parent, size, "the gradients so far")
        write_entries(self.path, entries, {"batches": self.batches, "done": done, "names": sorted(entries)})
        now = time.monotonic()
        self._due = now + max(LEAST, TIMES * (now - start))


def _own(sums: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies that can be added to; what was read is mapped."""
    return {name: total.to(device, copy=True) for name, total in sums.items()}
