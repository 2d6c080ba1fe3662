"""Backward: gradient statistics block by block, the last one first, with one block of the model in memory.

Forward, the hidden states of every sample are kept at every door. At the last one the loss and its gradient are taken;
backward, a block is run once more from its door, and the gradient at its outputs gives those of its weights and of its
inputs. The sums are those of `gradients.collect_gradients`, which has the whole model in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from eckart.calibration.cache import GradientFile, is_sound, write_gradients
from eckart.calibration.doors import Spill, whole_doors
from eckart.calibration.gradients import (
    Batch,
    Loss,
    count_examples,
    gradient_of,
    place_sums,
    places_of,
    rows_of_one_length,
    rows_together,
    watching,
)
from eckart.calibration.walk import Walk
from eckart.calibration.weights import blank_gradients
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments
from eckart.models.shards import Skeleton
from eckart.models.sites import Site
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent

FLOAT16 = frozenset({torch.float16})


class Sweep:
    """The gradient statistics of all planned sites, in files: one a block.

    Args:
        skeleton: the model. tokens, sites, needs: as in `collect_gradients`.
        folder: for hidden states, gradients at the doors and statistics. Whole files in it are not computed again.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tokens,
        sites: Sequence[Site],
        needs: frozenset[str],
        folder: Path,
        *,
        track: Track = silent,
    ) -> None:
        self.skeleton, self.tokens, self.sites, self.needs = skeleton, tokens, sites, needs
        self.folder, self.track = folder, track
        # Batches of samples without their padding; of one each where the square of a sample's gradient is needed.
        self.batches = rows_of_one_length(tokens, rows_together(skeleton.model, needs))
        self.first = min(site.block for site in sites)

    def run(self) -> None:
        """Collect the statistics of every block that has none on disk.

        Raises:
            ValueError: as `collect_gradients`.
            OSError: the disk is full.

        Cost: two forward passes and a backward pass of each sample; the model's files are read twice.
        Disk: the hidden states of all samples at every door.
        """
        if all(is_sound(self._file(number)) for number in {site.block for site in self.sites}):
            return
        above, doors = self.folder / "above", self.folder / "hidden"
        with in_float32(self.skeleton.model, FLOAT16):  # gradients in float16 would underflow to zero
            door = max(whole_doors(doors), default=None)
            count, device = len(self.skeleton.blocks), self.skeleton.device
            held = Spill(doors, len(self.batches), door=door, device=device)
            door_above = min(whole_doors(above), default=None)
            back = Spill(above, len(self.batches), first=count, door=door_above, step=-1, device=device)
            loss = Loss(self.skeleton.model, self.tokens.mask_token)
            asked = [loss.ask(rows) for rows in self.batches]
            walk = self._forward(asked, held, door)
            if back.door > count:
                self._head(loss, asked, walk, back)
            for number in range(back.door - 1, self.first - 1, -1):
                self._backward(number, asked, walk, held, back)
        for folder in (above, doors):
            shutil.rmtree(folder)

    def read(self, number: int) -> Mapping[str, GradientMoments]:
        """{site: statistics} of a block, of which only one is in memory at a time."""
        return GradientFile(self._file(number))

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:03d}.safetensors"

    def _forward(self, asked: Sequence[Batch], held: Spill, start: int | None) -> Walk:
        """The hidden states of every sample at every door; `start`: the last one on disk, None where there is none."""
        with self._first_resident():  # it runs once, to show the form of its output
            walk = Walk(self.skeleton.model, [batch.read for batch in asked], self.track, held=held, start=start)
        while walk.next < len(self.skeleton.blocks):
            with self._resident(walk.next):
                walk.skip(walk.next)
        return walk

    def _head(self, loss: Loss, asked: Sequence[Batch], walk: Walk, back: Spill) -> None:
        """The gradient of every sample's loss at the last door."""
        with watching(self.skeleton.model, {}):
            for index, batch in self.track(enumerate(asked), "loss", len(asked)):
                back.write(index, loss.gradient(walk.held.read(index), walk.tail, batch))
        back.turn()

    def _backward(self, number: int, asked: Sequence[Batch], walk: Walk, held: Spill, back: Spill) -> None:
        """The statistics of a block, and the gradient at its door."""
        sites = [site for site in self.sites if site.block == number]
        device = place_sums(self.skeleton.device, sites, self.needs)
        collected = blank_gradients(sites, self.needs, self.tokens.ids.numel(), device)
        of_source = {site.name for site in sites if site.of_source}
        with self._resident(number) as block, watching(self.skeleton.model, collected, of_source) as scale:
            for index, batch in self.track(enumerate(asked), f"block {number}: gradients", len(asked)):
                hidden = held.read_at(number, index).requires_grad_()
                scale.scored = batch.scored
                scale.places = partial(places_of, self.tokens, batch.read, 0)
                with torch.enable_grad():
                    output = walk.calls[index][number].run(block, hidden)
                    output.backward(back.read(index).to(output))
                back.write(index, gradient_of(hidden))
        count_examples(collected, len(self.tokens.ids))
        if sites:
            write_gradients(self._file(number), collected)
        back.turn()
        back.clear()

    @contextmanager
    def _first_resident(self) -> Iterator[None]:
        with self.skeleton.first_resident() as blocks, ExitStack() as stack:
            for block in blocks:
                stack.enter_context(in_float32(block, FLOAT16))
            yield

    @contextmanager
    def _resident(self, number: int) -> Iterator[nn.Module]:
        """The block in memory; in float32 where it is stored in float16."""
        with self.skeleton.resident(number) as block, in_float32(block, FLOAT16):
            yield block
