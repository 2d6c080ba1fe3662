"""Ranking: a composition's allocation carried out on its model: losses gathered, probes and searches run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import Allocation, Budget, Curve, Ranking, settle
from eckart.allocation.search.criteria import Criterion, search_criterion
from eckart.allocation.search.loss_weights import probe_linears
from eckart.allocation.search.trials import SearchInputs
from eckart.calibration.moments import BlockCalibration, calibration_digest
from eckart.compression.cuts import FactorRequest
from eckart.compression.spectra import spectra_on_demand
from eckart.data.tokens import Tokens
from eckart.lowrank import Factored, Method
from eckart.models.sites import Site, find_sites
from eckart.models.units import Unit, units_of
from eckart.runs.composition import Composition
from eckart.runs.engine.base import Engine, SearchRequest
from eckart.runs.engine.local import HERE
from eckart.support.progress import Track, silent

# A model's losses at one cut are measured on this many windows: the probes then cost a pass of them for every linear.
PROBE_SAMPLES = 16
# What a method is calibrated on that needs no text.
NO_TEXT = Tokens(torch.zeros((0, 0), dtype=torch.int64), torch.zeros((0, 0), dtype=torch.bool))


@dataclass(frozen=True)
class Bench:
    """What an allocation may work with.

    Attributes:
        blocks: makes the dense model's moments of the chosen sites anew each time it is called; None for a method that
            needs none.
        tokens: of the calibration; None where nothing needs any.
        tokenizer, data, batch_size, workers, context: for scores, as in `evals.tasks.evaluate`.
        engine: where it is worked out.
        journals: folder for the trials of probes and searches, which go on where they were stopped; None keeps none.
        trials: a file for the trials of a search instead, under a name of the caller's.
        made_of: what that file says of the model, its calibration and the method.
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
    journals: Path | None = None
    trials: Path | None = None
    made_of: Mapping[str, Any] = field(default_factory=dict)
    track: Track = silent


def rank(
    composition: Composition, budget: Budget | None, bench: Bench, *, rank_multiple: int = 1, above: bool = False
) -> Ranking:
    """The ranks of the chosen sites within the budget.

    Args:
        budget: None only for an allocation that is open-ended.
        above: give the ranks of a search that ended above the budget too, instead of refusing.

    Raises:
        ValueError: as the allocation raises it.

    Cost: of uniform and per-role, none. Of effective-rank and global, every site factored once; with probes, a pass
    over some windows for each. Of the searches, see `surgical.search` and `sensitivity.measure_sensitivity`.
    """
    allocation, method, every = composition.allocation, composition.method, find_sites(bench.model)
    joint = joint_groups(bench.sites, every) if composition.joint else frozenset()
    numbers = None
    if budget is not None:
        numbers = budget.numbers(bench.model, bench.sites, layout=composition.layout, joint=joint, bias=method.centred)
        if numbers == sum(site.num_params for site in bench.sites):
            return Ranking(settle(every, {site.name: None for site in bench.sites}, layout=composition.layout))
    row, fitting = allocation.row, {"layout": composition.layout, "rank_multiple": rank_multiple}
    if row.needs == "trials":
        return _search(allocation, method, bench, numbers, joint, fitting, above)
    facts: dict[str, Any] = {}
    units: list[Unit | Curve] = [*units_of(bench.sites, joint)]
    if row.needs == "losses":
        units = [*measure_losses(method, bench, joint, both=row.members)]
        if allocation.weights == "probes":
            units, facts = _weigh(units, method, bench, joint, fitting)
    plan = row.allocate(every, units, numbers, **fitting, **allocation.options)
    return replace(plan, facts={**facts, **plan.facts}) if isinstance(plan, Ranking) else Ranking(plan, facts)


def joint_groups(chosen: Collection[Site], every: Iterable[Site]) -> frozenset[str]:
    """The input groups that several sites read, if all of those are chosen."""
    readers: dict[str, list[Site]] = {}
    for site in every:
        readers.setdefault(site.input_group, []).append(site)
    return frozenset(
        group for group, sites in readers.items() if len(sites) > 1 and all(site in chosen for site in sites)
    )


def measure_losses(method: Method, bench: Bench, joint: frozenset[str], *, both: bool) -> list[Curve]:
    """The loss curve of every unit, block by block; spectra are let go as soon as their losses are read.

    Args:
        both: of a joint group also the curves of its members, so that an allocation can choose.
    """
    curves: list[Curve] = []
    weight_of = partial(Unit.weight, model=bench.model)
    blocks = (
        bench.blocks() if bench.blocks else [BlockCalibration(n) for n in dict.fromkeys(s.block for s in bench.sites)]
    )
    for part in bench.track(blocks, "losses", len({site.block for site in bench.sites})):
        sites = [site for site in bench.sites if site.block == part.block]
        groups = [group for group in joint if any(site.input_group == group for site in sites)]
        units = list(units_of(sites, groups))
        if both and groups:
            units += [Unit((site,)) for site in sites if site.input_group in joint]
        # Units of one input group follow each other, so that its root is made once.
        units.sort(key=lambda unit: unit.group)
        for unit, tails in bench.engine.losses(FactorRequest(method, units, part, weight_of)):
            curves.append(Curve(unit.sites, tails.numpy()))
    return curves


