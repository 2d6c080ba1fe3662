"""Recipe: one run as data. It holds everything that changes a number, and nothing else.

Where and how fast a run goes (device, batch size, cache, data folder) is the command line's; see `how.How`.
Its sections are in `sections`; `python tools/recipe_page.py` writes docs/recipe.md from the descriptions of the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from eckart.allocation import ALLOCATIONS, Allocation, Budget, Speed
from eckart.allocation.search.criteria import check_apart
from eckart.calibration.sequential import Order
from eckart.compression.baselines import BASELINES, build_baseline
from eckart.compression.tuning.distillation import Distillation
from eckart.compression.tuning.recovery import Recovery
from eckart.compression.tuning.refinement import Refinement
from eckart.data.mixtures import parts_of, spell_out
from eckart.evals.task import Task, check_distinct
from eckart.lowrank import Layout
from eckart.lowrank.moments import GRADIENT_STATISTICS
from eckart.lowrank.storage import GROUP
from eckart.models.loading import locate
from eckart.runs.composition import Bits, Composition, Effort
from eckart.runs.sections import (
    OWN,
    CalibrationSection,
    DistilSection,
    EvaluationSection,
    MethodSection,
    RecoverSection,
    RefineSection,
    RuleSection,
    SitesSection,
    SpeedSection,
    named_text,
)
from eckart.support.plain_data import read_yaml
from eckart.support.section import Section

S = TypeVar("S", bound=Section)

# Ways to say how large the result may be; of the cache, keep_cache says it besides.
BUDGETS = ("keep", "keep_total", "max_bytes", "speed", "rules", "plan")
# What may be done around a method. What a recipe does not say is the composition's.
AROUND = ("allocation", "layout", "order", "joint", "refit", "refine", "distil", "recover")
# What is said of a value that does not fit.
SHARE_KEPT = ": it is the share that is kept, not removed, and no percentage"
NOTES = {
    **dict.fromkeys(("keep", "keep_total", "keep_cache"), SHARE_KEPT),
    "max_bytes": ": whole bytes, such as 8000000000",
}
# Sections that a budget of this kind replaces.
DECIDED = {"rules": ("sites", "allocation"), "plan": ("sites", "allocation", "layout", "joint")}


class Recipe(Section):
    """A model, a method, an allocation, a calibration, and what to measure."""

    model: str = Field(description="a directory, a hub name, a .gguf file, an adapter's directory, or builtin")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights, in memory and in the checkpoint; auto is what the model is stored in"
    )
    method: MethodSection = Field(MethodSection(), description="what factors a linear, and what is done around that")
    effort: Effort | None = Field(
        None,
        description="how much time a composition takes. low: every linear is calibrated on the dense model; medium: in "
        f"anchored order; high: and blocks are refined; {OWN}, which is medium for best",
    )
    keep: float | None = Field(
        None, gt=0, le=1, description="budget: share kept of the numbers of the selected linears"
    )
    keep_total: float | None = Field(None, gt=0, le=1, description="budget: share kept of the whole model's numbers")
    max_bytes: int | None = Field(None, gt=0, description="budget: bytes of the weight files at most")
    speed: SpeedSection | None = Field(
        None, description="budget: speed over the dense model's on this machine; a number stands for its times"
    )
    rules: list[RuleSection] | None = Field(
        None, description="budget: shares by place; the first that matches decides, what none matches stays dense"
    )
    plan: str | None = Field(
        None, description="budget: a plan.json of `eckart inspect --save-plan`, perhaps edited by hand"
    )
    keep_cache: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="budget of the cache: share kept of the numbers that a cache of keys and values holds for a token. "
        "Keys and values then have the ranks that this allows, and the budget above is that of the other linears; "
        "without one these stay dense",
    )
    cache_group: int | None = Field(
        None,
        gt=0,
        description="with keep_cache, or a plan of such ranks: key-value heads that are factored together; default the "
        "largest divisor of their number up to 4",
    )
    sites: SitesSection = Field(SitesSection(), description="which linears are compressed; default: all in the blocks")
    allocation: Allocation | None = Field(
        None, description=f"how the budget is shared out among linears; a name in place of the section; {OWN}"
    )
    layout: Layout | None = Field(None, description=f"how factors are stored; {OWN}")
    order: Order | None = Field(
        None,
        description="what a linear is calibrated on: one-shot, the dense model's inputs; sequential, the compressed "
        f"model's; anchored, those, fit to the dense model's outputs; {OWN}",
    )
    joint: bool | None = Field(
        None, description=f"linears that read one input share a right factor where that is better; {OWN}"
    )
    refit: bool | None = Field(None, description=f"left factors are fit once more, by least squares; {OWN}")
    refine: RefineSection | None = Field(None, description=f"gradient steps on each block, or true or false; {OWN}")
    distil: DistilSection | None = Field(
        None, description=f"gradient steps on the whole model, or true or false; {OWN}"
    )
    recover: RecoverSection | None = Field(None, description="a fine-tuning of the result, or true; default: none")
    bits: Bits | None = Field(
        None,
        description="numbers of the selected linears are kept in so many bits: factors, and the weights of those that "
        "stay dense; auto goes with max_bytes and lets it choose for each linear its rank, its bits, and whether its "
        "weight is quantised and corrected by factors; default: the model's type",
    )
    group: int | None = Field(None, ge=8, description=f"with bits: numbers that share a scale; default {GROUP}")
    turns: int = Field(
        0,
        ge=0,
        description="with bits: a quantised weight and its correction are made anew up to so often, each for what the "
        "other leaves, as long as the loss falls; each takes as long again",
    )
    rank_multiple: int = Field(1, gt=0, description="every rank is a multiple of this; 32 is fast in bfloat16")
    context: int | None = Field(
        None, gt=1, description="window of calibration and text where they name none; default 2048, or the positions"
    )
    calibration: CalibrationSection = Field(CalibrationSection(), description="the text that statistics are made of")
    evaluate: list[EvaluationSection] = Field(
        default_factory=list, description="what is measured, of the dense and of the compressed model"
    )

    @model_validator(mode="before")
    @classmethod
    def _text_by_name(cls, data: Any) -> Any:
        """A calibration that is only named, and the default text, which depends on the model."""
        if not isinstance(data, dict):
            return data
        return {**data, "calibration": named_text(data.get("calibration"), data.get("model"))}

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("allocation", mode="before")
    @classmethod
    def _allocation_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("speed", mode="before")
    @classmethod
    def _speed_by_number(cls, value: Any) -> Any:
        return {"times": value} if isinstance(value, int | float) else value

    @field_validator("refine", "distil", "recover", mode="before")
    @classmethod
    def _steps_or_not(cls, value: Any) -> Any:
        return ({} if value else {"steps": 0}) if isinstance(value, bool) else value

    @field_validator("evaluate", mode="before")
    @classmethod
    def _tasks_by_name(cls, value: Any) -> Any:
        return (
            [{"task": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if self.is_baseline:
            baseline = build_baseline(self.method.name, self.method.options)
            expected = ["keep"] if baseline.needs_keep else []
            if budgets != expected:
                raise ValueError(f"{self.method.name} takes {'keep' if expected else 'no keep'}, and no other budget")
            around = [name for name in (*AROUND, "effort", "sites") if self._says(name)]
            if around:
                raise ValueError(f"{self.method.name} is no low-rank method: leave out {' and '.join(around)}")
            return self
        open_ended = self.composition.allocation.row.open_ended
        if len(budgets) != 1 and (budgets or not (open_ended or self.keep_cache is not None)):
            raise ValueError(f"give exactly one of {', '.join(BUDGETS)}, not {' and '.join(budgets) or 'none'}")
        if self.speed is not None and not self.composition.allocation.row.any_cost:
            able = [name for name, row in ALLOCATIONS.items() if row.any_cost]
            raise ValueError(
                f"speed goes with the allocations {', '.join(able)}, and {self.composition.allocation.name} counts "
                "numbers: give keep, keep_total or max_bytes"
            )
        twice = [name for by in budgets for name in DECIDED.get(by, ()) if self._says(name)]
        if twice:
            raise ValueError(f"leave out {' and '.join(twice)}: what is in {budgets[0]} decides that")
        return self

    @model_validator(mode="after")
    def _bits_fit(self) -> Recipe:
        if self.turns and self.bits is None and self.plan is None:
            raise ValueError("turns goes with bits: leave it out")
        if self.bits is None:
            if self.group is not None:
                raise ValueError("group goes with bits: leave it out")
            return self
        if self.is_baseline:
            raise ValueError(f"{self.method.name} has bits of its own: leave out bits")
        composition = self.composition
        steps = {"refine": composition.refinement, "distil": composition.distillation, "recover": composition.recovery}
        moved = [name for name, step in steps.items() if step is not None]
        if moved:
            raise ValueError(
                f"bits: gradient steps would take numbers off their codes: leave out {' and '.join(moved)}"
                + (", or give effort medium" if self.effort == "high" else "")
            )
        apart = {
            "layout: pivoted": composition.layout != "plain",
            "joint": composition.joint,
            "refit": composition.refit,
        }
        if any(apart.values()):
            raise ValueError(f"bits does not go with {' and '.join(name for name, said in apart.items() if said)}")
        if self.plan is not None or self.speed is not None:
            raise ValueError(
                f"bits does not go with {'a plan, which says them' if self.plan else 'speed'}: leave it out"
            )
        shares = composition.allocation.name == "global"
        if self.bits == "auto" and (self.max_bytes is None or not shares):
            raise ValueError("bits: auto goes with max_bytes and the allocation global, which choose them")
        if self.max_bytes is not None and not shares:
            raise ValueError("bits with max_bytes goes with the allocation global, which counts bytes")
        return self

    @model_validator(mode="after")
    def _cache_fits(self) -> Recipe:
        if not self.opens_heads:
            return self
        if self.keep_cache is None and self.plan is None:
            raise ValueError("cache_group goes with keep_cache, or with a plan of ranks by groups of heads")
        if self.keep_cache is not None and self.plan is not None:
            raise ValueError("leave out keep_cache: the plan decides those ranks; cache_group says of which groups")
        if self.is_baseline:
            raise ValueError(f"{self.method.name} is no low-rank method: leave out keep_cache")
        composition = self.composition
        apart = {
            "bits": self.bits is not None,
            "joint": composition.joint,
            "speed": self.speed is not None,
            "max_bytes": self.max_bytes is not None,
        }
        if any(apart.values()):
            said = [name for name, holds in apart.items() if holds]
            raise ValueError(f"keep_cache does not go with {' and '.join(said)}: leave it out")
        if self.keep_cache is not None and not composition.allocation.row.any_cost:
            able = [name for name, row in ALLOCATIONS.items() if row.any_cost]
            raise ValueError(
                f"keep_cache goes with the allocations {', '.join(able)}, and {composition.allocation.name} counts "
                "numbers of weights"
            )
        return self

    @model_validator(mode="after")
    def _recorded_is_fisher(self) -> Recipe:
        if self.calibration.fisher == "gathered":
            return self
        needs = frozenset() if self.is_baseline else self.composition.method.needs & GRADIENT_STATISTICS
        if not needs or "gradient_covariance" in needs:
            needed = " and ".join(sorted(needs)) or "no gradient"
            raise ValueError(
                f"fisher: recorded goes with a method that needs Fisher sums alone, as fwsvd, and {self.method.name} "
                f"needs {needed}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_of_each(self) -> Recipe:
        check_distinct(self.tasks)
        return self

    def _says(self, name: str) -> bool:
        """Whether a section, or a part of what is around the method, differs from what it is by default."""
        return getattr(self, name) != type(self).model_fields[name].get_default()

    @property
    def opens_heads(self) -> bool:
        """Whether groups of key and value heads have linears of their own, see `open_heads`."""
        return self.keep_cache is not None or self.cache_group is not None

    @property
    def only_cache(self) -> bool:
        """Whether the cache alone has a budget."""
        return self.keep_cache is not None and not any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def is_baseline(self) -> bool:
        """Whether the method is a baseline, and not low rank."""
        return self.method.name in BASELINES

    def check_makes_checkpoint(self) -> None:
        """Raises ValueError for a baseline, which is made and measured in memory."""
        if self.is_baseline:
            raise ValueError(f"{self.method.name} is a baseline: `eckart run` measures it; it makes no checkpoint")

    def check_apart(self) -> None:
        """Raises ValueError for an evaluation of what the recipe's search reads: no result is on what it was fit to."""
        allocation = None if self.is_baseline or self.keep == 1 else self.composition.allocation
        if allocation is not None and allocation.score is not None:
            check_apart(allocation.score, allocation.split, self.tasks, context=self.context)

    @property
    def composition(self) -> Composition:
        """The composition of the method's name, changed where the recipe says otherwise."""
        composition = self.method.composition(self.effort)
        own = {name: getattr(self, name) for name in ("layout", "order", "joint", "refit")}
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if self.allocation is not None:
            changes["allocation"] = self.allocation
        if self.refine is not None:
            changes["refinement"] = Refinement(self.refine.steps, self.refine.rate) if self.refine.steps else None
        if self.distil is not None:
            steps = Distillation(self.distil.steps, self.distil.rate, self.distil.batch) if self.distil.steps else None
            changes["distillation"] = steps
        if self.recover is not None:
            changes["recovery"] = Recovery(**self.recover.model_dump()) if self.recover.steps else None
        if self.bits is not None:
            # What a composition would pivot is stored plain: a pivot is a row of the weight, which has no codes.
            changes |= {"layout": self.layout or "plain", "bits": self.bits, "group": self.group or GROUP}
        if self.turns:
            changes["turns"] = self.turns
        return dataclasses.replace(composition, **changes)

    def spelled_out(self) -> Recipe:
        """The same recipe without a composition's name: its method with every setting, and what is done around it.

        A name may mean something else in a later eckart; a recipe that is kept should not. Nor should a mixture's.
        """
        if self.is_baseline:
            return self
        composition = self.composition
        decided = [name for by, names in DECIDED.items() if getattr(self, by) for name in names]
        parts: dict[str, Any] = {
            "allocation": composition.allocation.spelled_out().model_dump(exclude_none=True),
            "layout": composition.layout,
            "order": composition.order,
            "joint": composition.joint,
            "refit": composition.refit,
            "refine": {"steps": 0} if composition.refinement is None else dataclasses.asdict(composition.refinement),
            "distil": {"steps": 0}
            if composition.distillation is None
            else dataclasses.asdict(composition.distillation),
            "recover": {"steps": 0} if composition.recovery is None else dataclasses.asdict(composition.recovery),
        }
        assert parts.keys() == set(AROUND)
        return Recipe.model_validate(
            {
                **self.model_dump(exclude_none=True, exclude={"effort"}),
                "calibration": {**self.calibration.model_dump(), "corpus": spell_out(self.calibration.corpus)},
                "method": {"name": composition.method.name, "options": composition.method.options},
                **{name: value for name, value in parts.items() if name not in decided},
            }
        )

    @property
    def budget(self) -> Budget | Speed | None:
        """What the selected linears may keep or take; None where rules or a plan decide that, or nothing does."""
        if self.speed is not None:
            return Speed(self.speed.times, self.speed.rows or 1)
        if self.keep is None and self.keep_total is None and self.max_bytes is None:
            return None
        return Budget(keep=self.keep, keep_total=self.keep_total, max_bytes=self.max_bytes)

    @property
    def reads(self) -> list[str]:
        """What may be a place on this machine that a compression reads: the model, its text, a plan."""
        return [str(locate(self.model)), *parts_of(self.calibration.corpus), *([self.plan] if self.plan else [])]

    @property
    def tasks(self) -> list[Task]:
        """What to measure."""
        return [item.to_task() for item in self.evaluate]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        ValueError: no such file, not YAML, an unknown key (with the nearest known one), or a value that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    return parse_recipe(read_yaml(path), where=str(path))


