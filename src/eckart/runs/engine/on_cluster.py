"""Engine: where work runs: in this process, or on the workers of a Ray cluster. The numbers are the same.

What goes to a cluster is what can be done in parts: the moments and gradients of a dense model, over shares of the
samples; the factorisation of a block's linears; the trials of a search, each on a model of the worker's own; and
evaluations, one each. What is a walk through the model, one input group after the other (the orders sequential and
anchored, refinement), and what trains the whole model stays in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import RankPlan
from eckart.allocation.search.loss_weights import Spread
from eckart.allocation.search.trials import Score, Spectra, Team
from eckart.calibration.cache import Store
from eckart.calibration.moments import (
    BlockCalibration,
    calibrate_by_block,
    calibration_digest,
    check_readable,
    gather_gradients,
)
from eckart.compression.cuts import Cut, cut_units, factor_units
from eckart.compression.spectra import spectra_on_demand
from eckart.data.tokens import Tokens
from eckart.evals.result import EvalResult
from eckart.evals.tasks import Task, evaluate, find_task
from eckart.lowrank import Factored, GradientMoments, Method
from eckart.lowrank.moments import INPUT_STATISTICS
from eckart.models.sites import Site, find_sites
from eckart.models.units import Unit
from eckart.runs.engine.cluster import Cluster, fetch, open_cluster
from eckart.runs.engine.shares import calibrate_on, gather_on
from eckart.runs.engine.source import Source
from eckart.runs.engine.teams import CrewTeam, Scorer
from eckart.support.progress import Track, silent

ENGINES = ("local", "ray")

# Makes the moments of a model's blocks anew each time it is called; None where none are needed.
Blocks = Callable[[], Iterable[BlockCalibration]] | None


class Engine(Protocol):
    """Where work runs. What has the name of a function of eckart takes its arguments and gives its results."""

    def calibrate_by_block(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        method: Method,
        *,
        sites: Sequence[Site] | None = None,
        cache: Path | None = None,
        gradients: dict[str, GradientMoments] | None = None,
        batch_size: int = 8,
        track: Track = silent,
    ) -> Iterator[BlockCalibration]: ...

    def gather_gradients(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        method: Method,
        *,
        sites: Sequence[Site] | None = None,
        cache: Path | None = None,
        track: Track = silent,
    ) -> dict[str, GradientMoments]: ...

    def cut_units(
        self,
        method: Method,
        units: Iterable[Unit],
        plan: RankPlan,
        part: BlockCalibration,
        weight_of: Callable[[Unit], Tensor],
        *,
        spectra: dict[str, Factored] | None = None,
        refit: bool = False,
    ) -> Iterator[tuple[Unit, Cut]]: ...

    def losses(
        self, method: Method, units: Iterable[Unit], part: BlockCalibration, weight_of: Callable[[Unit], Tensor]
    ) -> Iterator[tuple[Unit, Tensor]]:
        """Each unit and its `Factored.tails`, in main memory; see `cut_units` for the arguments."""

    @contextmanager
    def team(
        self, model: PreTrainedModel, method: Method, blocks: Blocks, score: Score, joint: Collection[str] = ()
    ) -> Iterator[Team | None]:
        """Who measures a search's trials: None is the search itself. The dense model's own moments make the spectra."""

    @contextmanager
    def probing(
        self, model: PreTrainedModel, method: Method, blocks: Blocks, joint: Collection[str] = ()
    ) -> Iterator[Spread | None]:
        """Who carries out probes: None is `probe_linears` itself."""

    def outcomes(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], **given: Any
    ) -> Iterator[EvalResult | ValueError]:
        """The result of each task in order, or why it was refused. What is given besides is as in `evaluate`."""


class Here:
    """This process."""

    calibrate_by_block = staticmethod(calibrate_by_block)
    gather_gradients = staticmethod(gather_gradients)
    cut_units = staticmethod(cut_units)

    def losses(
        self, method: Method, units: Iterable[Unit], part: BlockCalibration, weight_of: Callable[[Unit], Tensor]
    ) -> Iterator[tuple[Unit, Tensor]]:
        """See `Engine`."""
        for unit, factored in factor_units(method, units, part, weight_of):
            yield unit, factored.tails().cpu()

    @contextmanager
    def team(self, *_args: Any) -> Iterator[Team | None]:
        """See `Engine`."""
        yield None

    @contextmanager
    def probing(self, *_args: Any) -> Iterator[Spread | None]:
        """See `Engine`."""
        yield None

    def outcomes(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], **given: Any
    ) -> Iterator[EvalResult | ValueError]:
        """See `Engine`."""
        for task in tasks:
            yield _outcome(model, tokenizer, task, given)


HERE = Here()


class OnCluster:
    """The workers of a cluster. They load the model themselves, from where this process has it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def calibrate_by_block(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        method: Method,
        *,
        sites: Sequence[Site] | None = None,
        cache: Path | None = None,
        gradients: dict[str, GradientMoments] | None = None,
        batch_size: int = 8,
        track: Track = silent,
    ) -> Iterator[BlockCalibration]:
        """See `Engine`. The cache is this process's, and holds the same as without a cluster."""
        needs = method.needs & INPUT_STATISTICS
        if gradients is None:
            gradients = self.gather_gradients(model, tokens, method, sites=sites, cache=cache, track=track)
        if not needs or "cross_moment" in needs:  # nothing to walk for, or refused
            yield from calibrate_by_block(model, tokens, method, sites=sites, gradients=gradients)
            return
        check_readable(model, tokens)
        sites = find_sites(model) if sites is None else sites
        store = None if cache is None else Store(cache / calibration_digest(model, tokens, needs, sites))
        walked = calibrate_on(
            self.cluster,
            Source.of(model),
            tokens,
            method,
            sites=sites,
            store=store,
            batch_size=batch_size,
            track=track,
        )
        for number, inputs in walked:
            names = [site.name for site in sites if site.block == number]
            yield BlockCalibration(number, inputs, {name: gradients[name] for name in names if name in gradients})
            del inputs

    def gather_gradients(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        method: Method,
        *,
        sites: Sequence[Site] | None = None,
        cache: Path | None = None,
        track: Track = silent,
    ) -> dict[str, GradientMoments]:
        """See `Engine`."""

        def collect(
            model: PreTrainedModel, tokens: Tokens, sites: Sequence[Site], needs: frozenset[str], *, track: Track
        ) -> dict[str, GradientMoments]:
            return gather_on(self.cluster, Source.of(model), tokens, method, sites, needs, track)

        return gather_gradients(model, tokens, method, sites=sites, cache=cache, collect=collect, track=track)

    def cut_units(
        self,
        method: Method,
        units: Iterable[Unit],
        plan: RankPlan,
        part: BlockCalibration,
        weight_of: Callable[[Unit], Tensor],
        *,
        spectra: dict[str, Factored] | None = None,
        refit: bool = False,
    ) -> Iterator[tuple[Unit, Cut]]:
        """See `Engine`. Spectra that are kept are made here; so is a lone cut that an anchored walk waits for."""
        units = list(units)
        bundles = list(_bundles(method, units, part, weight_of))
        if spectra is not None or (method.anchor is not None and len(bundles) == 1):
            yield from cut_units(method, units, plan, part, weight_of, spectra=spectra, refit=refit)
            return
        for cuts in self.cluster.spread(partial(_cut, method, plan, refit), bundles):
            yield from cuts

    def losses(
        self, method: Method, units: Iterable[Unit], part: BlockCalibration, weight_of: Callable[[Unit], Tensor]
    ) -> Iterator[tuple[Unit, Tensor]]:
        """See `Engine`."""
        bundles = list(_bundles(method, units, part, weight_of))
        for found in self.cluster.spread(partial(_losses, method), bundles):
            yield from found

    @contextmanager
    def team(
        self, model: PreTrainedModel, method: Method, blocks: Blocks, score: Score, joint: Collection[str] = ()
    ) -> Iterator[Team | None]:
        """See `Engine`."""
        make = partial(Scorer, score=score)
        with self.cluster.crew(self._with_model(model, method, blocks, joint, make)) as crew:
            yield CrewTeam(crew)

    @contextmanager
    def probing(
        self, model: PreTrainedModel, method: Method, blocks: Blocks, joint: Collection[str] = ()
    ) -> Iterator[Spread | None]:
        """See `Engine`."""

        def spread(
            make: Callable[[PreTrainedModel, Spectra], Callable[[Unit], dict[str, Any]]], units: Sequence[Unit]
        ) -> Iterator[dict[str, Any]]:
            if units:
                with self.cluster.crew(self._with_model(model, method, blocks, joint, make)) as crew:
                    yield from crew.answers(units)

        yield spread

    def outcomes(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], **given: Any
    ) -> Iterator[EvalResult | ValueError]:
        """See `Engine`. What times the model runs here, when the others are done: beside them it would time them too.

        A refusal begins with the name of its task.
        """
        reference, track = given.pop("reference", None), given.pop("track", silent)
        places = [place for place, task in enumerate(tasks) if task.kind != "cost"]
        measure = _Measuring(
            Source.of(model), tokenizer, None if reference is None else Source.of(reference), {**given, "workers": 1}
        )
        found: dict[int, EvalResult | ValueError] = {}
        with self.cluster.crew(lambda: measure, min(self.cluster.workers, max(1, len(places)))) as crew:
            made = crew.answers([tasks[place] for place in places])
            coming = zip(places, track(made, "evaluations", len(places)), strict=True)
            for place, task in enumerate(tasks):
                if task.kind == "cost":
                    found.update(coming)
                    found[place] = _outcome(model, tokenizer, task, {**given, "reference": reference, "track": track})
                while place not in found:
                    found.update([next(coming)])
                yield found.pop(place)

    def _with_model(
        self,
        model: PreTrainedModel,
        method: Method,
        blocks: Blocks,
        joint: Collection[str],
        make: Callable[[PreTrainedModel, Spectra], Callable[[Any], Any]],
    ) -> Callable[[], Callable[[Any], Any]]:
        """What a crew's worker calls: `make` on a model of its own, and its spectra out of the blocks' moments."""
        kept = {block.block: self.cluster.keep(block) for block in (blocks() if blocks else ())}
        return partial(_made, Source.of(model), method, kept, frozenset(joint), make)


