"""Surgical search (SFSD): for one linear after another, the smallest budget at which the model's score holds."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.allocation.rank_plan import Ranking, RankPlan
from eckart.allocation.search.trials import (
    SHARES,
    Better,
    ScoreModel,
    SearchInputs,
    Spectra,
    Team,
    Trial,
    TrialScores,
    check_shares,
    describe_units,
    ladder_of,
    make_plan,
    select_units,
)
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit
from eckart.support.journal import open_journal
from eckart.support.progress import Track, silent

KIND = "surgical search"


@dataclass(frozen=True)
class Tolerance:
    """How much worse than the dense model's a score may be and still hold.

    The paper says "meets or exceeds" a metric fixed beforehand, and no number. With s the dense score, the bar is

        relative, lower is better:  s (1 + amount)^n        relative, higher is better:  s (1 - amount)^n
        absolute, lower is better:  s + n amount            absolute, higher is better:  s - n amount

    with n = 1, or, `per_site`, the number of linears looked at so far, the one that is tried included. A bar for the
    whole model is used up by the first linears; one that grows has room for every linear.

    Attributes:
        amount: 0 lets nothing be lost; a negative one asks for a gain.
        relative: a share of the dense score, which then has to be positive; else in the score's own unit.
        per_site: the bar grows with every linear.
    """

    amount: float
    relative: bool = True
    per_site: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.amount) or (self.relative and self.amount <= -1):
            raise ValueError(f"tolerance {self.amount} is no finite number, or takes more than all of the score")

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """The tolerance in words: "0.5% per linear", "5%" (of the dense score), "0.01", "0.02 per linear".

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(%?)\s*(per linear)?\s*", text)
        try:
            amount = float(match[1]) if match else math.nan
        except ValueError:
            amount = math.nan
        if match is None or math.isnan(amount):
            raise ValueError(f"tolerance {text!r} is none of '0.5% per linear', '5%', '0.01', '0.02 per linear'")
        relative = bool(match[2])
        return cls(amount / 100 if relative else amount, relative, bool(match[3]))

    def __str__(self) -> str:
        amount = f"{100 * self.amount:g}%" if self.relative else f"{self.amount:g}"
        return f"{amount} per linear" if self.per_site else amount

    def bar(self, dense: float, better: Better, looked_at: int) -> float:
        """The worst score that holds.

        Raises:
            ValueError: a relative tolerance of a dense score that is not positive.
        """
        steps = looked_at if self.per_site else 1
        sign = 1 if better == "lower" else -1
        if not self.relative:
            return dense + sign * steps * self.amount
        if dense <= 0:
            raise ValueError(f"the dense score is {dense:g}: nothing is relative to it; give an absolute tolerance")
        factor = 1 + sign * self.amount
        if factor <= 0:
            return -math.inf  # more than all of a score that should be high may be lost
        try:
            return dense * factor**steps
        except OverflowError:
            return math.inf

    def holds(self, score: float, dense: float, better: Better, looked_at: int) -> bool:
        """Whether the score is at the bar or on its good side."""
        bar = self.bar(dense, better, looked_at)
        return score <= bar if better == "lower" else score >= bar


# What the authors' release lets perplexity grow by at each linear. Its tasks have an absolute tolerance for the whole
# model, 0 in its README and 0.03 by default.
PERPLEXITY_TOLERANCE = Tolerance(0.005, relative=True, per_site=True)


@dataclass(frozen=True)
class Point:
    """A point on the trade-off between size and score: the model after one more linear was decided.

    Attributes:
        sites: linears decided so far.
        kept_params: numbers in the weights of all compressible linears, as `RankPlan.kept_params`.
        keep: the share that the searched linears keep of theirs, as a recipe's `keep` counts.
        score: of the model with these cuts.
        evaluations: scores used so far, the dense one included.
    """

    sites: int
    kept_params: int
    keep: float
    score: float
    evaluations: int


@dataclass(frozen=True)
class SearchResult:
    """The ranks that a search decided, and every step of it.

    Attributes:
        plan: the ranks. Linears that were looked at and stay dense are in it with None.
        curve: from the dense model to `plan`, a point for every decision.
        dense_score: of the model before any cut.
        evaluations: scores used, the dense one and those of the journal included.
        trials: every cut that was measured, in order.
        order: names of the decided sites, in the order in which they were decided.
    """

    plan: RankPlan
    curve: tuple[Point, ...]
    dense_score: float
    evaluations: int
    trials: tuple[Trial, ...]
    order: tuple[str, ...]

    def __repr__(self) -> str:
        return f"SearchResult({self.plan}, {len(self.order)} linears decided, {self.evaluations} evaluations)"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the plan's sites."""
        return {
            "dense_score": self.dense_score,
            "evaluations": self.evaluations,
            "order": list(self.order),
            "ranks": dict(self.plan.ranks),
            "curve": [asdict(point) for point in self.curve],
            "trials": [asdict(trial) for trial in self.trials],
        }


