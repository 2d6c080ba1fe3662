"""Ranking: a composition's allocation carried out on its model: losses gathered, probes and searches run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import Allocation, Budget, Curve, Ranking, Speed, SpeedTable, settle
from eckart.allocation.cache import CacheBudget, num_cached
from eckart.allocation.few_bits import BASES, FACTORS, BitCurve, share_bytes
from eckart.allocation.search.criteria import Criterion, search_criterion
from eckart.allocation.search.loss_weights import probe_linears
from eckart.allocation.search.trials import SearchInputs
from eckart.calibration.moments import BlockCalibration, calibration_digest
from eckart.compression.coding import losses_in_bits
from eckart.compression.cuts import FactorRequest, each_prepared, use_of
from eckart.compression.spectra import spectra_on_demand
from eckart.data.tokens import Tokens
from eckart.lowrank import Factored, Method, Moments
from eckart.lowrank.method import Prepared
from eckart.models.sites import Site, find_sites
from eckart.models.units import Unit, units_of
from eckart.runs.composition import Composition
from eckart.runs.engine.base import Engine, SearchRequest
from eckart.runs.engine.local import HERE
from eckart.support.progress import Track, begun, silent

# Gives each unit of a request, in order, and its losses at every rank, as `Engine.losses` does.
Losses = Callable[[FactorRequest], Iterable[tuple[Unit, Tensor]]]

# A model's losses at one cut are measured on this many windows: the probes then cost a pass of them for every linear.
PROBE_SAMPLES = 16
# The calibration samples of a method that needs no text.
NO_TEXT = Tokens(torch.zeros((0, 0), dtype=torch.int64), torch.zeros((0, 0), dtype=torch.bool))


@dataclass(frozen=True)
class AllocationInputs:
    """The inputs of an allocation.

    Attributes:
        blocks: computes the dense model's moments of the selected sites anew at each call; None for a method that needs
            none.
        tokens: the calibration samples; None where nothing needs any.
        tokenizer, data, batch_size, workers, context: for scores, as in `evals.tasks.evaluate`.
        engine: where work runs.
        losses: gives each unit's losses; None for the engine's.
        journals: folder for the trials of probes and searches, which resume from there; None keeps none.
        trials: a file for the trials of a search, instead of one in `journals`.
        identity: of the model, its calibration and the method, for the header of `trials`.
        speeds: for a budget in speed, what each rank takes on this machine.
    """

    model: PreTrainedModel
    sites: tuple[Site, ...]
    blocks: Callable[[], Iterable[BlockCalibration]] | None
    tokens: Tokens | None
    tokenizer: PreTrainedTokenizerBase
    data: Path | None = None
    batch_size: int = 8
    workers: int = 1
    context: int | None = None
    engine: Engine = HERE
    losses: Losses | None = None
    journals: Path | None = None
    trials: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    speeds: SpeedTable | None = None
    track: Track = silent


def rank(
    composition: Composition,
    budget: Budget | Speed | CacheBudget | None,
    inputs: AllocationInputs,
    *,
    rank_multiple: int = 1,
    above: bool = False,
) -> Ranking:
    """The ranks of the selected sites within the budget.

    Args:
        budget: None only for an allocation that is open-ended.
        above: accept the ranks of a search that ended above the budget, instead of refusing.

    Raises:
        ValueError: as the allocation raises it; or a budget in speed that is out of reach, or without a table.

    Cost: where losses are needed every site is factored once; with probes there is a pass over some windows each. Of
    searches, see `surgical.search` and `sensitivity.measure_sensitivity`.
    """
    allocation, method, every = composition.allocation, composition.method, find_sites(inputs.model)
    joint = joint_groups(inputs.sites, every) if composition.joint else frozenset()
    row, fitting = allocation.row, {"layout": composition.layout, "rank_multiple": rank_multiple}
    numbers, options, dense = None, allocation.options, sum(site.num_params for site in inputs.sites)
    if composition.bits is not None and isinstance(budget, Budget) and budget.max_bytes is not None:
        return _rank_in_bits(composition, budget, inputs, rank_multiple)
    if isinstance(budget, Speed):
        if inputs.speeds is None:
            raise ValueError(f"{budget}: there is no table of speeds to allocate by")
        numbers = inputs.speeds.budget(
            budget, inputs.sites, joint=joint, members=row.members, rank_multiple=rank_multiple
        )
        options, dense = {**options, "cost": inputs.speeds.cost}, inputs.speeds.dense(inputs.sites)
    elif isinstance(budget, CacheBudget):
        numbers = budget.numbers(inputs.model, inputs.sites)
        options, dense = {**options, "cost": num_cached}, sum(site.d_out for site in inputs.sites)
    elif budget is not None:
        numbers = budget.numbers(
            inputs.model, inputs.sites, layout=composition.layout, joint=joint, bias=method.centred
        )
    if numbers == dense:
        return Ranking(settle(every, {site.name: None for site in inputs.sites}, layout=composition.layout))
    if row.needs == "trials":
        return _search(allocation, method, inputs, numbers, joint, fitting, above)
    facts: dict[str, Any] = {}
    units: list[Unit | Curve] = [*units_of(inputs.sites, joint)]
    if row.needs == "losses":
        units = [*measure_losses(method, inputs, joint, both=row.members)]
        if allocation.weights == "probes":
            units, facts = _weigh(units, method, inputs, joint, fitting)
    plan = row.allocate(every, units, numbers, **fitting, **options)
    return replace(plan, facts={**facts, **plan.facts}) if isinstance(plan, Ranking) else Ranking(plan, facts)


def _rank_in_bits(composition: Composition, budget: Budget, inputs: AllocationInputs, rank_multiple: int) -> Ranking:
    """Ranks and bits that keep the weight files within their bytes: see `share_bytes`."""
    method, group = composition.method, composition.group
    every = find_sites(inputs.model)
    room = budget.coded_bytes(inputs.model, inputs.sites, group=group, bias=method.centred)
    fixed = None if composition.bits == "auto" else composition.bits
    curves = measure_bit_losses(method, inputs, BASES if fixed is None else (fixed,), group)
    if fixed is not None:  # a weight that is quantised in them, or factors that are
        curves = [
            replace(each, losses={base: losses if base is None else losses[:1] for base, losses in each.losses.items()})
            for each in curves
        ]
    plan = share_bytes(
        every,
        curves,
        room,
        factors=(None, *FACTORS) if fixed is None else (fixed,),
        group=group,
        rank_multiple=rank_multiple,
        exact=composition.allocation.exact,
    )
    return Ranking(plan)


def measure_bit_losses(method: Method, inputs: AllocationInputs, bases: Sequence[int], group: int) -> list[BitCurve]:
    """What every linear loses at each rank, alone and as the correction of a weight in so many bits, block by block."""

    def measure(_unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared) -> dict[int | None, Tensor]:
        losses, use = losses_in_bits(method, weight, moments, prepared, bases, group), use_of(method, moments)
        return {base: each * use for base, each in losses.items()}

    curves = []
    for sites, part in _parts_to_measure(inputs):
        units = sorted((Unit((site,)) for site in sites), key=lambda unit: unit.group)
        request = FactorRequest(method, units, part, partial(Unit.weight, model=inputs.model))
        for unit, losses in each_prepared(request, measure):
            arrays = {base: each.double().cpu().numpy() for base, each in losses.items()}
            curves.append(BitCurve(unit.sites[0], arrays, unit.weight(inputs.model).itemsize))
    return curves


def _parts_to_measure(inputs: AllocationInputs) -> Iterator[tuple[list[Site], BlockCalibration]]:
    """Each block's moments, with its selected sites."""
    blocks = (
        inputs.blocks()
        if inputs.blocks
        else [BlockCalibration(n) for n in dict.fromkeys(s.block for s in inputs.sites)]
    )
    # With the first block come the gradients of all, which show their own progress: losses begin after them.
    for part in inputs.track(begun(blocks), "losses", len({site.block for site in inputs.sites})):
        yield [site for site in inputs.sites if site.block == part.block], part