@contextmanager
def open_engine(name: str = "local", *, address: str | None = None, workers: int | None = None) -> Iterator[Engine]:
    """The engine of a name of ENGINES, for the block.

    Args:
        address, workers: of a cluster, see `cluster.open_cluster`.

    Raises:
        ValueError: an unknown name, or an address for this process.
        ClusterError: as `open_cluster`.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is none of {', '.join(ENGINES)}")
    if name == "local":
        if address is not None:
            raise ValueError("an address is of a Ray cluster: add --engine ray")
        yield HERE
        return
    with open_cluster(address, workers) as cluster:
        yield OnCluster(cluster)


@dataclass(frozen=True)
class _Bundle:
    """Units that share a root, with all that cutting them takes."""

    units: tuple[Unit, ...]
    part: BlockCalibration
    weights: Mapping[str, Tensor]

    def weight(self, unit: Unit) -> Tensor:
        return self.weights[unit.name]


def _bundles(
    method: Method, units: Iterable[Unit], part: BlockCalibration, weight_of: Callable[[Unit], Tensor]
) -> Iterator[_Bundle]:
    """The units in order, by the root that they share; those of a method whose roots are no one else's, one by one."""
    alone = method.needs_gradients or method.stage.root is None
    for group, found in groupby(enumerate(units), lambda one: (one[0] if alone else 0, one[1].group)):
        members = tuple(unit for _, unit in found)
        names = {site.name for unit in members for site in unit.sites}
        inputs, held_out = (
            {name: moments for name, moments in of.items() if name == group[1]} for of in (part.inputs, part.held_out)
        )
        gradients = {name: moments for name, moments in part.gradients.items() if name in names}
        own = replace(part, inputs=inputs, gradients=gradients, held_out=held_out)
        yield _Bundle(members, own, {unit.name: weight_of(unit) for unit in members})