def parse_recipe(data: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe in plain data. Raises ValueError as `load_recipe` does."""
    return parse_section(Recipe, data, where)


def parse_section(kind: type[S], data: dict[str, Any], where: str) -> S:
    """The section of a kind in plain data. Raises ValueError: one line with all that does not fit."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(item, kind) for item in error.errors())) from None


def _explain(item: Any, kind: type[Section]) -> str:
    """One pydantic complaint about a section of this kind in our words."""
    place = [str(step) for step in item["loc"]]
    if item["type"] == "extra_forbidden":
        known = _keys_at(place[:-1], kind)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        inside = f" in {'.'.join(place[:-1])}" if place[:-1] else ""
        return f"unknown key {place[-1]!r}{inside}; {hint}"
    message, given = item["msg"].removeprefix("Value error, "), item.get("input")
    if item["type"] != "value_error" and isinstance(given, str | int | float):
        message = f"{message}, and is {given!r}" + NOTES.get(place[-1] if place else "", "")
    return f"{'.'.join(place)}: {message}" if place else message


def _keys_at(place: list[str], kind: type[Section]) -> list[str]:
    """The known keys of the section at `place` of one of this kind."""
    section: type[BaseModel] = kind
    for step in place:
        field = section.model_fields.get(step)
        if field is None:
            continue  # a position in a list
        inner = [t for t in (field.annotation, *_arguments(field.annotation)) if isinstance(t, type)]
        section = next((t for t in inner if issubclass(t, BaseModel)), section)
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    arguments: list[Any] = []
    for argument in get_args(annotation):
        arguments += [argument, *_arguments(argument)]
    return arguments
