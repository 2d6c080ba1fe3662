"""Trials: a model measured with some of its linears cut, and put back as it was, without a copy of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.allocation.fitting import check_multiple
from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank import DecompositionError, Factored, Layout
from eckart.models.sites import Site, find_sites, replace_module, select_sites
from eckart.models.units import Unit, units_of
from eckart.support.journal import Journal
from eckart.support.progress import Track, silent

# The factorisation of each unit, by `Unit.name`. A callable computes it when asked; searches ask for one at a time and
# keep none.
Spectra = Mapping[str, Factored] | Callable[[str], Factored]
# Gives how good a model is, in one number.
ScoreModel = Callable[[PreTrainedModel], float]
Better = Literal["lower", "higher"]
# A unit and the rank that it is cut at.
Placed = tuple[Unit, int]

# SFSD Algorithm 1 and ASVD's search both look at these shares of a linear's numbers.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, `modules` replace the model's modules of the same names; afterwards the model's own are back.

    Nothing is copied: the model's modules are remembered and put back, also when the block fails. A module that was
    replaced again meanwhile is not touched. To keep a cut that was good, enter it again on an `ExitStack` that outlives
    the trial, or put it in for good with `replace_module`: both cost nothing.

    Raises:
        AttributeError: the model has no module of such a name. Nothing was changed.
    """
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            if model.get_submodule(name) is modules[name]:
                replace_module(model, name, module)


def low_rank(model: nn.Module, unit: Unit, factored: Factored, rank: int) -> dict[str, nn.Module]:
    """{site name: its module when the unit's spectrum is cut at `rank`}; the model must hold the dense modules.

    Two factors, whatever the layout of a plan: the pivoted layout computes the same.

    Raises:
        ValueError: the cut refuses, the spectrum is of other sites, or a factor is not finite; names the site.
        DecompositionError: as the cut raises it; names the site.
    """
    try:
        factors = factored.cut(rank)
    except (ValueError, DecompositionError) as error:
        raise type(error)(f"{unit.name}: {error}") from error
    return unit.modules(model, factors)


def ladder_of(unit: Unit, shares: Sequence[float], layout: Layout = "plain", multiple: int = 1) -> dict[int, float]:
    """{rank: share} of the shares, smallest first, without those that repeat a rank or save nothing.

    On a small linear, or with a large multiple, several shares are one rank.

    Raises:
        ValueError: the multiple is not positive.
    """
    check_multiple(multiple)
    ladder: dict[int, float] = {}
    for share in sorted(shares):
        rank = unit.rank_for(share, layout, multiple)
        if unit.num_stored(rank, layout) < unit.num_params:
            ladder.setdefault(rank, share)
    return ladder


def measure(model: PreTrainedModel, score: ScoreModel, what: str) -> float:
    """The model's score.

    Args:
        what: names the state of the model, in messages.

    Raises:
        ValueError: the score is not finite, or the scoring refused: a broken model has no score.
    """
    try:
        value = float(score(model))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if not math.isfinite(value):
        raise ValueError(f"{what}: the score is {value}; the model is broken, or the score is")
    return value


@dataclass(frozen=True)
class Trial:
    """One cut that was measured.

    Attributes:
        name: `Unit.name`.
        share: of the unit's numbers, as asked for.
        rank: the one that this share allows.
        score: of the model with this cut in it.
        seconds: that cut and score took.
    """

    name: str
    share: float
    rank: int
    score: float
    seconds: float


class Cuts:
    """The modules of cuts of one model. The last spectrum is held, so that a unit's cuts need one factorisation."""

    def __init__(self, model: PreTrainedModel, spectra: Spectra) -> None:
        self.model, self.spectra = model, spectra
        self._last: tuple[str, Factored] | None = None
        self._made: tuple[str, dict[str, nn.Module]] | None = None

    def factored(self, unit: Unit) -> Factored:
        """The unit's spectrum."""
        if self._last is None or self._last[0] != unit.name:
            self._last = None  # let go before the next one is made
            self._last = (unit.name, _find(self.spectra, unit.name))
        return self._last[1]

    def modules(self, unit: Unit, rank: int) -> dict[str, nn.Module]:
        """{site name: its module at this rank}. The model must hold the dense modules."""
        key = _key(unit, rank)
        if self._made is None or self._made[0] != key:
            self._made = None
            with torch.no_grad():
                self._made = (key, low_rank(self.model, unit, self.factored(unit), rank))
        return self._made[1]