def _cut(method: Method, plan: RankPlan, refit: bool, bundle: _Bundle) -> list[tuple[Unit, Cut]]:
    return list(cut_units(method, bundle.units, plan, bundle.part, bundle.weight, refit=refit))


def _losses(method: Method, bundle: _Bundle) -> list[tuple[Unit, Tensor]]:
    with torch.no_grad():
        return list(HERE.losses(method, bundle.units, bundle.part, bundle.weight))


def _made(
    source: Source,
    method: Method,
    kept: Mapping[int, Any],
    joint: frozenset[str],
    make: Callable[[PreTrainedModel, Spectra], Callable[[Any], Any]],
) -> Callable[[Any], Any]:
    model = source.load_own()
    return make(model, spectra_on_demand(model, method, _Fetched(kept), joint=joint))


class _Fetched(Mapping[int, BlockCalibration]):
    """Blocks that are fetched when they are asked for; the last one is held."""

    def __init__(self, kept: Mapping[int, Any]) -> None:
        self._kept = kept
        self._last: tuple[int, BlockCalibration] | None = None

    def __getitem__(self, number: int) -> BlockCalibration:
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = (number, fetch(self._kept[number]))
        return self._last[1]

    def __contains__(self, number: object) -> bool:
        return number in self._kept

    def __iter__(self) -> Iterator[int]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


@dataclass(frozen=True)
class _Measuring:
    """What a worker does with a task."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    reference: Source | None
    given: dict[str, Any]

    def __call__(self, task: Task) -> EvalResult | ValueError:
        needs = find_task(task.name).needs
        try:
            beside = self.reference.load() if self.reference is not None and "reference" in needs else None
            model = self.source.load()
        except ValueError as error:
            return error
        found = _outcome(model, self.tokenizer, task, {**self.given, "reference": beside})
        if isinstance(found, ValueError) and task.name not in str(found):
            return ValueError(f"{task.label}: {found}")
        return found


def _outcome(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, given: Mapping[str, Any]
) -> EvalResult | ValueError:
    try:
        return evaluate(model, tokenizer, [task], **given)[0]
    except ValueError as error:
        return error
