"""Replace: a model, a method, a plan and a calibration in; the same model with low-rank linears out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import RankPlan
from eckart.calibration.moments import BlockCalibration
from eckart.compression.cuts import Cut, CutRequest, FactorRequest, cut_units
from eckart.lowrank import DecompositionError, Factored, Method, build_method
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.models.checkpoint import describe
from eckart.models.sites import Site, read_weight, replace_module
from eckart.models.units import Unit, units_of
from eckart.support.html import html_table, span
from eckart.support.progress import Track, silent
from eckart.support.sizes import num_bytes, num_params


@dataclass(frozen=True)
class SiteReport:
    """The result of compressing one site.

    Attributes:
        rank: of its factors; None where it has none, and its weight is quantised.
        losses: the method's own loss at `cuts.CURVE` ranks from 0 to full, as shares of the loss at rank 0.
        relative_error: E||W x - M xh - d||^2 / E||W x||^2 on the calibration tokens, which weigh what they weigh for
            the method; M and d as they are stored, laid out and rounded. None without second moments.
        tail: the method's own loss at this rank, in its own metric, before anything is rounded; None for a nested
            method, whose loss is the error.
            Of linears that share a right factor it is that of all of them.
        refit: whether the left factor was refit and was better on the held-out tokens; None where no refit was tried.
        note: where the linear has no influence on the calibration text, why, and how it was factored then.
        stored: in how many bits its numbers are kept, as `Storage.to_dict` has it; None for the model's type.
        tokens: of an expert's linear, the share of the calibration text's tokens that the expert is given.
        kept: share of the dense weight's numbers that are stored, in few bits of its bytes. Of linears that share a
            right factor it is that of all of them. None in a journal of an older eckart.
    """

    site: Site
    rank: int | None
    relative_error: float | None
    tail: float | None
    losses: tuple[float, ...]
    refit: bool | None = None
    note: str | None = None
    stored: dict[str, Any] | None = None
    tokens: float | None = None
    kept: float | None = None

    @property
    def name(self) -> str:
        return self.site.name

    def to_record(self) -> dict[str, Any]:
        """For a journal: every number, unrounded."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**record, "site": self.name, "losses": list(self.losses)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sites: Mapping[str, Site]) -> SiteReport:
        """The report that `to_record` wrote. sites: {name: site} of the model."""
        return cls(**{**record, "site": sites[record["site"]], "losses": tuple(record["losses"])})