def joint_groups(selected: Collection[Site], every: Iterable[Site]) -> frozenset[str]:
    """The groups of sites that can share a right factor, if there are several in one and all of them are selected."""
    readers: dict[str, list[Site]] = {}
    for site in every:
        readers.setdefault(site.joint_group, []).append(site)
    return frozenset(
        group for group, sites in readers.items() if len(sites) > 1 and all(site in selected for site in sites)
    )


def measure_losses(method: Method, inputs: AllocationInputs, joint: frozenset[str], *, both: bool) -> list[Curve]:
    """The loss curve of every unit, block by block; spectra are let go as soon as their losses are read.

    Args:
        both: of a joint group also the curves of its members, so that an allocation can choose.
    """
    curves: list[Curve] = []
    weight_of = partial(Unit.weight, model=inputs.model)
    for sites, part in _parts_to_measure(inputs):
        groups = [group for group in joint if any(site.joint_group == group for site in sites)]
        units = list(units_of(sites, groups))
        if both and groups:
            units += [Unit((site,)) for site in sites if site.joint_group in joint]
        # Units of one input group follow each other, so that its root is made once.
        units.sort(key=lambda unit: unit.group)
        for unit, tails in (inputs.losses or inputs.engine.losses)(FactorRequest(method, units, part, weight_of)):
            curves.append(Curve(unit.sites, tails.numpy()))
    return curves


