"""Correction: a low-rank term beside each linear of a quantised model, cut from what quantising took away.

    M = Q + L R,   minimise over rank(L R) <= r:   E || A (W x - (Q + L R) xh) ||^2

W is the reference's weight, Q the quantised one, x what the linear reads in the reference and xh what it reads in the
quantised model with the corrections before it. One-shot takes xh = x, and L R is the cut of W - Q in the metric of the
inputs: LQER (Zhang et al., arXiv 2402.02446) with a diagonal one, QERA (Zhang et al., arXiv 2410.06040, its exact
solution) and EoRA (Liu et al., arXiv 2410.21271) with the whole second moment. Anchored cuts T - Q, T = W X Gh^-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation.knapsack import Item, solve
from eckart.calibration.moments import BlockCalibration, calibrate_by_block, gather_gradients
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.cuts import FactorRequest, each_prepared, note_on
from eckart.compression.replace import is_of
from eckart.data.tokens import Tokens
from eckart.lowrank import Factors, GradientMoments, Method, Moments, build_method, method_options, output_error
from eckart.lowrank.anchor import Anchor
from eckart.lowrank.bands import bands
from eckart.lowrank.catalogue import anchored
from eckart.lowrank.method import Prepared
from eckart.models.corrected import CorrectedLinear
from eckart.models.families import UnsupportedModelError
from eckart.models.quantised import differing_sites, quantised_weight
from eckart.models.sites import Site, default_sites, replace_module
from eckart.models.units import Unit
from eckart.support.html import span
from eckart.support.progress import Track, silent

# Who gets which rank: the same for all, or a knapsack over the losses of all.
Ranks = Literal["uniform", "global"]
# What a linear is calibrated on: see `correct`, and `calibration.sequential.Order`.
CorrectionOrder = Literal["one-shot", "anchored"]


@dataclass(frozen=True)
class SiteCorrection:
    """The correction of one linear.

    Attributes:
        factors: left and right as they are stored; None for one that gets no rank.
        before, after: E||W x - M xh||^2 / E||W x||^2 on the calibration tokens with M = Q, and with M = Q + L R as it
            is stored. Of a method that reads no text ||W - M||^2 / ||W||^2.
        note: where the linear has no influence on the calibration text, why.
    """

    site: Site
    factors: Factors | None
    before: float
    after: float
    note: str | None = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else self.factors.rank

    @property
    def num_params(self) -> int:
        return 0 if self.factors is None else self.factors.num_params


@dataclass(frozen=True)
class Correction:
    """The corrections of a quantised model.

    Attributes:
        sites: those that were quantised. unchanged: selected ones whose weight is the reference's.
        method: as it factored them. order, allocation: see `correct`.
    """

    sites: tuple[SiteCorrection, ...]
    unchanged: tuple[Site, ...]
    method: Method
    order: CorrectionOrder
    allocation: Ranks

    def __repr__(self) -> str:
        ranks = span(each.rank for each in self.sites)
        linears = f"{len(self.factors)} of {len(self.sites)} linears"
        return f"Correction({linears}, ranks {ranks}, {self.num_params:,} numbers)"

    @property
    def factors(self) -> dict[str, Factors]:
        """{name of a linear: its factors}, of those that have any."""
        return {each.name: each.factors for each in self.sites if each.factors is not None}

    @property
    def num_params(self) -> int:
        """Numbers in all factors."""
        return sum(each.num_params for each in self.sites)

    @property
    def num_bytes(self) -> int:
        """Bytes of these numbers."""
        return sum(each.left.nbytes + each.right.nbytes for each in self.factors.values())

    @property
    def bits_a_weight(self) -> float:
        """Bits that the corrections add to each weight of the quantised linears."""
        return 8 * self.num_bytes / sum(each.site.num_params for each in self.sites)

    @property
    def errors(self) -> tuple[float, float]:
        """The mean of the linears' relative errors, before and after."""
        count = len(self.sites)
        return sum(each.before for each in self.sites) / count, sum(each.after for each in self.sites) / count

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": {"name": self.method.name, "options": self.method.options},
            "order": self.order,
            "allocation": self.allocation,
            "params": self.num_params,
            "bytes": self.num_bytes,
            "bits_a_weight": self.bits_a_weight,
            "relative_error": list(self.errors),
            "sites": {
                each.name: {
                    "shape": [each.site.d_out, each.site.d_in],
                    "rank": each.rank,
                    "before": each.before,
                    "after": each.after,
                    **({} if each.note is None else {"note": each.note}),
                }
                for each in self.sites
            },
            "unchanged": [site.name for site in self.unchanged],
        }


def correction_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """A method of the catalogue as a correction takes it: without a bias, which an adapter does not hold.

    Raises:
        ValueError: as `build_method`; or the method is nothing without its bias.
    """
    known = method_options(name)
    method = build_method(name, {**({"bias": False} if "bias" in known else {}), **(options or {})})
    if method.centred:
        raise ValueError(
            f"{method.name} fits a bias, which an adapter does not hold; give asvd-i, kfac or svd"
            + (", or leave out bias=true" if "bias" in known else "")
        )
    return method