def search(
    model: PreTrainedModel,
    spectra: Spectra,
    score: ScoreModel,
    *,
    better: Better,
    tolerance: Tolerance,
    sites: Sequence[Site] | None = None,
    budgets: Sequence[float] = SHARES,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    rank_multiple: int = 1,
    stop: int | None = None,
    journal: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    team: Team | None = None,
    track: Track = silent,
) -> SearchResult:
    """SFSD's surgical rank search (Algorithm 1): each linear gets the smallest budget at which the score holds.

    From the last linear of the last block to the first of the first (the reverse of `find_sites`), with everything
    decided before in place: try the budgets from the smallest up, and keep the first at which the model's score is
    within `tolerance` of the dense model's; where none is, the linear stays dense. Budget beta is rank
    floor(beta d_out d_in / (d_out + d_in)) (Eq. 3), or the pivoted layout's rank of the same share.

    Open in the paper, and here: the order inside a block (the authors' release has the reverse of the modules' order);
    what becomes of a linear at which no budget holds (the printed algorithm leaves the largest in; its text and Figure
    3 say intact); the size of the tolerance (see `Tolerance`). The release also tries rank 1, leaves the first four of
    32 blocks alone (give `sites`) and asks three parts of the task's search split separately.

    The model is changed while trials run and is as it was afterwards, to the same modules; `compress` applies the plan.

    Args:
        model: dense, in eval mode.
        spectra: a unit's `Factored` by `Unit.name`: a mapping, or a callable that makes it when asked, from the last
            site to the first, one at a time. A site is asked for once, and not at all where the journal has every
            answer about it and about those after it.
        score: how good the model is; must be the same number for the same model, or a resumed search is another one.
        better: whether low or high scores are good.
        sites: only these; default all. The others stay dense.
        budgets: shares of a linear's numbers.
        layout: of the plan's factors; decides which rank a budget is and what it costs. Trials use two plain factors.
        joint: input groups whose linears are cut as one.
        rank_multiple: round ranks down to a multiple, never below one.
        stop: end once the model's linears (`RankPlan.kept_params`, those outside `sites` included) keep no more than
            this many numbers. None looks at every linear. A search that ends above it says so by its plan.
        journal: a file of trials, a line each. The same search goes on after the last of them, and evaluates nothing
            twice; `stop` may differ, so that a target can be moved.
        identity: what makes the scores, for the journal's header: the model's name or digest, the method and its
            settings, the calibration, the score's data. The other arguments of this function are added.
        team: measures instead of `score`, on models of its own: several budgets of a linear at the same time. Scores of
            budgets above the one that held are dropped, so that the journal and the result are as without a team.
        track: shows the remaining linears, and the budgets of the current one.

    Raises:
        ValueError: a score that is not finite or that refuses (names the site), a journal of another search, budgets
            outside (0, 1), sites of another model.

    Cost: up to sites x budgets + 1 scores; one factorisation of each site; memory for the kept factors in addition
    to the dense weights.
    """
    budgets = check_shares(budgets)
    every, units = select_units(model, sites, joint)
    units = tuple(reversed(units))
    settings = {
        "better": better,
        "tolerance": asdict(tolerance),
        "budgets": list(budgets),
        "layout": layout,
        "rank_multiple": rank_multiple,
        "sites": describe_units(units),
    }
    ladders = {unit.name: ladder_of(unit, budgets, layout, rank_multiple) for unit in units}
    with open_journal(journal, KIND, identity and {**identity, **settings}) as entries, ExitStack() as kept:
        scores = TrialScores(model, spectra, score, entries, team)
        dense = scores.dense()
        decisions = _Decisions(scores, ladders, _Bar(tolerance, dense, better), kept)
        total, searched = sum(site.num_params for site in every), sum(unit.num_params for unit in units)
        curve = [Point(0, total, 1.0, dense, scores.evaluations)]
        trials: list[Trial] = []

        def decide(unit: Unit, shown: Track) -> None:
            trial = decisions.decide(unit, trials, shown)
            params, value = curve[-1].kept_params, curve[-1].score
            if trial is not None:
                params, value = params + unit.num_stored(trial.rank, layout) - unit.num_params, trial.score
            keep = 1 - (total - params) / searched
            curve.append(Point(decisions.looked_at, params, keep, value, scores.evaluations))

        def small_enough() -> bool:
            return stop is not None and curve[-1].kept_params <= stop

        remaining = list(units)
        # What the journal answers takes no time: counted as progress, it would make the remaining time look too short.
        while remaining and not small_enough() and decisions.knows(remaining[0]):
            decide(remaining.pop(0), silent)
        if not small_enough():
            for unit in track(remaining, "rank search", len(remaining)):
                decide(unit, track)
                if small_enough():
                    break
    return SearchResult(
        make_plan(every, units, decisions.ranks, layout),
        tuple(curve),
        dense,
        scores.evaluations,
        tuple(trials),
        decisions.order,
    )