class Team(Protocol):
    """Copies of the model elsewhere that measure several trials at the same time."""

    def expect(self, bundles: Iterable[Sequence[tuple[Placed, str]]]) -> None:
        """Trials that may be asked for next, with their names for messages, and no others: begin with the first.

        Those of a bundle need the same factorisation, so that one model measures them all.
        """

    def score(self, trial: Placed | None, what: str) -> tuple[float, float]:
        """(score, seconds) of the model with the kept cuts and the trial; None for the kept cuts alone."""

    def keep(self, trial: Placed) -> None:
        """Leave this cut in the models for all trials from now on."""


@dataclass(frozen=True)
class SearchInputs:
    """The inputs of a search for ranks.

    Attributes:
        sites: those that share the budget. joint: input groups among them whose linears are cut as one.
        outside: numbers in the other compressible linears.
        score: measures a model. better: which way the score is good.
        identity: what makes the scores, for a journal's header.
        journal: (kind of search, settings of this one) -> its file; None keeps none.
        above: a search that ends above the budget gives its ranks, instead of refusing.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    joint: Collection[str]
    outside: int
    spectra: Spectra
    score: ScoreModel
    better: Better
    identity: Mapping[str, Any]
    journal: Callable[[str, Mapping[str, Any]], Path | None]
    team: Team | None = None
    above: bool = False
    track: Track = silent


class TrialScores:
    """Scores of trials, i.e. of a model with one more cut; out of the journal, or measured and written there.

    Args:
        team: measures instead of the model, which is not touched then; also trials that were not expected.

    Attributes:
        evaluations: scores used so far, those of the journal included.
    """

    def __init__(
        self, model: PreTrainedModel, spectra: Spectra, score: ScoreModel, journal: Journal, team: Team | None = None
    ) -> None:
        self.model, self.score, self.journal, self.team = model, score, journal, team
        self.cuts = Cuts(model, spectra)
        self.evaluations = 0

    def expect(self, bundles: Iterable[Sequence[tuple[Unit, float, int]]]) -> None:
        """Let a team begin with trials that may be asked for next: (unit, share, rank), bundled by factorisation.

        Without a team nothing is done.
        """
        if self.team is not None:
            self.team.expect([((unit, rank), _named(unit, share, rank)) for unit, share, rank in b] for b in bundles)

    def keep(self, unit: Unit, rank: int, kept: ExitStack) -> None:
        """Leave a cut in the model until `kept` closes, or in the team's models, for the trials to come."""
        if self.team is not None:
            self.team.keep((unit, rank))
        else:
            kept.enter_context(swapped(self.model, self.cuts.modules(unit, rank)))

    def dense(self) -> float:
        """The score of the model before any trial."""
        record = self.journal.find("dense")
        if record is None:
            score, seconds = self._measure(None, f"{type(self.model).__name__}, dense")
            record = {"score": score, "seconds": seconds}
            self.journal.write("dense", record)
        self.evaluations += 1
        return float(record["score"])

    def known(self, unit: Unit, rank: int) -> float | None:
        """The trial's score as the journal has it, or None."""
        record = self.journal.find(_key(unit, rank))
        return None if record is None else float(record["score"])

    def trial(self, unit: Unit, share: float, rank: int, holds: Callable[[float], bool] | None = None) -> Trial:
        """The trial, from the journal or measured. The model is as it was afterwards.

        Args:
            holds: whether a score is good enough, where that decides something; noted in the journal.
        """
        record = self.journal.find(_key(unit, rank))
        if record is None:
            score, seconds = self._measure((unit, rank), _named(unit, share, rank))
            record = {"site": unit.name, "budget": share, "rank": rank, "score": score}
            if holds is not None:
                record["held"] = holds(score)
            record["seconds"] = seconds
            self.journal.write(_key(unit, rank), record)
        self.evaluations += 1
        return Trial(unit.name, share, rank, float(record["score"]), float(record["seconds"]))

    def _measure(self, trial: Placed | None, what: str) -> tuple[float, float]:
        if self.team is not None:
            return self.team.score(trial, what)
        start = time.perf_counter()
        with swapped(self.model, {} if trial is None else self.cuts.modules(*trial)):
            score = measure(self.model, self.score, what)
        return score, seconds_since(start)