@torch.no_grad()
def correct(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokens: Tokens | None = None,
    *,
    rank: int,
    method: Method | str = "asvd-i",
    order: CorrectionOrder = "anchored",
    allocation: Ranks = "uniform",
    sites: Sequence[Site] | None = None,
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
    batch_size: int = 8,
    track: Track = silent,
) -> Correction:
    """Correct the linears of a quantised model by low-rank terms, in place, calibrated on its dense reference.

    `models.adapters.write_lora` writes the result as an adapter for the quantised model.

    Args:
        model: quantised; weights that are torchao tensors, or ordinary numbers as those of a GGUF file that was
            multiplied out. Its corrected linears become `CorrectedLinear`s.
        reference: the model that it was quantised from; it stays as it is.
        tokens: calibration samples; None for a method that needs none.
        rank: of every linear, at most its smaller width; with allocation "global" what the budget is made of.
        method: of the catalogue, or its name; without a bias.
        order: "one-shot" takes the reference's inputs; "anchored" the quantised and corrected model's inputs with the
            reference's outputs as target, block by block.
        allocation: "uniform" gives all linears `rank`; "global" the ranks which together store as many numbers and
            lose the least on the reference's inputs, by the method's own measure, among them none at all.
        sites: of the reference, those to correct; default all. One whose weight is the reference's is passed over.
        dtype: of the factors; default the reference's where it has 16 bits, else bfloat16, whose rounding is a
            thousandth of what is corrected.
        cache: as in `calibrate_by_block`, for the reference's moments.

    Raises:
        ValueError: a setting, shapes or names that do not fit the reference (names the linear), no linear that
            differs from the reference, a text that is needed and missing; or as the calibration and the method raise
            it.
        UnsupportedModelError: the reference is no dense model, or a quantised weight cannot be read.

    Cost: as a compression by the method in its order; "global" factors each linear once more, and reads the text once
    more unless there is a cache.
    """
    method = correction_method(method) if isinstance(method, str) else method
    _check(rank, order, allocation, method, tokens)
    selected = default_sites(reference) if sites is None else tuple(sites)
    differing = differing_sites(model, reference, selected)
    if not differing:
        raise UnsupportedModelError(
            f"none of the {len(selected)} linears differs from the reference's: there is nothing to correct. Is the "
            "model quantised, and the reference the one before?"
        )
    if method.needs:  # errors are measured by it
        method = replace(method, needs=method.needs | {"second_moment"})
    work = _Work(model, reference, method, differing, tokens, cache, batch_size, track)
    work.gather()
    ranks = {site.name: min(rank, site.d_in, site.d_out) for site in differing}
    if allocation == "global":
        ranks = _share(work.tails(), sum(rank_cost(site) * ranks[site.name] for site in differing))
        if not any(ranks.values()):
            raise ValueError(
                f"by {method.name} no linear loses anything that a correction could take back: calibrate on another "
                "text, or give allocation uniform"
            )
    dtype = dtype or (reference.dtype if reference.dtype.itemsize == 2 else torch.bfloat16)
    if order == "anchored" and method.needs:
        method = anchored(method)
    corrected = work.cut(method, ranks, dtype)
    unchanged = tuple(site for site in selected if site not in differing)
    return Correction(tuple(corrected[site.name] for site in differing), unchanged, method, order, allocation)


def _check(rank: int, order: CorrectionOrder, allocation: Ranks, method: Method, tokens: Tokens | None) -> None:
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1")
    if order not in get_args(CorrectionOrder):
        raise ValueError(f"order {order!r} is none of {', '.join(get_args(CorrectionOrder))}")
    if allocation not in get_args(Ranks):
        raise ValueError(f"allocation {allocation!r} is none of {', '.join(get_args(Ranks))}")
    if method.centred:
        raise ValueError(f"{method.name} fits a bias, which an adapter does not hold; give asvd-i, kfac or svd")
    if method.needs and tokens is None:
        raise ValueError(f"{method.name} is calibrated: give tokens, or a method that needs none, such as svd")


def rank_cost(site: Site) -> int:
    """Numbers that one rank of a linear's correction stores."""
    return site.d_in + site.d_out


def _share(tails: dict[Site, Tensor], budget: int) -> dict[str, int]:
    """{linear: rank}, 0 among them, that store at most `budget` numbers together and lose the least."""
    items = [
        Item(site.name, np.arange(len(losses)) * rank_cost(site), losses.double().cpu().numpy())
        for site, losses in tails.items()
    ]
    choices = solve(items, budget).choices
    return {item.name: choice for item, choice in zip(items, choices, strict=True)}


