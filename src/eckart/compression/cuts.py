"""Cuts: units of one block factored and cut, from their weights and moments alone, on any device or machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from eckart.allocation import RankPlan
from eckart.calibration.moments import BlockCalibration
from eckart.compression.coding import code_linear
from eckart.compression.shared_by_experts import SharedByExperts, weigh_rows
from eckart.lowrank import (
    DecompositionError,
    Factored,
    Factors,
    GradientMoments,
    InputMoments,
    Method,
    Moments,
    output_error,
    refit_left,
)
from eckart.lowrank.anchor import Anchor
from eckart.lowrank.method import Prepared
from eckart.lowrank.moments import JointGradients
from eckart.lowrank.rounding import CodedFactors
from eckart.models.experts import layer_role
from eckart.models.sites import Site
from eckart.models.units import Stored, Unit

T = TypeVar("T")

# Points of a site's loss curve in the report: enough to draw it.
CURVE = 65


@dataclass(frozen=True)
class Cut:
    """A unit's factors at one rank, and their losses.

    Attributes:
        factors: as they are stored, see `Unit.stored`.
        tail: the method's own loss at this rank, in its own metric, before anything is rounded; None for a nested
            method, whose loss is the error, and of a weight that is quantised and not cut.
        losses: the method's own loss at CURVE ranks from 0 to full, as shares of the loss at rank 0; none of a weight
            that is not cut.
        relative_errors: of each of its sites, E||W x - M xh - d||^2 / E||W x||^2 on the calibration tokens, see
            `SiteReport`; None without second moments.
        refit: whether the left factor was refit and was better on the held-out tokens; None where no refit was tried.
        notes: of each of its sites, see `note_on`; empty where there is nothing to say of any.
        tokens: of each of its sites the share of the calibration text's tokens that it reads, where it is an expert's;
            None of others, and without a text.
    """

    factors: Stored
    tail: float | None
    losses: tuple[float, ...]
    relative_errors: tuple[float | None, ...]
    refit: bool | None = None
    notes: tuple[str | None, ...] = ()
    tokens: tuple[float | None, ...] = ()


def _no_bias(_unit: Unit) -> None:
    """Of a linear without one."""


@dataclass(frozen=True)
class FactorRequest:
    """Units to factor, and all that it takes.

    Attributes:
        units: of one block, those of one input group after each other, so that its root is made once.
        part: the moments of these units.
        weight_of: a unit's dense weight (d_out, d_in), called when its turn comes. It has the type that factors are
            stored in.
        bias_of: its dense bias (d_out,), or None; a cut with a bias is stored as the sum of the two.
    """

    method: Method
    units: Sequence[Unit]
    part: BlockCalibration
    weight_of: Callable[[Unit], Tensor]
    bias_of: Callable[[Unit], Tensor | None] = _no_bias


@dataclass(frozen=True)
class CutRequest:
    """Units to factor, and to cut.

    Attributes:
        plan: has the ranks.
        spectra, refit, turns: as in `compress`.
    """

    factor: FactorRequest
    plan: RankPlan
    spectra: dict[str, Factored] | None = None
    refit: bool = False
    turns: int = 0


@torch.no_grad()
def cut_units(request: CutRequest) -> Iterator[tuple[Unit, Cut]]:
    """Each unit cut at its rank, one after the other. Units of one input group share the root.

    Raises:
        ValueError, DecompositionError: as the method raises them; the message names the unit.
    """
    plan, spectra = request.plan, request.spectra
    known = {} if spectra is None else spectra
    missing = [unit for unit in request.factor.units if unit.name not in known]

    def made(unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared) -> _Made:
        inputs = moments.inputs
        if _is_coded(unit, plan):
            site = unit.sites[0]
            storage, rank, turns = plan.storage(site), plan.rank(site), request.turns
            coded, factored = code_linear(request.factor.method, weight, moments, prepared, storage, rank, turns=turns)
            return _Made(factored, coded, prepared.anchor, inputs)
        # A spectrum that is kept may be cut at any rank later on; else only at this one.
        rank = plan.rank(unit.sites[0]) if spectra is None else None
        factored = factor_unit(request.factor, unit, weight, moments, prepared, rank)
        return _Made(factored, None, prepared.anchor, inputs)

    fresh = each_prepared(replace(request.factor, units=missing), made)
    for unit in request.factor.units:
        result = _Made(known[unit.name], None, None, None) if unit.name in known else next(fresh)[1]
        if spectra is not None and result.factored is not None and result.coded is None:
            spectra[unit.name] = result.factored
        taken = _take(request, unit, result)
        del result  # of a wide linear it takes gigabytes
        yield unit, _store(request, unit, taken)
        del taken


@dataclass(frozen=True)
class _Made:
    """What was made of a unit's weight.

    Attributes:
        factored: its spectrum, None where it is quantised alone.
        coded: what is stored, of a unit that is kept in few bits.
        anchor: of its inputs.
        inputs: the moments that it was made by; None of a spectrum that was kept.
    """

    factored: Factored | None
    coded: CodedFactors | None
    anchor: Anchor | None
    inputs: InputMoments | None


def _is_coded(unit: Unit, plan: RankPlan) -> bool:
    return not plan.storage(unit.sites[0]).is_plain


@dataclass(frozen=True)
class _Taken:
    """What a unit's spectrum gave, which is not needed any more.

    Attributes:
        cut: the factors at its rank, or what is stored of a unit that is kept in few bits.
        tail, losses: see `Cut`.
        energy: see `_energy`.
        anchor: of its inputs.
        inputs: its moments; None of experts together.
        read_by_experts: those of each expert, where the spectrum has them; None where not.
    """

    cut: Factors | CodedFactors
    tail: float | None
    losses: tuple[float, ...]
    energy: float | None
    anchor: Anchor | None
    inputs: InputMoments | None
    read_by_experts: tuple[InputMoments | None, ...] | None


@contextmanager
def _naming(unit: Unit) -> Iterator[None]:
    """Inside, an error names the unit."""
    try:
        yield
    except (ValueError, DecompositionError) as error:
        named = str(error).startswith(f"{unit.name}: ")
        raise type(error)(str(error) if named else f"{unit.name}: {error}") from error


def _take(request: CutRequest, unit: Unit, made: _Made) -> _Taken:
    """Cut the unit's spectrum at its rank.

    Raises: as `cut_units`.
    """
    method, factored, rank = request.factor.method, made.factored, request.plan.rank(unit.sites[0])
    weight, inputs = request.factor.weight_of(unit), made.inputs
    if inputs is None and not unit.is_of_experts:
        inputs = _inputs_on(request.factor.part.inputs_of(unit.group), weight.device)
    cut: Factors | CodedFactors
    if made.coded is not None:
        cut = made.coded
    else:
        assert factored is not None
        assert rank is not None
        with _naming(unit):
            cut = factored.cut(rank)
    tail: float | None = None
    losses: tuple[float, ...] = ()
    energy: float | None = None
    if factored is not None and rank is not None:
        tail, losses = None if method.residual is not None else factored.tail(rank), tuple(factored.losses(CURVE))
    if factored is not None and made.coded is None and len(unit.sites) == 1:
        energy = _energy(method, factored, weight, inputs)
    read = factored.inputs if isinstance(factored, SharedByExperts) else None
    return _Taken(cut, tail, losses, energy, made.anchor, inputs, read)


def _store(request: CutRequest, unit: Unit, taken: _Taken) -> Cut:
    """What is stored of a unit, with what it lost.

    Raises: as `cut_units`.
    """
    plan, method, part, factors = request.plan, request.factor.method, request.factor.part, taken.cut
    weight, inputs = request.factor.weight_of(unit), taken.inputs
    held_out = _inputs_on(part.held_out.get(unit.group), weight.device)
    stored: Stored
    took = None
    with _naming(unit):
        if isinstance(factors, CodedFactors):
            stored = factors
        else:
            if request.refit and not unit.is_of_experts:  # theirs are fit already
                if inputs is None or inputs.keeps("covariance") is None:
                    raise ValueError(f"a refit needs second moments, and {method.name}'s calibration has none")
                factors, took = _refit(weight, factors, inputs, held_out)
            stored = unit.stored(factors, plan.layout, weight.dtype)
    rows = weight.split([site.d_out for site in unit.sites])
    read = taken.read_by_experts
    if read is None:
        read = _of_each_expert(unit, part, weight.device) if unit.is_of_experts else (inputs,) * len(rows)
    as_read = replace(stored, bias=_read_bias(stored.bias, request.factor.bias_of(unit), weight.dtype))
    errors = tuple(
        _relative_error(
            each,
            member,
            own,
            taken.energy,
            None if unit.is_of_experts else taken.anchor,
        )
        for each, member, own in zip(rows, unit.split(as_read), read, strict=True)
    )
    notes = tuple(note_on(part, site) for site in unit.sites)
    tokens = tuple(_tokens_of(part, site) for site in unit.sites)
    return Cut(stored, taken.tail, taken.losses, errors, took, notes, tokens)


def _tokens_of(part: BlockCalibration, site: Site) -> float | None:
    """The share of the text's tokens that an expert's linear reads."""
    inputs = part.inputs.get(site.input_group)
    return None if inputs is None or layer_role(site.input_group) is None else inputs.share


def factor_units(request: FactorRequest, plan: RankPlan | None = None) -> Iterator[tuple[Unit, Factored]]:
    """Each unit's spectrum, one after the other. Units of one input group share what is prepared of it.

    Args:
        plan: where the spectra will be cut at its ranks only, which is faster; None for any rank.

    Raises:
        ValueError, DecompositionError: as the method raises them; the message names the unit.
    """

    def factored(unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared) -> Factored:
        rank = None if plan is None else plan.rank(unit.sites[0])
        return factor_unit(request, unit, weight, moments, prepared, rank)

    yield from each_prepared(request, factored)


@torch.no_grad()
def tails_of_units(request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
    """Each unit's loss at every rank, (max_rank + 1,), without its spectrum, which takes three times as long; an
    expert's times its use, so that losses can be compared.

    Raises: as `factor_units`.
    """

    def tails(unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared) -> Tensor:
        if unit.is_of_experts:
            each = _of_each_expert(unit, request.part, weight.device)
            weighed = _weigh(request.method, unit, weight, each)[1]
            return request.method.tails(weighed, moments, prepared=prepared)
        return request.method.tails(weight, moments, prepared=prepared) * use_of(request.method, moments)

    yield from each_prepared(request, tails)


def factor_unit(
    request: FactorRequest, unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared, rank: int | None = None
) -> Factored:
    """A unit's spectrum; that of experts which share a right factor has left factors fit to each one's own tokens.

    Args:
        weight, moments, prepared: of the unit. rank: the only one that it will be cut at, where that is known.

    Raises: as `Method.factor`.
    """
    method, part = request.method, request.part
    if not unit.is_of_experts:
        return method.factor(weight, moments, prepared=prepared, rank=rank)
    inputs = _of_each_expert(unit, part, weight.device)
    roots, weighed = _weigh(method, unit, weight, inputs)
    spectrum = method.factor(weighed, moments, prepared=prepared, rank=rank)
    return SharedByExperts(spectrum, weight.split([site.d_out for site in unit.sites]), roots, inputs)


def _of_each_expert(unit: Unit, part: BlockCalibration, device: torch.device) -> tuple[InputMoments | None, ...]:
    """The moments of each of the experts that share a right factor.

    Cost: each is shrunk, some passes over its second moment in float64; so it is done once for a unit.
    """
    return tuple(_inputs_on(part.inputs_of(site.input_group), device) for site in unit.sites)


def _weigh(
    method: Method, unit: Unit, weight: Tensor, inputs: Sequence[InputMoments | None]
) -> tuple[tuple[float, ...], Tensor]:
    """(the root of each expert's use, the stack of their weights times it)."""
    roots = tuple(math.sqrt(use_of(method, Moments(each))) for each in inputs)
    return roots, weigh_rows(weight, [site.d_out for site in unit.sites], roots)


def use_of(method: Method, moments: Moments) -> float:
    """By what a unit's losses are to be multiplied to be those of a token of the text: an expert's are of its own.

    A loss per token of the expert counts as often as the expert is given one. Where it knows no gradient, which has the
    router's weight in it, that weight's square comes in too. Fisher sums are of whole samples, whatever is in them.
    """
    if moments.inputs is None:
        return 1.0
    return moments.inputs.share if "gradient_covariance" in method.needs else moments.inputs.use


def each_prepared(
    request: FactorRequest, work: Callable[[Unit, Tensor, Moments, Prepared], T]
) -> Iterator[tuple[Unit, T]]:
    """Each unit with the result of `work` on it, its weight, its moments, and what is prepared of them.

    Raises:
        ValueError, DecompositionError: as `work` raises them; the message names the unit.
    """
    prepared: Prepared | None = None
    group: str | None = None
    for unit, following in zip_longest(request.units, request.units[1:]):
        weight = request.weight_of(unit)
        moments = moments_of(unit, request.part, weight.device)
        try:
            if prepared is None or unit.group != group or not prepared.is_shared:
                prepared = None  # ends here, before the next one is made
                prepared, group = request.method.prepare(moments), unit.group
            results = [work(unit, weight, moments, prepared)]
        except (ValueError, DecompositionError) as error:
            raise type(error)(f"{unit.name}: {error}") from error
        del weight, moments  # a unit's gradient statistics are as large as its outputs squared
        if following is None or following.group != group:
            prepared = None
        yield unit, results.pop()  # which the caller can let go of


def note_on(part: BlockCalibration, site: Site) -> str | None:
    """What to know of a linear that has no influence on the calibration text; None of others.

    See `lowrank.truncation.factor` for how it is factored.
    """
    inputs, gradients = part.inputs.get(site.input_group), part.gradients.get(site.name)
    if inputs is not None and layer_role(site.input_group) is not None and not inputs.total:
        return "no calibration token is given to this expert; it was factored by the mean of its layer's experts"
    if inputs is not None and inputs.are_zero:
        return "its input is zero on every calibration token; it was factored as if all inputs were alike"
    if gradients is not None and gradients.are_zero:
        return "its gradient is zero on every calibration token; it was factored by its inputs alone"
    return None


def moments_of(unit: Unit, part: BlockCalibration, device: torch.device | None = None) -> Moments:
    """The moments of a unit in a part of a calibration; those of several sites are joined, as of one stacked linear.

    Args:
        device: of the unit's weight; gradients, and moments that were read from a file, are in main memory.
    """
    inputs = _inputs_on(part.inputs_of(unit.group), device)
    gradients = [
        GradientMoments.from_state(each.examples, each.tokens, _sums_on(each.sums, device))
        for each in (part.gradients_of(site.name) for site in unit.sites)
        if each is not None
    ]
    if len(gradients) < len(unit.sites):
        return Moments(inputs)
    return Moments(inputs, gradients[0] if len(gradients) == 1 else JointGradients(tuple(gradients)))


def _inputs_on(moments: InputMoments | None, device: torch.device | None) -> InputMoments | None:
    return None if moments is None else InputMoments.from_state(moments.count, _sums_on(moments.sums, device))


def _sums_on(sums: Mapping[str, Tensor], device: torch.device | None) -> dict[str, Tensor]:
    """The sums on the device; those that are there already are not copied."""
    return {name: value if device is None else value.to(device) for name, value in sums.items()}


def _refit(
    weight: Tensor, factors: Factors, inputs: InputMoments, held_out: InputMoments | None
) -> tuple[Factors, bool]:
    """(refit factors, True), or the given ones and False where the refit is no better on the held-out tokens."""
    refitted = refit_left(weight, factors, Moments(inputs))
    if held_out is not None:
        before, after = (output_error(weight, each, Moments(held_out))[0] for each in (factors, refitted))
        if after >= before:
            return factors, False
    return refitted, True


def _read_bias(bias: Tensor | None, own: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(d_out,) in float64: what a stored bias adds to the dense linear's own, with which it is rounded in one sum."""
    if bias is None:
        return None
    own = torch.zeros_like(bias, dtype=torch.float64) if own is None else own.to(bias.device).double()
    return (bias.double() + own).to(dtype).double() - own


def _energy(method: Method, factored: Factored, weight: Tensor, inputs: InputMoments | None) -> float | None:
    """E||W x||^2 where the spectrum has it already, which saves a large product; None elsewhere."""
    if inputs is None or not method.exact:
        return None
    mean = float((weight.double() @ inputs.mean).square().sum()) if method.centred else 0.0
    return factored.tail(0) + mean


def _relative_error(
    weight: Tensor,
    stored: Stored,
    inputs: InputMoments | None,
    energy: float | None,
    anchor: Anchor | None,
) -> float | None:
    """E||W x - M xh - d||^2 / E||W x||^2. The spectrum's tail is not it: rounded factors lose more than exact ones."""
    if inputs is None or inputs.keeps("covariance") is None:
        return None
    error, energy = output_error(weight, stored, Moments(inputs), energy=energy, anchor=anchor)
    return error / energy if energy > 0 else 0.0