@dataclass(frozen=True)
class CompressionReport:
    """The result of a compression: sizes of the whole model before and after, seconds per stage.

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

    def __repr__(self) -> str:
        return (
            f"CompressionReport({len(self.sites)} linears compressed, {len(self.dense)} as they were; parameters "
            f"{self.params_before:,} to {self.params_after:,}, bytes {self.bytes_before:,} to {self.bytes_after:,})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: a line for each role, over the blocks."""
        roles: dict[str, list[SiteReport]] = {}
        for each in self.sites:
            roles.setdefault(each.site.role, []).append(each)
        rows = []
        for role, sites in roles.items():
            ranks = [each.rank for each in sites if each.rank is not None]
            errors = [each.relative_error for each in sites if each.relative_error is not None]
            rows.append([role, len(sites), span(ranks), span(errors, ".2g")])
        return html_table(repr(self), ["role", "linears", "ranks", "relative errors"], rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "params": [self.params_before, self.params_after],
            "bytes": [self.bytes_before, self.bytes_after],
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "sites": {
                **{
                    site.name: _place(site) | {"rank": None, "kept": 1.0, "relative_error": None} for site in self.dense
                },
                **{
                    report.name: _place(report.site)
                    | {
                        "rank": report.rank,
                        "relative_error": report.relative_error,
                        "tail": report.tail,
                        **({} if report.refit is None else {"refit": report.refit}),
                        **({} if report.note is None else {"note": report.note}),
                        **({} if report.stored is None else report.stored),
                        **({} if report.kept is None else {"kept": float(f"{report.kept:.9g}")}),
                        **({} if report.tokens is None else {"tokens": float(f"{report.tokens:.6g}")}),
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
    refit: bool = False,
    turns: int = 0,
    cut: Callable[[CutRequest], Iterable[tuple[Unit, Cut]]] = cut_units,
    finished: Sequence[SiteReport] = (),
    note: Callable[[list[SiteReport]], None] | None = None,
    recipe: dict[str, Any] | None = None,
    track: Track = silent,
) -> CompressionReport:
    """Replace the planned linears of `model` by low-rank ones, in place.

    The calibration is consumed part by part and nothing of a part is kept once its sites are replaced.

    Args:
        method: of the catalogue, or its name.
        plan: of this model; sites without a rank stay as they are.
        calibration: a `Calibration`, the generator of `calibrate_by_block`, or a `SequentialCalibration`, which takes
            the moments of a part once the parts before it are replaced; None for a method that needs none.
        spectra: {Unit.name: spectrum} of this method and model. Units in it are only cut; the rest are factored and
            added, in place, so that a sweep over sizes factors each site once. Memory: all their bases.
        refit: fit the left factors once more by least squares. Where the calibration has moments of tokens held out,
            a refit that does not lower the squared output error on them is undone.
        turns: of linears that are kept as a quantised weight with factors, how often at most both are made anew, each
            for what the other leaves, as long as the method's loss falls.
        cut: makes the cuts, in place of `cut_units`; it may do so on other machines.
        finished: reports of planned sites that the calibration itself puts in place, see `runs.kept_blocks`.
        note: called with the reports of each unit that was replaced.
        recipe: written into the model's config, for the checkpoint.

    Raises:
        ValueError: the method or a refit needs statistics that the calibration lacks, or the plan is of another model.
        DecompositionError: a decomposition failed; the message names the site. The sites before it are replaced
            already, so load the model again before going on.

    Cost: per site one decomposition, see `lowrank.truncation.factor`.
    """
    if isinstance(method, str):
        method = build_method(method)
    if method.needs and calibration is None:
        raise ValueError(f"{method.name} needs {', '.join(sorted(method.needs))}: calibrate first")
    planned = plan.changed
    _check_sites(model, planned)
    before = (num_params(model), num_bytes(model))
    pending = list(units_of(planned, [group for group in plan.joint if any(s.joint_group == group for s in planned)]))
    there = {report.name for report in finished}
    pending = [unit for unit in pending if unit.sites[0].name not in there]
    seconds = {"calibrate": 0.0, "factor": 0.0}
    reports = [*finished]
    parts = _timed(calibration or _nothing(pending), seconds)

    def factored() -> Iterator[list[SiteReport]]:
        for part in parts:
            units = [unit for unit in pending if is_of(unit, part, method)]
            pending[:] = [unit for unit in pending if unit not in units]
            start = time.perf_counter()
            weight_of, bias_of = partial(Unit.weight, model=model), partial(Unit.own_bias, model=model)
            request = CutRequest(FactorRequest(method, units, part, weight_of, bias_of), plan, spectra, refit, turns)
            for unit, result in cut(request):
                yield place(model, unit, result, plan)
            seconds["factor"] += time.perf_counter() - start
            del part, request  # these moments end here, before the next ones are made

    for placed in track(factored(), "linears", len(pending)):
        reports += placed
        if note is not None:
            note(placed)
    if pending:
        raise ValueError(f"the calibration has no moments of {pending[0].name}, which the plan compresses")
    if planned:  # else the model is an ordinary dense one, and is saved as one
        describe(model, recipe or {"method": method.name, "options": method.options})
    dense = tuple(site for site in plan.sites if site not in planned)
    return CompressionReport(tuple(reports), dense, before[0], num_params(model), before[1], num_bytes(model), seconds)


def _check_sites(model: PreTrainedModel, planned: Sequence[Site]) -> None:
    """Raises ValueError where a planned site is not in the model, or has another shape."""
    modules = dict(model.named_modules())
    for site in planned:
        shape = (site.d_out, site.d_in)
        if site.name not in modules or tuple(read_weight(modules[site.name]).shape) != shape:
            raise ValueError(f"the plan has {site.name} as {site.d_out} x {site.d_in}, which is not in this model")


def _nothing(units: Iterable[Unit]) -> list[BlockCalibration]:
    """Parts without moments, a block each, for a method that needs none."""
    return [BlockCalibration(block) for block in dict.fromkeys(unit.sites[0].block for unit in units)]


def is_of(unit: Unit, part: BlockCalibration, method: Method) -> bool:
    """Whether the part has what the method needs of the unit: its block's turn, and its inputs' if any are needed."""
    site = unit.sites[0]
    return site.block == part.block and (not method.needs & INPUT_STATISTICS or site.input_group in part.inputs)


def _timed(blocks: Iterable[BlockCalibration], seconds: dict[str, float]) -> Iterator[BlockCalibration]:
    """The parts; time spent making them is added to seconds["calibrate"]."""
    iterator = iter(blocks)
    while True:
        start = time.perf_counter()
        block = next(iterator, None)
        seconds["calibrate"] += time.perf_counter() - start
        if block is None:
            return
        yield block
        del block


def place(model: PreTrainedModel, unit: Unit, cut: Cut, plan: RankPlan) -> list[SiteReport]:
    """Replace a unit's dense linears by its cut, in `model`, in place; returns a report for each of its sites.

    Raises:
        ValueError: as `Unit.modules`; the message names the unit or its site.
    """
    try:
        modules = unit.modules_of(model, cut.factors)
    except (ValueError, DecompositionError) as error:
        named = any(str(error).startswith(f"{name}: ") for name in (unit.name, *(site.name for site in unit.sites)))
        raise type(error)(str(error) if named else f"{unit.name}: {error}") from error
    for name, module in modules.items():
        replace_module(model, name, module)
    rank = plan.rank(unit.sites[0])
    nothing = (None,) * len(unit.sites)
    storage, stored, kept = plan.storage(unit.sites[0]), None, plan.kept_of(unit) / unit.num_params
    if not storage.is_plain:
        size = cast(Tensor, modules[unit.sites[0].name].weight).element_size()
        stored = storage.to_dict()
        kept = storage.num_bytes(unit.d_out, unit.d_in, rank, size) / (unit.num_params * size)
    return [
        SiteReport(site, rank, relative, cut.tail, cut.losses, cut.refit, note, stored, tokens, kept)
        for site, relative, note, tokens in zip(
            unit.sites, cut.relative_errors, cut.notes or nothing, cut.tokens or nothing, strict=True
        )
    ]
