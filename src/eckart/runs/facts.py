"""Facts: how a model was compressed and how large it is, as a checkpoint's compression.json holds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eckart.allocation import PlanSummary, RankPlan, slow_settings
from eckart.calibration.cache import read_making
from eckart.calibration.sequential import PassReport
from eckart.compression.replace import CompressionReport
from eckart.lowrank import Layout
from eckart.models.loading import locate
from eckart.runs.recipe import Recipe
from eckart.support.files import GRADIENTS
from eckart.support.plain_data import read_json

# In a checkpoint's directory.
FACTS = "compression.json"


@dataclass(frozen=True)
class Facts:
    """What compression.json holds. A field that an older eckart did not write has a default.

    Attributes:
        layout: how factors are stored. joint: input groups whose linears share a right factor.
        slow: the plan's settings that are expected to be no faster than dense, in words.
        sites_low_rank, sites_dense, keep_of_linears, keep_of_planned, keep_of_model, file_bytes, macs_per_token: see
            `PlanSummary`.
        params, bytes: [before, after], of the models in memory.
        seconds: {stage: seconds}.
        sites: {linear: its place, rank and losses}, see `CompressionReport.to_dict`.
        passes: see `PassReport`.
        speed: where the budget was a speed, what was asked for and what the table makes of the plan, see
            `SpeedTable.facts`.
        fisher: where recorded Fisher sums come from; None where they were not recorded.
        calibration: the texts that were calibrated on, with samples and tokens of each, see `Tokens.parts`.
        origin: of a model that was made of a GGUF file or of an adapter, what `describe_origin` says and "files", the
            digest of every file it was made of; None of a plain checkpoint.
        no_bias: where a composition left its bias out, why, see `settle_bias`.
        cache: where keys and values were cut for a cache, see `cache_facts`.
    """

    layout: Layout
    joint: list[str]
    slow: list[str]
    sites_low_rank: int
    sites_dense: int
    keep_of_linears: float
    keep_of_model: float
    params: list[int]
    file_bytes: list[int]
    macs_per_token: list[int]
    bytes: list[int]
    seconds: dict[str, float]
    sites: dict[str, dict[str, Any]]
    passes: list[dict[str, Any]] = field(default_factory=list)
    fisher: dict[str, Any] | None = None
    keep_of_planned: float | None = None
    speed: dict[str, Any] | None = None
    calibration: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] | None = None
    no_bias: str | None = None
    cache: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        plan: RankPlan,
        summary: PlanSummary,
        report: CompressionReport,
        passes: Sequence[PassReport] = (),
        speed: dict[str, Any] | None = None,
        calibration: Sequence[dict[str, Any]] = (),
        origin: dict[str, Any] | None = None,
        no_bias: str | None = None,
        cache: dict[str, Any] | None = None,
    ) -> Facts:
        """The facts of a finished compression. Parameters are counted in the model, not the plan's forecast."""
        planned = {key: value for key, value in asdict(summary).items() if key != "params"}
        recorded = recipe.calibration.fisher == "recorded"
        return cls(
            layout=plan.layout,
            joint=sorted(plan.joint),
            slow=list(slow_settings(plan)),
            passes=[asdict(each) for each in passes],
            fisher=read_making(Path(locate(recipe.model)) / GRADIENTS) if recorded else None,
            speed=speed,
            calibration=list(calibration),
            origin=origin,
            no_bias=no_bias,
            cache=cache,
            **planned,
            **report.to_dict(),
        )

    def to_json(self) -> str:
        """The file's text."""
        omitted = [name for name in ("fisher", "speed", "origin", "no_bias", "cache") if getattr(self, name) is None]
        return json.dumps({key: value for key, value in asdict(self).items() if key not in omitted}, indent=2)

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """Of a checkpoint.

        Raises:
            ValueError: there is no compression.json, or it lacks something.
        """
        file = folder / FACTS
        try:
            data = read_json(file)
            known = {each.name for each in fields(cls)}
            return cls(**{key: value for key, value in data.items() if key in known})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} does not say how the model was compressed: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """The outcome of a compression.

    Attributes:
        recipe: with every default filled in.
        seconds: {stage: seconds}, loading and saving included.
        passes: the reports of passes over a block or over the model.
        allocation: facts that were measured for the plan.
    """

    recipe: Recipe
    plan: RankPlan
    summary: PlanSummary
    report: CompressionReport
    seconds: dict[str, float]
    passes: tuple[PassReport, ...] = ()
    allocation: dict[str, Any] = field(default_factory=dict)
