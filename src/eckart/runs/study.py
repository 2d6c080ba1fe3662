"""Study: a published table or figure as data: its runs and numbers, at the paper's scale or a smaller one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from eckart.compression.tuning.finetuning import FineTuning
from eckart.evals.catalogue import counted_by
from eckart.runs.recipe import Recipe, parse_recipe
from eckart.support.plain_data import read_yaml
from eckart.support.recipe_words import describe
from eckart.support.section import Section

# What a limit counts: windows of a text; questions or rows; those of each member of a family such as mmlu.
Counted = Literal["windows", "documents", "members"]


class Row(Section):
    """One run of a study: recipe keys that differ from the base, and what the paper printed for it.

    Attributes:
        recipe: keys of a recipe.
        published: the paper's numbers, in the order of the study's columns; None where it printed none.
        improvement: the paper's average improvement over the baseline, as a share.
        label: what the table calls the row; default: its method and size.
    """

    recipe: dict[str, Any] = Field(default_factory=dict)
    published: list[float | None] | None = None
    improvement: float | None = None
    label: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("expected recipe keys and `published`")
        own = {"published", "improvement", "label", "recipe"}
        rest = {key: item for key, item in value.items() if key not in own}
        kept = {key: item for key, item in value.items() if key in own}
        return {**kept, "recipe": {**kept.get("recipe", {}), **rest}}


class Comparison(Section):
    """What the average improvement is relative to: recipe keys of the baseline, and the tasks that do not count."""

    baseline: dict[str, Any] = Field(default_factory=dict)
    in_domain: list[str] = Field(default_factory=list)


class FineTuningSection(Section):
    """How the models are fine-tuned before anything is done with them: see `finetuning.FineTuning`."""

    task: str
    epochs: int = Field(FineTuning.epochs, gt=0)
    batch: int = Field(FineTuning.batch, gt=0)
    rate: float = Field(FineTuning.rate, ge=0, lt=1)
    warm_up: float = Field(FineTuning.warm_up, ge=0, le=1)
    weight_decay: float = Field(FineTuning.weight_decay, ge=0)
    seed: int = FineTuning.seed
    limit: int | None = Field(None, gt=0)
    length: int | None = Field(None, gt=0)

    def to_settings(self) -> FineTuning:
        """As `fine_tune` takes it."""
        return FineTuning(**self.model_dump())


class Scale(Section):
    """What changes at another scale; see `Study.at`."""

    base: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)
    limits: dict[Counted, int] = Field(default_factory=dict)
    evaluate: list[Any] | None = None
    columns: list[str] | None = None
    runs: list[Row] | None = None
    compare: dict[str, Any] = Field(default_factory=dict)
    note: str = ""


class Study(Section):
    """A table or figure: its runs, its columns, the paper's numbers, and the scales at which it can be repeated.

    Attributes:
        base: recipe keys of every run.
        models: every run once for each of these models; default: the base's or the run's own.
        columns: what is printed: a task, or task#score.
        dense: the paper's row for the dense model.
        finetune: every model is fine-tuned first, and the runs start from the fine-tuned ones.
    """

    title: str
    paper: str = ""
    about: str = ""
    base: dict[str, Any]
    models: list[str] = Field(default_factory=list)
    finetune: FineTuningSection | None = None
    columns: list[str]
    dense: list[float | None] | None = None
    runs: list[Row] = Field(min_length=1)
    compare: Comparison | None = None
    scales: dict[str, Scale] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rows_fit_columns(self) -> Study:
        for published in (self.dense, *(row.published for row in self.runs)):
            if published is not None and len(published) != len(self.columns):
                raise ValueError(f"{len(published)} published numbers for {len(self.columns)} columns: {published}")
        return self

    def at(self, scale: str = "paper", changes: Mapping[str, Any] | None = None) -> Study:
        """The study at a scale, with changes on top; "paper" is the study as it is written.

        Its title names the scale and the models where they are not the paper's.

        A scale's `base` overrides the base and every run; its `evaluate`, `columns` and `runs` replace the study's, and
        the published numbers of other tasks or columns are dropped. A row that changes make another method or size has
        the numbers that the paper prints for that one, or none. A scale's `limits` bound evaluations and the scores of
        searches.

        Args:
            changes: {dotted recipe key: value}, such as {"model": "path", "calibration.samples": 64}; "models" is a
                list, and "finetune.epochs" and "limits.documents" are of the study. They win over everything.

        Raises:
            ValueError: an unknown scale (the message lists those there are), or fine-tuning or limits that do not fit.
        """
        if scale != "paper" and scale not in self.scales:
            raise ValueError(f"no scale {scale!r} in this study; it has paper, {', '.join(self.scales)}")
        section = self.scales.get(scale, Scale())
        overrides: dict[str, Any] = {}
        for key, value in (changes or {}).items():
            _put(overrides, key.split("."), value)
        finetune = self._finetune_at(section, overrides)
        limits = _limits_at(section, overrides)
        models = overrides.pop("models", None) or ([] if {"model"} & {*overrides, *section.base} else self.models)
        overlay = merge(section.base, overrides)
        replaced = bool(section.evaluate or section.columns)
        base = merge(self.base, overlay)
        if section.evaluate is not None:
            base["evaluate"] = section.evaluate
        base["evaluate"] = _limited(base.get("evaluate", []), limits)
        base = _limited_search(base, limits)
        runs = []
        for row in section.runs or self.runs:
            recipe = _limited_search(merge(row.recipe, overlay), limits)
            recipe.pop("evaluate", None) if replaced else None
            if "evaluate" in recipe:
                recipe["evaluate"] = _limited(recipe["evaluate"], limits)
            written = self._written(row, section.base, overrides)
            facts = {key: getattr(written, key, None) for key in ("label", "published", "improvement")}
            if replaced:
                facts |= {"published": None, "improvement": None}
            runs.append(row.model_copy(update={"recipe": recipe, **facts}))
        columns = section.columns or (
            [item if isinstance(item, str) else item["task"] for item in section.evaluate]
            if section.evaluate
            else self.columns
        )
        recipes = [merge(base, row.recipe) for row in runs]
        before = [merge(self.base, row.recipe) for row in self.runs]
        measured, named = _models(models, recipes), _models(self.models, before)
        title = self.title
        if scale != "paper" or measured != named:  # what follows the colon is of the paper's model and sizes
            shown = f"{', '.join(measured[:3])}{' and others' if len(measured) > 3 else ''}"
            title = f"{title.partition(':')[0]}, on {shown} (scale {scale})"
        compare = self.compare and self.compare.model_copy(update=section.compare)
        return self.model_copy(
            update={
                "title": title,
                "about": "\n\n".join(part.strip() for part in (section.note, self.about) if part.strip()),
                "base": base,
                "models": models,
                "finetune": finetune,
                "columns": columns,
                "dense": None if replaced else self.dense,
                "runs": runs,
                "compare": compare,
                "scales": {},
            }
        )

    def _written(self, row: Row, scale: Mapping[str, Any], changes: Mapping[str, Any]) -> Row | None:
        """The row of the study whose label and printed numbers are those of a row under changes.

        It is the row itself, unless they change how it is compressed; then the one of its model that is written that
        way, or None where there is none.
        """

        def compression(other: Row, more: Mapping[str, Any]) -> dict[str, Any]:
            return _compression(merge(merge(merge(self.base, other.recipe), scale), more))

        sought = compression(row, changes)
        same_model = [other for other in self.runs if other.recipe.get("model") == row.recipe.get("model")]
        candidates = [row, *(same_model if row in self.runs else ())]
        return next((other for other in candidates if compression(other, {}) == sought), None)

    def _finetune_at(self, scale: Scale, overrides: dict[str, Any]) -> FineTuningSection | None:
        """The fine-tuning at a scale; its changes are taken out of `overrides`, in place."""
        own = self.finetune.model_dump() if self.finetune else {}
        changes = overrides.pop("finetune", {})
        if changes is None or not (own or scale.finetune or changes):
            return None  # "finetune=null": the models as they are
        if not isinstance(changes, Mapping):
            raise ValueError(
                f"finetune: {changes!r} is no section; give finetune.epochs and the like, or null for none"
            )
        try:
            return FineTuningSection.model_validate({**own, **scale.finetune, **changes})
        except ValidationError as error:
            raise ValueError(f"finetune: {_problems(error)}") from None

    def recipes(self) -> list[tuple[str, Row, Recipe]]:
        """(name, row, recipe) of every run; rows that a scale has made the same recipe are one run.

        Raises:
            ValueError: as `parse_recipe`, with the run's name; or two different runs have one name.
        """
        by_yaml: dict[str, tuple[str, Row, Recipe]] = {}
        several = len(self.models) > 1 or len({row.recipe.get("model") for row in self.runs}) > 1
        models: list[str | None] = [*self.models] or [None]
        for model in models:
            for row in self.runs:
                data = merge(merge(self.base, row.recipe), {"model": model} if model else {})
                label = row.label or describe(data)
                if several:
                    label = f"{Path(str(data.get('model'))).name}, {label}"
                recipe = parse_recipe(data, where=label)
                by_yaml.setdefault(recipe.to_yaml(), (label, row, recipe))
        names = [label for label, *_ in by_yaml.values()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two different runs are both called {twice!r}: give each a label")
        return list(by_yaml.values())


def _compression(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say how a model is compressed: all but its model, its texts, its numbers and what is measured."""
    others = ("model", "dtype", "context", "calibration", "evaluate")
    kept = {key: value for key, value in recipe.items() if key not in others and value is not None}
    method = kept.get("method")
    return {**kept, "method": {"name": method} if isinstance(method, str) else method}