@dataclass
class _Work:
    """A correction in the making.

    Attributes:
        sites: those that are quantised.
        gradients: of the reference, once they are gathered.
    """

    model: PreTrainedModel
    reference: PreTrainedModel
    method: Method
    sites: tuple[Site, ...]
    tokens: Tokens | None
    cache: Path | None
    batch_size: int
    track: Track
    gradients: dict[str, GradientMoments] | None = None

    def gather(self) -> None:
        """The gradients that the method needs."""
        if self.tokens is not None and self.method.needs_gradients:
            self.gradients = gather_gradients(
                self.reference, self.tokens, self.method, sites=self.sites, cache=self.cache, track=self.track
            )

    def tails(self) -> dict[Site, Tensor]:
        """What each linear loses at every rank of its correction, on the reference's inputs."""

        def tails(unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared) -> Tensor:
            return self.method.tails(weight, moments, prepared=prepared, base=self._quantised(unit, weight))

        measured = self._each(self.method, tails, self._one_shot())
        return {unit.sites[0]: losses for unit, losses in self.track(measured, "losses", len(self.sites))}

    def cut(self, method: Method, ranks: dict[str, int], dtype: torch.dtype) -> dict[str, SiteCorrection]:
        """Every linear's correction at its rank, put in place in the model as soon as it is made."""

        def cut(unit: Unit, weight: Tensor, moments: Moments, prepared: Prepared) -> SiteCorrection:
            site, base, rank = unit.sites[0], self._quantised(unit, weight), ranks[unit.name]
            error = partial(_relative_error, weight, base, moments, prepared.anchor)
            before = error(_nothing(site, weight.device))
            if rank == 0:
                return SiteCorrection(site, None, before, before)
            factored = method.factor(weight, moments, prepared=prepared, rank=rank, base=base)
            factors = factored.cut(rank).balanced().to(dtype)
            if not bool(torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all()):
                raise ValueError(f"its factors are not finite in {dtype}; give another dtype")
            return SiteCorrection(site, factors, before, error(factors))

        if method.anchor is None:
            parts: Iterable[BlockCalibration] = self._one_shot()
        else:
            assert self.tokens is not None
            parts = SequentialCalibration(
                self.model,
                self.tokens,
                method,
                sites=self.sites,
                gradients=self.gradients or {},
                reference=self.reference,
                judged=False,
                batch_size=self.batch_size,
                track=self.track,
            )
        corrected = {}
        made = self._each(method, cut, parts)
        for unit, correction in self.track(made, "linears", len(self.sites)):
            corrected[unit.name] = correction
            if correction.factors is not None:
                base = self.model.get_submodule(unit.name)
                factors = correction.factors
                place = next(base.parameters()).device
                on_device = Factors(factors.left.to(place), factors.right.to(place))
                replace_module(self.model, unit.name, CorrectedLinear(base, on_device))
        return corrected

    def _quantised(self, unit: Unit, weight: Tensor) -> Tensor:
        return quantised_weight(self.model, unit.sites[0]).to(weight.device)

    def _one_shot(self) -> Iterable[BlockCalibration]:
        """The reference's moments, block by block; parts without any for a method that needs none."""
        if self.tokens is None or not self.method.needs:
            return [BlockCalibration(block) for block in dict.fromkeys(site.block for site in self.sites)]
        return calibrate_by_block(
            self.reference,
            self.tokens,
            self.method,
            sites=self.sites,
            cache=self.cache,
            gradients=self.gradients or {},
            batch_size=self.batch_size,
            track=self.track,
        )

    def _each(
        self,
        method: Method,
        work: Callable[[Unit, Tensor, Moments, Prepared], Any],
        parts: Iterable[BlockCalibration],
    ) -> Iterable[tuple[Unit, Any]]:
        """Each linear, once its moments are there, with the result of `work` on it."""
        pending = [Unit((site,)) for site in self.sites]
        for part in parts:
            now = [unit for unit in pending if is_of(unit, part, method)]
            pending = [unit for unit in pending if unit not in now]
            now.sort(key=lambda unit: unit.group)
            for unit, result in each_prepared(
                FactorRequest(method, now, part, partial(Unit.weight, model=self.reference)), work
            ):
                if isinstance(result, SiteCorrection):
                    result = replace(result, note=note_on(part, unit.sites[0]))
                yield unit, result
        if pending:
            raise ValueError(f"the calibration has no moments of {pending[0].name}, which is to be corrected")


def _nothing(site: Site, device: torch.device) -> Factors:
    """The correction of rank 0."""
    return Factors(torch.zeros(site.d_out, 0, device=device), torch.zeros(0, site.d_in, device=device))


def _relative_error(weight: Tensor, base: Tensor, moments: Moments, anchor: Anchor | None, factors: Factors) -> float:
    """The squared error of Q + L R as a share of the output's square on the calibration tokens, or of the weight's."""
    if moments.inputs is None:
        error = energy = 0.0
        for place in bands(*weight.shape):
            rows = weight[place].double()
            energy += float(rows.square().sum())
            error += float((rows - base[place].double() - factors.rows(place)).square().sum())
    else:
        error, energy = output_error(weight, factors, moments, anchor=anchor, base=base)
    return error / energy if energy > 0 else math.inf if error > 0 else 0.0
