"""Recorded losses: what every unit loses at every rank, a journal's record for each block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eckart.compression.cuts import FactorRequest
from eckart.models.units import Unit
from eckart.runs.ranks import Losses
from eckart.support.journal import Journal


class RecordedLosses:
    """The losses of one block's units after another's; a block that the journal has is not factored again.

    Args:
        journal: of one model, method, text and choice of units.
        measure: gives the losses of those that are not recorded.
    """

    def __init__(self, journal: Journal, measure: Losses) -> None:
        self.journal, self.measure = journal, measure

    def holds(self, block: int) -> bool:
        """Whether a block's are recorded; their moments are not needed then."""
        return self.journal.find(_key(block)) is not None

    def __call__(self, request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
        """Each unit of a block in order, and its losses (ranks + 1,) in float64."""
        block = request.part.block
        if not self.holds(block):
            measured = {unit.name: tails.tolist() for unit, tails in self.measure(request)}
            self.journal.write(_key(block), {"losses": measured})
        record = self.journal.find(_key(block))
        assert record is not None
        for unit in request.units:
            yield unit, torch.tensor(record["losses"][unit.name], dtype=torch.float64)


def _key(block: int) -> str:
    return f"block {block}"