def _models(models: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of a study's models, without their owners and folders."""
    paths = models or [str(recipe.get("model")) for recipe in recipes]
    return list(dict.fromkeys(Path(path).name for path in paths))


def studies() -> dict[str, Path]:
    """{name: file} of the studies that come with eckart."""
    folder = Path(str(resources.files("eckart.runs") / "studies"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_study(name: str) -> Study:
    """A study that comes with eckart, or one in a YAML file.

    Raises:
        ValueError: no such study (with the nearest known name), not YAML, or a key or value that does not fit.
    """
    known = studies()
    path = known.get(name, Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, or a YAML file"
        raise ValueError(f"no study {name!r}; {hint}")
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` overridden by `above`, sections key by key, except a method, which is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "method":
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for step in path[:-1]:
        tree = tree.setdefault(step, {})
    tree[path[-1]] = value


def _limits_at(scale: Scale, overrides: dict[str, Any]) -> dict[str, int]:
    """How much of each task a scale reads; its changes are taken out of `overrides`, in place.

    Raises:
        ValueError: a change to another limit than there is, or to no positive number.
    """
    changes, known = overrides.pop("limits", {}), get_args(Counted)
    for name, value in changes.items() if isinstance(changes, Mapping) else [("limits", changes)]:
        if name not in known or type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} is no limit: give limits.{', limits.'.join(known)} a positive number")
    return {**scale.limits, **changes}


def _limited(items: Any, limits: Mapping[str, int]) -> list[dict[str, Any]]:
    """Evaluations with the scale's limits, unless they have their own.

    Raises:
        ValueError: they are no list of names and of sections with a task.
    """
    entries = []
    for item in items if isinstance(items, list) else [None]:
        entry = {"task": item} if isinstance(item, str) else dict(item) if isinstance(item, Mapping) else {}
        if "task" not in entry:
            raise ValueError("evaluate is not a list of tasks")
        if (limit := _limit(str(entry["task"]), limits)) is not None:
            entry.setdefault("limit", limit)
        entries.append(entry)
    return entries


def _limited_search(recipe: dict[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """A recipe whose search, where it has one, has the scale's limit of its score, unless it has its own."""
    allocation = recipe.get("allocation")
    if not isinstance(allocation, Mapping) or "score" not in allocation or "limit" in allocation:
        return recipe
    limit = _limit(str(allocation["score"]), limits)
    return recipe if limit is None else {**recipe, "allocation": {**allocation, "limit": limit}}


def _limit(task: str, limits: Mapping[str, int]) -> int | None:
    """How much of a task a scale reads."""
    counts = counted_by(task)
    return None if counts is None else limits.get(counts)
