"""On a cluster: work that runs on the workers of a Ray cluster. They load the model themselves.

What goes to a cluster is what can be done in parts: the moments and gradients of a dense model, over shares of the
samples; the factorisation of a block's linears; the trials of a search, each on a model of the worker's own; and
evaluations, one each. What is a walk through the model, one input group after the other (the orders sequential and
anchored, refinement), and what trains the whole model stays in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import RankPlan
from eckart.allocation.search.loss_weights import Spread
from eckart.allocation.search.trials import ScoreModel, Spectra, Team
from eckart.calibration.moments import (
    BlockCalibration,
    check_readable,
    gather_gradients,
    input_store,
    weighing_readers,
)
from eckart.calibration.weights import group_weights
from eckart.compression.cuts import Cut, CutRequest, FactorRequest, cut_units
from eckart.data.tokens import Tokens
from eckart.evals.catalogue import find_task
from eckart.evals.result import EvalResult
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.lowrank import GradientMoments
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.models.sites import Site, default_sites
from eckart.models.units import Unit
from eckart.runs.engine.base import CalibrationRequest, Engine, EvaluationRequest, SearchRequest
from eckart.runs.engine.cluster import Cluster, open_cluster
from eckart.runs.engine.local import HERE, outcome_of
from eckart.runs.engine.shares import calibrate_on, gather_on
from eckart.runs.engine.source import Source
from eckart.runs.engine.teams import ClusterTeam, Scorer, with_own_model
from eckart.support.journal import Record
from eckart.support.progress import Track, silent

T = TypeVar("T")


class OnCluster(Engine):
    """The workers of a cluster. They load the model from where this process has it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def calibrate_by_block(self, request: CalibrationRequest) -> Iterator[BlockCalibration]:
        """See `Engine`. The cache is this process's, and holds the same as without a cluster."""
        needs = request.method.needs & INPUT_STATISTICS
        if request.gradients is None:
            request = replace(request, gradients=self.gather_gradients(request))
        if not needs or "cross_moment" in needs:  # nothing to walk for, or refused
            yield from HERE.calibrate_by_block(request)
            return
        model, tokens, gradients = request.model, request.tokens, request.gradients or {}
        check_readable(model, tokens)
        sites = default_sites(model) if request.sites is None else request.sites
        cache = request.cache
        store = input_store(model, tokens, request.method, sites, cache, gradients)
        weights = group_weights(gradients, weighing_readers(model, request.method), tokens)
        for number, inputs in calibrate_on(self.cluster, request, sites, store, weights):
            names = [site.name for site in sites if site.block == number]
            yield BlockCalibration(number, inputs, {name: gradients[name] for name in names if name in gradients})
            del inputs

    def gather_gradients(self, request: CalibrationRequest) -> dict[str, GradientMoments]:
        """See `Engine`."""

        def collect(
            model: PreTrainedModel, tokens: Tokens, sites: Sequence[Site], needs: frozenset[str], *, track: Track
        ) -> dict[str, GradientMoments]:
            return gather_on(self.cluster, request, sites, needs)

        return gather_gradients(
            request.model,
            request.tokens,
            request.method,
            sites=request.sites,
            cache=request.cache,
            collect=collect,
            track=request.track,
        )

    def cut_units(self, request: CutRequest) -> Iterator[tuple[Unit, Cut]]:
        """See `Engine`. Computed here: spectra to keep, and a single cut that an anchored walk waits for."""
        bundles = list(_bundles(request.factor))
        if request.spectra is not None or (request.factor.method.anchor is not None and len(bundles) == 1):
            yield from cut_units(request)
            return
        for cuts in self.cluster.spread(partial(_cut, request.plan, request.refit, request.turns), bundles):
            yield from cuts

    def losses(self, request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
        """See `Engine`."""
        for losses in self.cluster.spread(_losses, list(_bundles(request))):
            yield from losses

    @contextmanager
    def team(self, request: SearchRequest, score: ScoreModel) -> Iterator[Team | None]:
        """See `Engine`."""
        with self.cluster.crew(with_own_model(self.cluster, request, partial(Scorer, score=score))) as crew:
            yield ClusterTeam(crew)

    @contextmanager
    def probing(self, request: SearchRequest) -> Iterator[Spread | None]:
        """See `Engine`."""

        def spread(
            make: Callable[[PreTrainedModel, Spectra], Callable[[Unit], Record]], units: Sequence[Unit]
        ) -> Iterator[Record]:
            if units:
                with self.cluster.crew(with_own_model(self.cluster, request, make)) as crew:
                    yield from crew.answers(units)

        yield spread

    def outcomes(self, request: EvaluationRequest) -> Iterator[EvalResult | ValueError]:
        """See `Engine`. A task that measures time runs in this process, alone, once the other tasks are finished.

        A refusal begins with the name of its task.
        """
        subject, tasks, setup = request.subject, request.tasks, request.setup
        places = [place for place, task in enumerate(tasks) if not find_task(task.name).alone]
        evaluator = _Evaluator.of(subject, replace(setup, workers=1, track=silent))
        finished: dict[int, EvalResult | ValueError] = {}
        with self.cluster.crew(lambda: evaluator, min(self.cluster.workers, max(1, len(places)))) as crew:
            answers = crew.answers([tasks[place] for place in places])
            coming = zip(places, setup.track(answers, "evaluations", len(places)), strict=True)
            for place, task in enumerate(tasks):
                if find_task(task.name).alone:
                    finished.update(coming)
                    finished[place] = outcome_of(subject, task, setup)
                while place not in finished:
                    finished.update([next(coming)])
                yield finished.pop(place)


@contextmanager
def open_on_cluster(address: str | None = None, workers: int | None = None) -> Iterator[Engine]:
    """The workers of a Ray cluster, for the block; arguments and errors as `cluster.open_cluster` has them."""
    with open_cluster(address, workers) as cluster:
        yield OnCluster(cluster)


def _bundles(request: FactorRequest) -> Iterator[FactorRequest]:
    """The units in order, grouped by the root that they share; one by one for a method whose roots are not shared.

    Each bundle has its own moments and weights alone, so that little is sent.
    """
    method, part = request.method, request.part
    alone = method.needs_gradients or method.stage.root is None
    for _, numbered in groupby(enumerate(request.units), lambda one: (one[0] if alone else 0, one[1].group)):
        units = [unit for _, unit in numbered]
        names = {site.name for unit in units for site in unit.sites}
        groups = {site.input_group for unit in units for site in unit.sites}
        weights = {unit.name: request.weight_of(unit) for unit in units}
        own = part.part_of(groups, names)
        biases = {unit.name: request.bias_of(unit) for unit in units}
        yield FactorRequest(method, units, own, partial(_of, weights), partial(_of, biases))


def _of(tensors: dict[str, T], unit: Unit) -> T:
    return tensors[unit.name]


def _cut(plan: RankPlan, refit: bool, turns: int, bundle: FactorRequest) -> list[tuple[Unit, Cut]]:
    return list(cut_units(CutRequest(bundle, plan, refit=refit, turns=turns)))


def _losses(bundle: FactorRequest) -> list[tuple[Unit, Tensor]]:
    with torch.no_grad():
        return list(HERE.losses(bundle))


@dataclass(frozen=True)
class _Evaluator:
    """Evaluates tasks on a worker.

    Attributes:
        model, reference: those of the subject, which the worker loads itself.
        subject: makes the subject of the two.
    """

    model: Source
    reference: Source | None
    subject: Callable[[PreTrainedModel, PreTrainedModel | None], Subject]
    setup: Setup

    @classmethod
    def of(cls, subject: Subject, setup: Setup) -> Self:
        """An evaluator of this subject."""
        reference = None if subject.reference is None else Source.of(subject.reference)
        bare = {name: value for name, value in vars(subject).items() if name not in ("model", "reference")}
        return cls(Source.of(subject.model), reference, partial(_subject, bare), setup)

    def __call__(self, task: Task) -> EvalResult | ValueError:
        needs = find_task(task.name).needs
        try:
            reference = self.reference.load() if self.reference is not None and "reference" in needs else None
            model = self.model.load()
        except ValueError as error:
            return error
        outcome = outcome_of(self.subject(model, reference), task, self.setup)
        if isinstance(outcome, ValueError) and task.name not in str(outcome):
            return ValueError(f"{task.label}: {outcome}")
        return outcome


def _subject(bare: dict[str, Any], model: PreTrainedModel, reference: PreTrainedModel | None) -> Subject:
    return Subject(model, reference=reference, **bare)