@contextmanager
def planned(model: PreTrainedModel, plan: RankPlan, spectra: Spectra) -> Iterator[None]:
    """Inside, the model is cut as the plan says; afterwards it is as it was. For measuring a plan without a copy.

    Raises:
        ValueError, DecompositionError: as `low_rank`; or a planned unit has no spectrum.
    """
    cuts, modules = Cuts(model, spectra), dict[str, nn.Module]()
    for unit in plan.units:
        rank = plan.rank(unit.sites[0])
        if rank is not None:
            modules |= cuts.modules(unit, rank)
    with swapped(model, modules):
        yield


def select_units(
    model: PreTrainedModel, sites: Sequence[Site] | None, joint: Collection[str]
) -> tuple[tuple[Site, ...], tuple[Unit, ...]]:
    """Every site of the model, and the selected ones as units, both in the model's order. None selects all.

    Raises:
        ValueError: a selected site is not the model's, a joint group is selected in part, or nothing is selected.
    """
    every = find_sites(model)
    selected = select_sites(every) if sites is None else tuple(site for site in every if site in set(sites))
    unknown = set(sites or ()) - set(every)
    if unknown:
        raise ValueError(f"{min(site.name for site in unknown)} is no site of this model")
    if not selected:
        raise ValueError("no site is selected: leave sites out for all")
    for site in every:
        if site not in selected and any(
            site.joint_group in joint and site.joint_group == c.joint_group for c in selected
        ):
            raise ValueError(f"{site.name} is joint with selected sites; select it as well")
    return every, units_of(selected, joint)


def describe_units(units: Sequence[Unit]) -> list[list[Any]]:
    """[name, d_out, d_in] of each, for the header of a journal."""
    return [[unit.name, unit.d_out, unit.d_in] for unit in units]


def make_plan(
    sites: tuple[Site, ...], units: Sequence[Unit], ranks: Mapping[str, int | None], layout: Layout
) -> RankPlan:
    """The plan in which every site of a unit has the unit's rank; units without an entry stay dense."""
    return RankPlan(
        sites,
        {site.name: ranks[unit.name] for unit in units if unit.name in ranks for site in unit.sites},
        layout=layout,
        joint=frozenset(unit.group for unit in units if len(unit.sites) > 1),
    )


def check_shares(shares: Sequence[float], what: str = "budgets") -> tuple[float, ...]:
    """The shares, ascending. Raises ValueError unless there is one and all are in (0, 1)."""
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"{what} {list(shares)}: give shares of parameters kept, each in (0, 1)")
    return tuple(sorted(set(shares)))


def _find(spectra: Spectra, name: str) -> Factored:
    if not isinstance(spectra, Mapping):
        return spectra(name)
    if name not in spectra:
        raise ValueError(f"there is no spectrum of {name}")
    return spectra[name]


def _named(unit: Unit, share: float, rank: int) -> str:
    return f"{unit.name} at rank {rank} (keep {share:g})"


def _key(unit: Unit, rank: int) -> str:
    return f"{unit.name} {rank}"


def seconds_since(start: float) -> float:
    """Seconds since a `time.perf_counter()`, rounded to milliseconds."""
    return round(time.perf_counter() - start, 3)
