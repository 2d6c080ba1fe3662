"""Sensitivity: the score with one linear cut, and ASVD's search, which cuts where the score suffers least."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
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

KIND = "sensitivity measurement"


@dataclass(frozen=True)
class Sensitivity:
    """The score of the model with one linear cut, for every linear and depth.

    Attributes:
        sites: every compressible site of the model.
        units: the selected sites, those that are cut together as one unit.
        trials: one for every unit and rank, in the model's order, smaller ranks first.
        dense_score: of the model without a cut.
        better: which way scores are good. layout: of the factors.
        evaluations: scores used, the dense one and those of the journal included.
    """

    sites: tuple[Site, ...]
    units: tuple[Unit, ...]
    trials: tuple[Trial, ...]
    dense_score: float
    better: Better
    layout: Layout
    evaluations: int

    def plan_within(self, kept_params: int) -> RankPlan:
        """ASVD's truncation rank search: cut where it costs least, until the model's linears fit the budget.

        All pairs of a linear and a rank are sorted by their scores, the best first. With the first n pairs accepted, a
        linear takes the smallest rank among its pairs, and one without a pair stays dense. More pairs never keep more
        numbers, so the least n that fits is found by bisection, without another score.

        Of equal scores the one that saves more comes first, then the earlier linear.

        Args:
            kept_params: numbers in the weights of all compressible linears, as `RankPlan.kept_params`.

        Raises:
            ValueError: all pairs together do not fit (the message has how many numbers they keep).
        """
        ranked = self._in_order()
        low, high = 0, len(ranked)
        if self._plan(ranked).kept_params > kept_params:
            raise ValueError(
                f"the smallest ranks that were measured keep {self._plan(ranked).kept_params:,} numbers, more than "
                f"{kept_params:,}: measure smaller shares, or allow more"
            )
        while low < high:
            middle = (low + high) // 2
            if self._plan(ranked[:middle]).kept_params <= kept_params:
                high = middle
            else:
                low = middle + 1
        return self._plan(ranked[:low])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the sites."""
        return {
            "dense_score": self.dense_score,
            "evaluations": self.evaluations,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def _in_order(self) -> list[Trial]:
        units = {unit.name: unit for unit in self.units}
        sign = 1 if self.better == "lower" else -1

        def saved(trial: Trial) -> int:
            unit = units[trial.name]
            return unit.num_params - unit.num_stored(trial.rank, self.layout)

        return sorted(self.trials, key=lambda trial: (sign * trial.score, -saved(trial)))

    def _plan(self, accepted: Sequence[Trial]) -> RankPlan:
        ranks: dict[str, int | None] = {}
        for trial in accepted:
            rank = ranks.get(trial.name)
            ranks[trial.name] = trial.rank if rank is None else min(rank, trial.rank)
        return make_plan(self.sites, self.units, ranks, self.layout)


def measure_sensitivity(
    model: PreTrainedModel,
    spectra: Spectra,
    score: ScoreModel,
    *,
    better: Better,
    shares: Sequence[float] = SHARES,
    sites: Sequence[Site] | None = None,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    rank_multiple: int = 1,
    journal: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    team: Team | None = None,
    track: Track = silent,
) -> Sensitivity:
    """The score with one linear cut at a time, at every share: the first half of ASVD's STRS (Yuan et al. 2312.05821).

    Their code scores by perplexity of the calibration text, at the shares 0.1 ... 0.9 of every linear, the head
    included. Its bisection ends on the last place that it looked at, which may keep more than the budget; here the
    budget is met (`Sensitivity.plan_within`).

    The model is as it was after each trial.

    Args:
        as in `surgical.search`; shares are its budgets. A team measures several linears at the same time.

    Raises:
        ValueError: a score that is not finite or that refuses (names the site), a journal of another measurement,
            shares outside (0, 1), sites of another model.

    Cost: sites x shares + 1 scores, one factorisation of each site.
    """
    shares = check_shares(shares, "shares")
    every, units = select_units(model, sites, joint)
    rungs = [
        (unit, rank, share) for unit in units for rank, share in ladder_of(unit, shares, layout, rank_multiple).items()
    ]
    settings = {
        "better": better,
        "shares": list(shares),
        "layout": layout,
        "rank_multiple": rank_multiple,
        "sites": describe_units(units),
    }
    with open_journal(journal, KIND, identity and {**identity, **settings}) as entries:
        scores = TrialScores(model, spectra, score, entries, team)
        dense = scores.dense()
        taken: dict[tuple[str, int], Trial] = {}
        remaining = []
        for unit, rank, share in rungs:
            if scores.known(unit, rank) is None:
                remaining.append((unit, rank, share))
            else:
                taken[unit.name, rank] = scores.trial(unit, share, rank)
        scores.expect(
            [(unit, share, rank) for unit, rank, share in bundle]
            for _, bundle in groupby(remaining, key=lambda rung: rung[0])
        )
        for unit, rank, share in track(remaining, "sensitivity", len(remaining)):
            taken[unit.name, rank] = scores.trial(unit, share, rank)
    trials = tuple(taken[unit.name, rank] for unit, rank, _ in rungs)
    return Sensitivity(every, units, trials, dense, better, layout, scores.evaluations)


def rank_by_sensitivity(
    sites: Sequence[Site], inputs: SearchInputs, numbers: int, *, layout: Layout = "plain", rank_multiple: int = 1
) -> Ranking:
    """The ranks of `measure_sensitivity` within a budget.

    Args:
        sites: every site of the model.
        numbers: how many numbers the linears that share the budget may store together.

    Raises and cost: see `measure_sensitivity`.
    """
    result = measure_sensitivity(
        inputs.model,
        inputs.spectra,
        inputs.score,
        better=inputs.better,
        sites=inputs.sites,
        layout=layout,
        joint=inputs.joint,
        rank_multiple=rank_multiple,
        journal=inputs.journal("sensitivity", {}),
        identity=inputs.identity,
        team=inputs.team,
        track=inputs.track,
    )
    return Ranking(result.plan_within(inputs.outside + numbers), {"search": result.to_dict()})