def rank_surgically(
    sites: Sequence[Site],
    inputs: SearchInputs,
    numbers: int | None,
    *,
    tolerance: Tolerance,
    budgets: Sequence[float] | None = None,
    layout: Layout = "plain",
    rank_multiple: int = 1,
) -> Ranking:
    """The ranks of `search`, which ends once the budget is met.

    Args:
        sites: every site of the model.
        numbers: how many numbers the linears that share the budget may store together; None ends where the tolerance
            does.

    Raises:
        ValueError: every linear was looked at, and the ranks keep more than the budget (unless `inputs.above` lets
            them); and as `search`.

    Cost: see `search`.
    """
    stop = None if numbers is None else inputs.outside + numbers
    result = search(
        inputs.model,
        inputs.spectra,
        inputs.score,
        better=inputs.better,
        tolerance=tolerance,
        sites=inputs.sites,
        budgets=budgets or SHARES,
        layout=layout,
        joint=inputs.joint,
        rank_multiple=rank_multiple,
        stop=stop,
        journal=inputs.journal("surgical", {"tolerance": str(tolerance), **({"budgets": budgets} if budgets else {})}),
        identity=inputs.identity,
        team=inputs.team,
        track=inputs.track,
    )
    kept = result.plan.kept_params
    if stop is not None and kept > stop and not inputs.above:
        dense = sum(site.num_params for site in sites)
        raise ValueError(
            f"the search looked at every selected linear, and its ranks keep {kept - inputs.outside:,} of "
            f"{dense - inputs.outside:,} numbers, more than the budget's {numbers:,}: raise the tolerance (it is "
            f"{tolerance}), or leave out the budget to take these ranks"
        )
    return Ranking(result.plan, {"search": result.to_dict()})


@dataclass(frozen=True)
class _Bar:
    """The tolerance for one dense score."""

    tolerance: Tolerance
    dense: float
    better: Better

    def holds(self, score: float, looked_at: int) -> bool:
        return self.tolerance.holds(score, self.dense, self.better, looked_at)


class _Decisions:
    """The decisions so far, and the model with the cuts that they kept.

    A cut whose score came from the journal is put into the model only when something has to be measured after it.
    """

    def __init__(
        self, scores: TrialScores, ladders: Mapping[str, Mapping[int, float]], bar: _Bar, kept: ExitStack
    ) -> None:
        self.scores, self.ladders, self.bar, self.kept = scores, ladders, bar, kept
        self.ranks: dict[str, int | None] = {}
        self.order: tuple[str, ...] = ()
        self._waiting: list[tuple[Unit, int]] = []

    @property
    def looked_at(self) -> int:
        """Linears decided."""
        return len(self.order)

    def knows(self, unit: Unit) -> bool:
        """Whether the journal has every score that the next unit's decision needs."""
        looked_at = self.looked_at + len(unit.sites)
        for rank in self.ladders[unit.name]:
            score = self.scores.known(unit, rank)
            if score is None:
                return False
            if self.bar.holds(score, looked_at):
                return True
        return True

    def decide(self, unit: Unit, trials: list[Trial], track: Track) -> Trial | None:
        """Try the next unit's budgets in turn; gives the trial that held, or None where it stays dense.

        Every trial is added to `trials`, in place.
        """
        looked_at = self.looked_at + len(unit.sites)
        ladder, held = self.ladders[unit.name], None
        announced = False
        for rank in track(ladder, unit.name, len(ladder)):
            if self.scores.known(unit, rank) is None and not announced:
                self._catch_up()
                remaining = [each for each in ladder if each >= rank and self.scores.known(unit, each) is None]
                self.scores.expect([[(unit, ladder[each], each)] for each in remaining])
                announced = True
            trial = self.scores.trial(unit, ladder[rank], rank, lambda score: self.bar.holds(score, looked_at))
            trials.append(trial)
            if self.bar.holds(trial.score, looked_at):
                held = trial
                self._waiting.append((unit, rank))
                break
        self.ranks[unit.name] = None if held is None else held.rank
        self.order += tuple(site.name for site in reversed(unit.sites))
        return held

    def _catch_up(self) -> None:
        for unit, rank in self._waiting:
            self.scores.keep(unit, rank, self.kept)
        self._waiting.clear()
