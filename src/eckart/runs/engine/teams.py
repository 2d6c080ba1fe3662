"""Teams: trials that several workers measure at the same time, each on a model of its own.

A search asks for one trial after another and says beforehand which it may ask for. Free workers measure those, and
scores that are not asked for in the end are dropped. So the search decides as it would alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.allocation.search.trials import Cuts, Placed, ScoreModel, Spectra, measure, seconds_since, swapped
from eckart.calibration.moments import BlockCalibration
from eckart.compression.spectra import spectra_on_demand
from eckart.lowrank import Method
from eckart.runs.engine.base import SearchRequest
from eckart.runs.engine.cluster import Cluster, Crew, Kept
from eckart.runs.engine.source import Source


@dataclass(frozen=True)
class TrialRequest:
    """One trial as a worker is asked for it.

    Attributes:
        decided: cuts of which the search is sure; they stay in the worker's model.
        trial: one more cut; None: the model with the decided cuts alone.
        what: names it in messages.
    """

    decided: tuple[Placed, ...]
    trial: Placed | None
    what: str


class Scorer:
    """Scores a worker's model with cuts in it; calling it gives (score, seconds).

    A worker that replaces a lost one puts in every decided cut when it is first asked.
    """

    def __init__(self, model: PreTrainedModel, spectra: Spectra, score: ScoreModel) -> None:
        self.model, self.score = model, score
        self.cuts = Cuts(model, spectra)
        self._decided: tuple[Placed, ...] = ()
        self._stack = ExitStack()

    @torch.no_grad()
    def __call__(self, request: TrialRequest) -> tuple[float, float]:
        start = time.perf_counter()
        if request.decided[: len(self._decided)] != self._decided:
            self._stack.close()
            self._decided = ()
        for unit, rank in request.decided[len(self._decided) :]:
            self._stack.enter_context(swapped(self.model, self.cuts.modules(unit, rank)))
        self._decided = request.decided
        modules = {} if request.trial is None else self.cuts.modules(*request.trial)
        with swapped(self.model, modules):
            score = measure(self.model, self.score, request.what)
        return score, seconds_since(start)


class ClusterTeam:
    """A `trials.Team` of workers of a cluster, which each hold a `Scorer`."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._decided: tuple[Placed, ...] = ()
        self._waiting: list[Sequence[tuple[Placed, str]]] = []
        self._asked: dict[Placed, Any] = {}
        # Of each member, the last ticket that it has not answered yet.
        self._busy: list[Any] = [None] * crew.size

    def expect(self, bundles: Iterable[Sequence[tuple[Placed, str]]]) -> None:
        """See `trials.Team`."""
        self._asked.clear()
        self._waiting = list(bundles)
        self._give_out()

    def score(self, trial: Placed | None, what: str) -> tuple[float, float]:
        """See `trials.Team`."""
        while any(trial == waiting for bundle in self._waiting for waiting, _ in bundle):
            self._wait()
        if trial is not None and trial in self._asked:
            ticket = self._asked.pop(trial)
        else:
            ticket = self._ask(self._free()[0] if self._free() else 0, trial, what)
        while ticket not in self._wait(ticket):
            pass
        score, seconds = self.crew.get(ticket)
        return score, seconds

    def keep(self, trial: Placed) -> None:
        """See `trials.Team`."""
        self._decided += (trial,)

    def _ask(self, member: int, trial: Placed | None, what: str) -> Any:
        self._busy[member] = self.crew.ask(member, TrialRequest(self._decided, trial, what))
        return self._busy[member]

    def _free(self) -> list[int]:
        return [member for member, ticket in enumerate(self._busy) if ticket is None]

    def _wait(self, *tickets: Any) -> set[Any]:
        """Wait until a ticket or a member's last one is answered, and give those who are free more to do."""
        answered = self.crew.ready(list({*tickets, *(ticket for ticket in self._busy if ticket is not None)}))
        self._busy = [None if ticket in answered else ticket for ticket in self._busy]
        self._give_out()
        return answered

    def _give_out(self) -> None:
        for member in self._free():
            if self._waiting:
                for trial, what in self._waiting.pop(0):
                    self._asked[trial] = self._ask(member, trial, what)


def with_own_model(
    cluster: Cluster, request: SearchRequest, make: Callable[[PreTrainedModel, Spectra], Callable[[Any], Any]]
) -> Callable[[], Callable[[Any], Any]]:
    """What each worker of a crew calls: `make` on a model of its own and the spectra of its units.

    The moments are put into the cluster's memory here; a worker fetches a block's when it makes a spectrum of it.
    """
    blocks = {block.block: cluster.keep(block) for block in (request.blocks() if request.blocks else ())}
    return partial(_make, Source.of(request.model), request.method, blocks, frozenset(request.joint), make)


def _make(
    source: Source,
    method: Method,
    blocks: Mapping[int, Kept[BlockCalibration]],
    joint: frozenset[str],
    make: Callable[[PreTrainedModel, Spectra], Callable[[Any], Any]],
) -> Callable[[Any], Any]:
    model = source.load_own()
    return make(model, spectra_on_demand(model, method, _FetchedBlocks(blocks), joint=joint))


class _FetchedBlocks(Mapping[int, BlockCalibration]):
    """Blocks that are fetched when they are asked for; the last one is held."""

    def __init__(self, blocks: Mapping[int, Kept[BlockCalibration]]) -> None:
        self._blocks = blocks
        self._last: tuple[int, BlockCalibration] | None = None

    def __getitem__(self, number: int) -> BlockCalibration:
        if self._last is None or self._last[0] != number:
            self._last = None  # let go before the next one comes
            self._last = (number, self._blocks[number].fetch())
        return self._last[1]

    def __contains__(self, number: object) -> bool:
        return number in self._blocks

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)