def _weigh(
    curves: list[Unit | Curve], method: Method, inputs: AllocationInputs, joint: frozenset[str], options: dict[str, Any]
) -> tuple[list[Unit | Curve], dict[str, Any]]:
    """(the curves in nats, each weighed by a probe of its unit; facts). A member of a joint group has its own probe."""
    assert inputs.tokens is not None
    few = inputs.tokens.take(slice(PROBE_SAMPLES))
    windows = Tokens(few.ids, few.mask, mask_token=few.mask_token, split=few.split, sound=few.sound)
    weights: dict[str, float] = {}
    evaluations = 0
    identity = _identity(method, inputs)
    for groups in ((), joint) if joint else ((),):
        with inputs.engine.probing(SearchRequest(inputs.model, method, inputs.blocks, groups)) as spread:
            result = probe_linears(
                inputs.model,
                {} if spread else spectra_of(method, inputs, groups),
                windows,
                sites=[site for site in inputs.sites if not groups or site.joint_group in groups],
                joint=groups,
                journal=_journal(inputs, "probes", {**identity, "joint": sorted(groups), **options}),
                identity=identity,
                spread=spread,
                track=inputs.track,
                **options,
            )
        weights |= result.weights
        evaluations += result.evaluations
    # A linear whose cut loses nothing measurable gets the least positive weight.
    least = min((weight for weight in weights.values() if weight > 0), default=1.0)
    weighed = [replace(curve, weight=max(weights[curve.name], least)) for curve in curves if isinstance(curve, Curve)]
    return [*weighed], {"weights": weights, "evaluations": evaluations}


def _search(
    allocation: Allocation,
    method: Method,
    inputs: AllocationInputs,
    numbers: int | None,
    joint: frozenset[str],
    fitting: dict[str, Any],
    above: bool,
) -> Ranking:
    """The ranks of a search that measures the model with cuts in it."""
    criterion = make_score(allocation, inputs)
    every = find_sites(inputs.model)
    if inputs.trials is None:
        identity = {**_identity(method, inputs), **criterion.about}
    else:
        identity = {**inputs.identity, "score": criterion.about}
    named = {**identity, **fitting, "joint": sorted(joint)}
    with inputs.engine.team(SearchRequest(inputs.model, method, inputs.blocks, joint), criterion) as team:
        search_inputs = SearchInputs(
            inputs.model,
            sites=inputs.sites,
            joint=joint,
            outside=sum(site.num_params for site in every) - sum(site.num_params for site in inputs.sites),
            spectra={} if team else spectra_of(method, inputs, joint),
            score=criterion,
            better=criterion.better,
            identity=identity,
            journal=lambda kind, more: inputs.trials or _journal(inputs, kind, {**named, **more}),
            above=above,
            team=team,
            track=inputs.track,
        )
        ranking = allocation.row.allocate(every, search_inputs, numbers, **fitting, **allocation.options)
    assert isinstance(ranking, Ranking)
    return ranking


def make_score(allocation: Allocation, inputs: AllocationInputs, *, others: bool = False) -> Criterion:
    """The score of a search, on the part of its data for searching; with `others`, on the rest, to report on."""
    assert allocation.score is not None
    return search_criterion(
        allocation.score,
        inputs.model,
        inputs.tokenizer,
        split=allocation.split,
        limit=allocation.limit,
        others=others,
        data=inputs.data,
        batch_size=inputs.batch_size,
        workers=inputs.workers,
        context=inputs.context,
    )


def spectra_of(method: Method, inputs: AllocationInputs, joint: Collection[str] = ()) -> Callable[[str], Factored]:
    """Each unit's spectrum when it is asked for. The moments of all blocks are held in memory."""
    blocks = tuple(inputs.blocks()) if inputs.blocks else ()
    return spectra_on_demand(inputs.model, method, blocks, joint=joint)


def _identity(method: Method, inputs: AllocationInputs) -> dict[str, Any]:
    """What determines the spectra, for journals; empty where none are kept."""
    if inputs.journals is None:
        return {}
    return {
        "method": method.identity,
        "made of": calibration_digest(inputs.model, inputs.tokens or NO_TEXT, method.needs, inputs.sites),
    }


def _journal(inputs: AllocationInputs, kind: str, identity: dict[str, Any]) -> Path | None:
    """The file of a search's trials, named by a digest of its identity; None where none are kept."""
    if inputs.journals is None:
        return None
    inputs.journals.mkdir(parents=True, exist_ok=True)
    text = json.dumps([kind, identity], sort_keys=True, default=str)
    return inputs.journals / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"
