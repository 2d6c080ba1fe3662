"""Rank search: SFSD's surgical search, the smallest budget of one linear after another at which the score holds."""

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
    Bench,
    Better,
    Score,
    SearchInputs,
    Spectra,
    Team,
    Trial,
    check_shares,
    choose_units,
    describe_units,
    ladder_of,
    make_plan,
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

    with n = 1, or, `per_site`, the number of linears looked at so far with the one that is tried. A bar for the whole
    model is spent on the first linears that are looked at; one that grows leaves something for every linear.

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
    """A place on the trade-off that a search walked: the model after one more linear was decided.

    Attributes:
        sites: linears decided so far.
        kept_params: numbers in the weights of all compressible linears, as `RankPlan.kept_params`.
        keep: the same as a share of the dense ones.
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
    """What a search decided, and the way there.

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
    score: Score,
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
            settings, the calibration, the score's data. What this function is given besides is added.
        team: measures instead of `score`, on models of its own: several budgets of a linear at the same time. Those
            above the one that held are thrown away, so that the journal and the result are as without it.
        track: shows the linears that are left, and the budgets of the one at hand.

    Raises:
        ValueError: a score that is not finite or that refuses (names the site), a journal of another search, budgets
            outside (0, 1), sites of another model.

    Cost: up to sites x budgets + 1 scores; one factorisation of each site; memory for the kept factors beside the
    dense weights.
    """
    budgets = check_shares(budgets)
    every, units = choose_units(model, sites, joint)
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
        bench = Bench(model, spectra, score, entries, team)
        dense = bench.dense()
        walk = _Walk(bench, ladders, _Bar(tolerance, dense, better), kept)
        total = sum(site.num_params for site in every)
        curve = [Point(0, total, 1.0, dense, bench.evaluations)]
        trials: list[Trial] = []

        def decide(unit: Unit, shown: Track) -> None:
            trial = walk.decide(unit, trials, shown)
            params, value = curve[-1].kept_params, curve[-1].score
            if trial is not None:
                params, value = params + unit.num_stored(trial.rank, layout) - unit.num_params, trial.score
            curve.append(Point(walk.looked_at, params, params / total, value, bench.evaluations))

        def done() -> bool:
            return stop is not None and curve[-1].kept_params <= stop

        left = list(units)
        # What the journal answers takes no time. Among what is left it would make the time left look too short.
        while left and not done() and walk.knows(left[0]):
            decide(left.pop(0), silent)
        if not done():
            for unit in track(left, "rank search", len(left)):
                decide(unit, track)
                if done():
                    break
    return SearchResult(
        make_plan(every, units, walk.ranks, layout), tuple(curve), dense, bench.evaluations, tuple(trials), walk.order
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
    """Whether scores hold."""

    tolerance: Tolerance
    dense: float
    better: Better

    def holds(self, score: float, looked_at: int) -> bool:
        return self.tolerance.holds(score, self.dense, self.better, looked_at)


class _Walk:
    """The decisions so far, and the model with what they kept.

    A cut that the journal answered for is put into the model only when something has to be measured after it.
    """

    def __init__(self, bench: Bench, ladders: Mapping[str, Mapping[int, float]], bar: _Bar, kept: ExitStack) -> None:
        self.bench, self.ladders, self.bar, self.kept = bench, ladders, bar, kept
        self.ranks: dict[str, int | None] = {}
        self.order: tuple[str, ...] = ()
        self._waiting: list[tuple[Unit, int]] = []

    @property
    def looked_at(self) -> int:
        """Linears decided."""
        return len(self.order)

    def knows(self, unit: Unit) -> bool:
        """Whether the journal answers all that has to be asked about the next unit."""
        looked_at = self.looked_at + len(unit.sites)
        for rank in self.ladders[unit.name]:
            score = self.bench.known(unit, rank)
            if score is None:
                return False
            if self.bar.holds(score, looked_at):
                return True
        return True

    def decide(self, unit: Unit, trials: list[Trial], track: Track) -> Trial | None:
        """Ask about the next unit, budget after budget; the trial that held, or None where it stays dense.

        Every trial is added to `trials`, in place.
        """
        looked_at = self.looked_at + len(unit.sites)
        ladder, held = self.ladders[unit.name], None
        told = False
        for rank in track(ladder, unit.name, len(ladder)):
            if self.bench.known(unit, rank) is None and not told:
                self._catch_up()
                left = [each for each in ladder if each >= rank and self.bench.known(unit, each) is None]
                self.bench.expect([[(unit, ladder[each], each)] for each in left])
                told = True
            trial = self.bench.trial(unit, ladder[rank], rank, lambda score: self.bar.holds(score, looked_at))
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
            self.bench.keep(unit, rank, self.kept)
        self._waiting.clear()
