"""Recipe: one run as data. It holds everything that changes a number, and nothing else.

Where and how fast a run goes (device, batch size, cache, data folder) is the command line's; see `pipeline.How`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from eckart.baselines import BASELINES, build_baseline
from eckart.evals.tasks import Task, find_task
from eckart.lowrank import build_method


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodSection(Section):
    """A method of the catalogue, or a baseline (int8, int4, llm-pruner), and its settings."""

    name: str = "nsvd-i"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> MethodSection:
        if self.name in BASELINES:
            build_baseline(self.name, self.options)
        else:
            build_method(self.name, self.options)
        return self


class RuleSection(Section):
    """Sites that keep a share of their parameters: see `allocation.Rule`."""

    keep: float = Field(gt=0, le=1)
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    blocks: str | None = None


class CalibrationSection(Section):
    """Which text calibrates, and how it is cut."""

    corpus: str = "wikitext2"
    split: str = "train"
    column: str | None = None
    samples: int = Field(256, gt=0)
    length: int | None = Field(None, gt=0, description="default: the context, or the model's positions if fewer")
    seed: int = 0
    cut: Literal["windows", "documents"] | None = Field(
        None, description="default: windows of a stream for decoders, documents for encoders"
    )


class EvaluationSection(Section):
    """One evaluation of the dense and of the compressed model."""

    task: str
    split: str = "test"
    column: str | None = None
    length: int | None = Field(None, gt=1)
    limit: int | None = Field(None, gt=0)
    shots: int | None = Field(None, ge=0, description="examples in front of each question; default: the task's own")
    seed: int = Field(0, description="draws those examples")
    leave_out_long: bool = Field(False, description="StereoSet: leave out what is past the model's positions")

    @model_validator(mode="after")
    def _known(self) -> EvaluationSection:
        find_task(self.task)
        return self

    def to_task(self) -> Task:
        """As `evaluate` takes it."""
        values = self.model_dump(exclude={"task"})
        return Task(self.task, **values)


class Recipe(Section):
    """A model, a method, an allocation, a calibration, and what to measure."""

    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    method: MethodSection = MethodSection()
    keep: float | None = Field(None, gt=0, le=1, description="share kept at every site; or give rules, or a plan")
    rules: list[RuleSection] | None = None
    plan: str | None = Field(None, description="a plan.json, perhaps edited by hand")
    rank_multiple: int = Field(1, gt=0)
    context: int | None = Field(
        None, gt=1, description="window of calibration and text where they name none; default 2048, or the positions"
    )
    calibration: CalibrationSection = CalibrationSection()
    evaluate: list[EvaluationSection] = Field(default_factory=list)

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("evaluate", mode="before")
    @classmethod
    def _tasks_by_name(cls, value: Any) -> Any:
        return (
            [{"task": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _one_allocation(self) -> Recipe:
        given = [name for name in ("keep", "rules", "plan") if getattr(self, name) is not None]
        if not self.is_baseline and len(given) != 1:
            raise ValueError("give exactly one of keep, rules and plan")
        if self.is_baseline:
            baseline = build_baseline(self.method.name, self.method.options)
            wanted = ["keep"] if baseline.needs_keep else []
            if given != wanted:
                raise ValueError(f"{self.method.name} takes {'keep' if wanted else 'no keep'}, no rules and no plan")
        return self

    @model_validator(mode="after")
    def _one_of_each(self) -> Recipe:
        labels = [item.to_task().label for item in self.evaluate]
        twice = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
        if twice:
            raise ValueError(f"evaluate has {twice[0]!r} twice")
        return self

    @property
    def is_baseline(self) -> bool:
        """Whether the method is a rival of low rank, and not a method of the catalogue."""
        return self.method.name in BASELINES

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
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no recipe: expected keys and values such as 'model: ...'")
    return parse_recipe(data, where=str(path))


def parse_recipe(data: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe in plain data. Raises ValueError as `load_recipe` does."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    """One pydantic complaint in our words."""
    place = [str(step) for step in item["loc"]]
    if item["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        inside = f" in {'.'.join(place[:-1])}" if place[:-1] else ""
        return f"unknown key {place[-1]!r}{inside}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{'.'.join(place)}: {message}" if place else message


def _keys_at(place: list[str]) -> list[str]:
    """The known keys of the section at `place`."""
    section: type[BaseModel] = Recipe
    for step in place:
        field = section.model_fields.get(step)
        if field is None:
            continue  # a position in a list
        inner = [t for t in (field.annotation, *_arguments(field.annotation)) if isinstance(t, type)]
        section = next((t for t in inner if issubclass(t, BaseModel)), section)
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for argument in get_args(annotation):
        found += [argument, *_arguments(argument)]
    return found