def _weigh(
    curves: list[Unit | Curve], method: Method, bench: Bench, joint: frozenset[str], options: dict[str, Any]
) -> tuple[list[Unit | Curve], dict[str, Any]]:
    """The curves in nats: each weighed by a probe of its unit. A member of a joint group has the probe of its own."""
    assert bench.tokens is not None
    windows = Tokens(
        bench.tokens.ids[:PROBE_SAMPLES], bench.tokens.mask[:PROBE_SAMPLES], mask_token=bench.tokens.mask_token
    )
    weights: dict[str, float] = {}
    evaluations = 0
    identity = _identity(method, bench)
    for groups in ((), joint) if joint else ((),):
        with bench.engine.probing(SearchRequest(bench.model, method, bench.blocks, groups)) as spread:
            result = probe_linears(
                bench.model,
                {} if spread else spectra_of(method, bench, groups),
                windows,
                sites=[site for site in bench.sites if not groups or site.input_group in groups],
                joint=groups,
                journal=_journal(bench, "probes", {**identity, "joint": sorted(groups), **options}),
                identity=identity,
                spread=spread,
                track=bench.track,
                **options,
            )
        weights |= result.weights
        evaluations += result.evaluations
    # A linear whose cut loses nothing measurable counts as little as the least that counts.
    least = min((weight for weight in weights.values() if weight > 0), default=1.0)
    weighed = [replace(curve, weight=max(weights[curve.name], least)) for curve in curves if isinstance(curve, Curve)]
    return [*weighed], {"weights": weights, "evaluations": evaluations}


def _search(
    allocation: Allocation,
    method: Method,
    bench: Bench,
    numbers: int | None,
    joint: frozenset[str],
    fitting: dict[str, Any],
    above: bool,
) -> Ranking:
    """A search that measures the model with cuts in it."""
    criterion = make_score(allocation, bench)
    every = find_sites(bench.model)
    if bench.trials is None:
        identity = {**_identity(method, bench), **criterion.about}
    else:
        identity = {**bench.made_of, "score": criterion.about}
    named = {**identity, **fitting, "joint": sorted(joint)}
    with bench.engine.team(SearchRequest(bench.model, method, bench.blocks, joint), criterion) as team:
        inputs = SearchInputs(
            bench.model,
            sites=bench.sites,
            joint=joint,
            outside=sum(site.num_params for site in every) - sum(site.num_params for site in bench.sites),
            spectra={} if team else spectra_of(method, bench, joint),
            score=criterion,
            better=criterion.better,
            identity=identity,
            journal=lambda kind, more: bench.trials or _journal(bench, kind, {**named, **more}),
            above=above,
            team=team,
            track=bench.track,
        )
        ranking = allocation.row.allocate(every, inputs, numbers, **fitting, **allocation.options)
    assert isinstance(ranking, Ranking)
    return ranking


def make_score(allocation: Allocation, bench: Bench, *, others: bool = False) -> Criterion:
    """The score of a search, on the part of its data that is for searching; or on the others, to report on."""
    assert allocation.score is not None
    return search_criterion(
        allocation.score,
        bench.model,
        bench.tokenizer,
        split=allocation.split,
        limit=allocation.limit,
        others=others,
        data=bench.data,
        batch_size=bench.batch_size,
        workers=bench.workers,
        context=bench.context,
    )


def spectra_of(method: Method, bench: Bench, joint: Collection[str] = ()) -> Callable[[str], Factored]:
    """Each unit's spectrum when it is asked for. The moments of all blocks are held in memory."""
    blocks = tuple(bench.blocks()) if bench.blocks else ()
    return spectra_on_demand(bench.model, method, blocks, joint=joint)


def _identity(method: Method, bench: Bench) -> dict[str, Any]:
    """What makes the spectra, for journals; nothing where none are kept."""
    if bench.journals is None:
        return {}
    return {
        "method": {"name": method.name, "options": method.options},
        "made of": calibration_digest(bench.model, bench.tokens or NO_TEXT, method.needs, bench.sites),
    }


def _journal(bench: Bench, kind: str, identity: dict[str, Any]) -> Path | None:
    """The file of a search's trials, named by what makes them; None where none are kept."""
    if bench.journals is None:
        return None
    bench.journals.mkdir(parents=True, exist_ok=True)
    text = json.dumps([kind, identity], sort_keys=True, default=str)
    return bench.journals / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"
