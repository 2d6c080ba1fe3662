"""Teams: trials that several workers measure at the same time, each on a model of its own.

A search asks for one trial after the other and says beforehand which it may ask for. The workers that have nothing to
do take those, and what is not asked for in the end is thrown away. So the search decides as it would alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from eckart.allocation.search.trials import Cuts, Placed, Score, Spectra, measure, seconds_since, swapped


class Crew(Protocol):
    """Workers that each hold something, and answer with it: asked for tickets, which are exchanged for answers."""

    @property
    def size(self) -> int: ...

    def ask(self, member: int, item: Any) -> Any: ...

    def get(self, ticket: Any) -> Any: ...

    def ready(self, tickets: Sequence[Any]) -> set[Any]: ...


@dataclass(frozen=True)
class Asked:
    """One trial as a worker is asked for it.

    Attributes:
        kept: the cuts that were decided before; they stay in the worker's model.
        trial: one more cut; None is the model as it stands.
        what: names it in messages.
    """

    kept: tuple[Placed, ...]
    trial: Placed | None
    what: str


class Scorer:
    """What a worker does: it scores its model with cuts in it. Gives (score, seconds).

    A worker that stands in for a lost one puts in everything that was decided, when it is first asked.
    """

    def __init__(self, model: PreTrainedModel, spectra: Spectra, score: Score) -> None:
        self.model, self.score = model, score
        self.cuts = Cuts(model, spectra)
        self._kept: tuple[Placed, ...] = ()
        self._stack = ExitStack()

    @torch.no_grad()
    def __call__(self, asked: Asked) -> tuple[float, float]:
        start = time.perf_counter()
        if asked.kept[: len(self._kept)] != self._kept:
            self._stack.close()
            self._kept = ()
        for unit, rank in asked.kept[len(self._kept) :]:
            self._stack.enter_context(swapped(self.model, self.cuts.modules(unit, rank)))
        self._kept = asked.kept
        modules = {} if asked.trial is None else self.cuts.modules(*asked.trial)
        with swapped(self.model, modules):
            score = measure(self.model, self.score, asked.what)
        return score, seconds_since(start)


class CrewTeam:
    """A `trials.Team` whose members each have a `Scorer`."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._kept: tuple[Placed, ...] = ()
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
        self._kept += (trial,)

    def _ask(self, member: int, trial: Placed | None, what: str) -> Any:
        self._busy[member] = self.crew.ask(member, Asked(self._kept, trial, what))
        return self._busy[member]

    def _free(self) -> list[int]:
        return [member for member, ticket in enumerate(self._busy) if ticket is None]

    def _wait(self, *tickets: Any) -> set[Any]:
        """Wait until a ticket or a member's last one is answered, and give those who are free more to do."""
        done = self.crew.ready(list({*tickets, *(ticket for ticket in self._busy if ticket is not None)}))
        self._busy = [None if ticket in done else ticket for ticket in self._busy]
        self._give_out()
        return done

    def _give_out(self) -> None:
        for member in self._free():
            if self._waiting:
                for trial, what in self._waiting.pop(0):
                    self._asked[trial] = self._ask(member, trial, what)
