"""Compression: a model, a method, a plan and a calibration in; the same model with low-rank linears out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import RankPlan
from eckart.calibration import BlockCalibration
from eckart.lowrank import DecompositionError, Factored, Factors, Method, Moments, build_method, output_error
from eckart.models.checkpoint import describe
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site, read_weight, replace_module
from eckart.sizes import num_bytes, num_params
from eckart.tracking import Track, silent

# Points of a site's loss curve in the report: enough to draw it.
CURVE = 65


@dataclass(frozen=True)
class SiteReport:
    """What became of one site.

    Attributes:
        rank: of its factors.
        losses: the method's own loss at CURVE ranks from 0 to full, as shares of the loss at rank 0.
        relative_error: E||W x - M x - d||^2 / E||W x||^2 on the calibration tokens; None without second moments.
        tail: the method's own loss at this rank, in its own metric; None for a nested method, whose loss is the error.
    """

    site: Site
    rank: int
    relative_error: float | None
    tail: float | None
    losses: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.site.name


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did: sizes of the whole model before and after, seconds per stage.

    Attributes:
        sites: the low-rank ones. dense: the compressible ones that stayed as they were.
    """

    sites: tuple[SiteReport, ...]
    dense: tuple[Site, ...]
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "params": [self.params_before, self.params_after],
            "bytes": [self.bytes_before, self.bytes_after],
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "sites": {
                **{site.name: _place(site) | {"rank": None, "relative_error": None} for site in self.dense},
                **{
                    report.name: _place(report.site)
                    | {
                        "rank": report.rank,
                        "relative_error": report.relative_error,
                        "tail": report.tail,
                        "spectrum": [float(f"{loss:.4g}") for loss in report.losses],
                    }
                    for report in self.sites
                },
            },
        }


def _place(site: Site) -> dict[str, Any]:
    return {"block": site.block, "role": site.role, "part": site.part, "shape": [site.d_out, site.d_in]}


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    method: Method | str,
    plan: RankPlan,
    calibration: Iterable[BlockCalibration] | None = None,
    *,
    spectra: dict[str, Factored] | None = None,
    recipe: dict[str, Any] | None = None,
    track: Track = silent,
) -> CompressionReport:
    """Replace the planned linears of `model` by low-rank ones, in place.

    The calibration is consumed block by block and nothing of a block is kept once its sites are replaced.

    Args:
        method: of the catalogue, or its name.
        plan: of this model; sites without a rank stay as they are.
        calibration: a `Calibration`, or the generator of `calibrate_by_block`; None for a method that needs none.
        spectra: what this method made of this model's sites, by name. Sites that are in it are only cut; the others are
            factored and put in, in place, so that a sweep over sizes factors each site once. It holds all their bases.
        recipe: noted in the model's config, for the checkpoint.

    Raises:
        ValueError: the method needs statistics that the calibration lacks, or the plan is of another model.
        DecompositionError: a decomposition failed; the message names the site. The sites before it are replaced
            already, so load the model again before going on.

    Cost: per site one decomposition, see `lowrank.truncation.factor`.
    """
    if isinstance(method, str):
        method = build_method(method)
    if method.needs and calibration is None:
        raise ValueError(f"{method.name} needs {', '.join(sorted(method.needs))}: calibrate first")
    planned = [site for site in plan.sites if plan.rank(site) is not None]
    modules = dict(model.named_modules())
    for site in planned:
        if site.name not in modules or tuple(read_weight(modules[site.name]).shape) != (
            site.d_out,
            site.d_in,
        ):
            raise ValueError(f"the plan has {site.name} as {site.d_out} x {site.d_in}, which is not in this model")
    del modules
    before = (num_params(model), num_bytes(model))
    by_block: dict[int, list[Site]] = {}
    for site in planned:
        by_block.setdefault(site.block, []).append(site)
    seconds = {"calibrate": 0.0, "factor": 0.0}
    reports: list[SiteReport] = []
    blocks = _timed(calibration or [BlockCalibration(number) for number in by_block], seconds)

    def factored() -> Iterator[list[SiteReport]]:
        for block in blocks:
            start = time.perf_counter()
            chosen = by_block.pop(block.block, [])
            made = _factor_block(model, method, plan, chosen, block, spectra)
            done = list(track(made, f"block {block.block}: factors", len(chosen)))
            seconds["factor"] += time.perf_counter() - start
            del block, made  # this block's moments end here, before the next block's are made
            yield done

    for done in track(factored(), "blocks", len(by_block)):
        reports += done
    if by_block:
        raise ValueError(f"the calibration has no moments of block {min(by_block)}, which the plan compresses")
    if planned:  # else the model is an ordinary dense one, and is saved as one
        describe(model, recipe or {"method": method.name, "options": method.options})
    dense = tuple(site for site in plan.sites if plan.rank(site) is None)
    return CompressionReport(tuple(reports), dense, before[0], num_params(model), before[1], num_bytes(model), seconds)


def _timed(blocks: Iterable[BlockCalibration], seconds: dict[str, float]) -> Iterator[BlockCalibration]:
    """The blocks; time spent making them is added to seconds["calibrate"]."""
    iterator = iter(blocks)
    while True:
        start = time.perf_counter()
        block = next(iterator, None)
        seconds["calibrate"] += time.perf_counter() - start
        if block is None:
            return
        yield block
        del block


def _factor_block(
    model: PreTrainedModel,
    method: Method,
    plan: RankPlan,
    sites: list[Site],
    block: BlockCalibration,
    spectra: dict[str, Factored] | None,
) -> Iterator[SiteReport]:
    """Factor and replace the sites of one block. Sites of one input group share the root."""
    root: torch.Tensor | None = None
    group: str | None = None
    for site in sites:
        inputs = block.inputs.get(site.input_group)
        moments = Moments(inputs, block.gradients.get(site.name))
        module = model.get_submodule(site.name)
        weight = read_weight(module)
        rank = plan.rank(site)
        assert rank is not None
        factored = None if spectra is None else spectra.get(site.name)
        try:
            if factored is None:
                if site.input_group != group or method.needs_gradients:
                    root, group = method.root(moments), site.input_group
                factored = method.factor(weight, moments, root=root)
            factors = factored.cut(rank)
        except (ValueError, DecompositionError) as error:
            raise type(error)(f"{site.name}: {error}") from error
        if spectra is not None:
            spectra[site.name] = factored
        tail = None if method.residual is not None else factored.tail(rank)
        relative = _relative_error(method, factored, tail, weight, factors, moments)
        bias = module.bias.detach() if site.has_bias else None  # type: ignore[operator]
        replace_module(
            model,
            site.name,
            LowRankLinear.from_factors(factors, bias, device=weight.device, dtype=weight.dtype),
        )
        yield SiteReport(site, rank, relative, tail, tuple(factored.losses(CURVE)))


def _relative_error(
    method: Method, factored: Factored, tail: float | None, weight: Tensor, factors: Factors, moments: Moments
) -> float | None:
    """E||W x - M x - d||^2 / E||W x||^2, from the spectrum where it is there already (it saves two large products)."""
    inputs = moments.inputs
    if inputs is None or "second_moment" not in inputs.sums:
        return None
    if method.exact and tail is not None:
        error, energy = tail, factored.tail(0)
        if method.centred:
            energy += float((weight.double() @ inputs.mean.to(weight.device)).square().sum())
    else:
        error, energy = output_error(weight, factors, moments)
    return error / energy if energy > 0 else 0.0
