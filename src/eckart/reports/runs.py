"""Runs: what is in run directories, read and put in order."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, Concatenate, ParamSpec, TypeVar

from eckart.evals.result import EvalResult, SectionName, Traits, read_result, traits_of
from eckart.reports.site_facts import SiteFacts
from eckart.support.plain_data import read_json, read_yaml
from eckart.support.recipe_settings import name_of, settings_of
from eckart.support.recipe_words import size_in_words

# Methods without a share to keep. They are shown with the runs of every share.
SIZELESS = ("int8", "int4")
# Parts of a recipe that there are or are not, and settings that are written in another way, as a label has them.
PARTS = {"joint": "joint", "refit": "refit", "refine": "refined", "distil": "distilled", "recover": "recovered"}
WRITTEN = {"bits": "{} bits", "sites": "of {}"}
# How data of a wrong form shows itself where it is drawn.
DAMAGE = (TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: unique among the runs of a report.
        recipe, environment: the files of these names.
        compression: compression.json; None where it is missing.
        compressed, dense, agreement: results by task.
        missing: what the directory should hold and does not, and what was refused.
        when: the time in environment.json.
        model: the model's name as shown: its last part where that is unique.
        series: the method's name as shown, with the settings in which runs of this method differ.
    """

    directory: Path
    name: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    compression: Mapping[str, Any] | None
    compressed: Mapping[str, EvalResult]
    dense: Mapping[str, EvalResult]
    agreement: Mapping[str, EvalResult]
    missing: tuple[str, ...]
    when: datetime | None
    model: str = ""
    series: str = ""

    @property
    def method(self) -> str:
        """Its name, or that of the composition whose parts the recipe has."""
        return name_of(self.recipe)

    @property
    def keep(self) -> float | None:
        """The share asked for at every site; None for rules, plans and methods without one."""
        keep = self.recipe.get("keep")
        return None if keep is None or self.method in SIZELESS else float(keep)

    @property
    def is_dense(self) -> bool:
        """Whether it compresses nothing, and is there for the dense model's results."""
        return self.keep == 1 and self.compression is None

    @property
    def size(self) -> str | None:
        """What was asked for, in words, and of rules, plans and searches that end by themselves what it came to. None
        for a method that has one size.
        """
        if self.method in SIZELESS:
            return None
        asked, share = size_in_words(self.recipe), (self.compression or {}).get("keep_of_linears")
        if asked and not any(self.recipe.get(kind) for kind in ("rules", "plan")):
            return asked
        came_to = "" if share is None else f"{share:.2f} of linears"
        return ", ".join(filter(None, (asked, came_to))) or "size unknown"

    @property
    def corpus(self) -> str | None:
        """The corpus that it was calibrated on."""
        section = self.recipe.get("calibration")
        return section.get("corpus") if isinstance(section, Mapping) else None

    @property
    def corpora(self) -> set[str]:
        """The corpora that it was calibrated on, each by its name: the parts of a mixture."""
        named = {name.partition("*")[0] for name in re.split(r"[+,]", self.corpus or "")}
        parts = (self.compression or {}).get("calibration")
        return named | {part["corpus"] for part in parts or [] if isinstance(part, Mapping) and "corpus" in part}

    @property
    def recovery(self) -> Mapping[str, Any] | None:
        """The settings of the fine-tuning after the compression; None where there was none."""
        section = self.recipe.get("recover")
        if not isinstance(section, Mapping):
            return {} if section else None
        return None if section.get("steps") == 0 else section

    def counted(self, what: str, moment: int) -> float | None:
        """ "params" or "bytes" of the whole model before (0) and after (1)."""
        pair = (self.compression or {}).get(what)
        return None if pair is None else float(pair[moment])

    @property
    def share(self) -> float | None:
        """Share of the whole model's parameters that remain."""
        before, after = self.counted("params", 0), self.counted("params", 1)
        return None if before is None or after is None or before == 0 else after / before

    @property
    def sites(self) -> tuple[SiteFacts, ...]:
        """The sites whose place and shape are known."""
        facts = self.compression or {}
        return tuple(
            SiteFacts.of(name, item, facts)
            for name, item in _sites_of(facts).items()
            if all(item.get(key) is not None for key in ("block", "role", "shape"))
        )


@dataclass(frozen=True)
class Study:
    """study.json: the published numbers next to ours.

    Attributes:
        columns: what was measured, "perplexity:wikitext2" or "stereoset#icat.gender".
        sections: of the report, to which the columns' tasks belong.
        rows: {"label", "run", "ours", "published", "difference"}, each list as long as `columns`; perhaps
            "improvement" and "published_improvement", shares, "unmeasured", the columns for want of which there is no
            improvement, and "refusals", {task: why}.
    """

    title: str
    paper: str
    about: str
    columns: tuple[str, ...]
    sections: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Collection:
    """All runs of a report in order (model, method by name, size), and the studies that they belong to."""

    runs: tuple[Run, ...]
    studies: tuple[Study, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    def of(self, model: str) -> list[Run]:
        """The runs of one model that compress it."""
        return [run for run in self.runs if run.model == model and not run.is_dense]

    def sizes(self, model: str) -> list[str]:
        """The sizes of a model's runs, in order; "all" where no run has one."""
        return list(dict.fromkeys(run.size for run in self.of(model) if run.size is not None)) or ["all"]

    def at(self, model: str, size: str) -> list[Run]:
        """The runs of a model at one size, and those without one."""
        return [run for run in self.of(model) if run.size in (size, None)]

    def dense(self, model: str, task: str) -> EvalResult | None:
        """The dense model's result on a task, from the first run that has it."""
        return next((run.dense[task] for run in self.runs if run.model == model and task in run.dense), None)

    def dense_of(self, run: Run, task: str) -> EvalResult | None:
        """The dense model's result that a run's is to be held against: its own; where it has none, another run's of
        the same model and type, under the settings of the run's result. None where there is none.
        """
        if task in run.dense or task not in run.compressed:
            return run.dense.get(task)
        settings, kind = run.compressed[task].settings, run.recipe.get("dtype")
        return next(
            (
                other.dense[task]
                for other in self.runs
                if other.model == run.model and other.recipe.get("dtype") == kind and task in other.dense
                if other.dense[task].settings == settings
            ),
            None,
        )

    def tasks(self, section: SectionName | None = None, *, where: str = "compressed") -> list[str]:
        """Tasks of a section, or of all, in order of appearance in the results of `where`."""
        names = dict.fromkeys(task for run in self.runs for task in getattr(run, where))
        return [task for task in names if section is None or self.traits(task).section == section]

    def traits(self, task: str) -> Traits:
        """How a task's numbers are to be read, by the first result on it."""
        places = ((run.compressed, run.dense, run.agreement) for run in self.runs)
        return next(results[task].traits for place in places for results in place if task in results)


def kind_of(task: str) -> str:
    """ "perplexity" of "perplexity:wikitext2"."""
    return task.partition(":")[0]


def base_of(task: str) -> str:
    """ "lm-eval:mmlu" of "lm-eval:mmlu@5-shot", the task without its settings."""
    return task.partition("@")[0]


def naming_damage(draw: Callable[Concatenate[Collection, P], T]) -> Callable[Concatenate[Collection, P], T]:
    """Of a function that draws a collection: files of a wrong form are one error that names their run.

    What any file may hold is checked where it is read; the details of an evaluation have as many forms as there are
    evaluations, and are taken as written. Where they do not fit, each run is drawn alone to find the one.
    """

    @functools.wraps(draw)
    def named(collection: Collection, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return draw(collection, *args, **kwargs)
        except DAMAGE as error:
            for run in collection.runs:
                try:
                    draw(Collection((run,), ()), *args, **kwargs)
                except DAMAGE:
                    break
                except ValueError:
                    continue
            else:
                run = None
            place = run.directory if run else ", ".join(str(run.directory) for run in collection.runs[:3])
            raise ValueError(
                f"{place}: a file there holds what no run writes ({type(error).__name__}: {error}); remove "
                "the file and run again, or leave the run out"
            ) from error

    return named


def read_runs(directories: Sequence[Path]) -> Collection:
    """The runs in run directories and in folders of run directories, in order.

    Raises:
        ValueError: no such folder, a folder without any run, or a file that cannot be read (the message names it).
    """
    runs: list[Run] = []
    studies: list[Study] = []
    seen: set[Path] = set()
    for directory in directories:
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"no folder at {directory}")
        folders = list(_find(directory))
        if not folders:
            raise ValueError(f"{directory} holds no run: a run directory has a recipe.yaml")
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            runs.append(_read_run(folder))
        if (directory / "study.json").is_file() and (directory / "study.json").resolve() not in seen:
            seen.add((directory / "study.json").resolve())
            studies.append(_read_study(directory / "study.json"))
    if not runs:
        raise ValueError("no run to report: give at least one run directory")
    return Collection(tuple(_order(_label(_name(runs)))), tuple(studies))


def _find(folder: Path) -> Iterator[Path]:
    """Run directories at or below a folder. What is inside a run directory is its own, not another run."""
    for place, below, files in os.walk(folder):
        below.sort()
        if "recipe.yaml" in files:
            below.clear()
            yield Path(place)


def _read_run(folder: Path) -> Run:
    recipe = _read_recipe(folder / "recipe.yaml")
    environment = folder / "environment.json"
    machine = read_json(environment) if environment.is_file() else {}
    facts = folder / "model" / "compression.json"
    asked = [item["task"] if isinstance(item, Mapping) else str(item) for item in recipe.get("evaluate") or []]
    dense, compressed, agreement = _read_results(folder / "evals", asked)
    traits = {base_of(task): result.traits for task, result in (*dense.items(), *compressed.items())}
    missing = [] if environment.is_file() else ["environment.json"]
    if recipe.get("keep") != 1:
        missing += [] if facts.is_file() else ["the compressed model's compression.json"]
        missing += _lost(asked, compressed, "compressed", traits)
    missing += _lost(asked, dense, "dense", traits)
    refused = folder / "refusals.json"
    for task, reasons in (read_json(refused) if refused.is_file() else {}).items():
        missing += [f"{task} ({which}, refused: {why})" for which, why in dict(reasons).items()]
    return Run(
        directory=folder,
        name=folder.name,
        recipe=recipe,
        environment={key: value for key, value in machine.items() if key != "when"},
        compression=_check_compression(read_json(facts), facts) if facts.is_file() else None,
        compressed=compressed,
        dense=dense,
        agreement=agreement,
        missing=tuple(missing),
        when=_when(machine, environment),
    )


def _when(machine: Mapping[str, Any], file: Path) -> datetime | None:
    try:
        return datetime.fromisoformat(machine["when"]) if "when" in machine else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: 'when' is no ISO 8601 time: {error}") from error


def _read_results(
    folder: Path, asked: Sequence[str]
) -> tuple[dict[str, EvalResult], dict[str, EvalResult], dict[str, EvalResult]]:
    """Results of the dense model, of the compressed one, and of their agreement: {task: result} in the recipe's order.

    A task that was read twice, at two lengths say, is told apart by what its file's name has beyond the task's.
    """
    by_kind: dict[str, list[tuple[str, EvalResult]]] = {"dense": [], "": [], "agreement": []}
    for file in sorted(folder.glob("*.json")):
        stem, _, end = file.name.removesuffix(".json").rpartition(".")
        kind, name = (end, stem) if end in ("dense", "agreement") else ("", file.name.removesuffix(".json"))
        by_kind[kind].append((name, read_result(file)))

    def place(item: tuple[str, EvalResult]) -> int:
        task = base_of(item[1].task.removeprefix("agreement:"))
        return asked.index(task) if task in asked else len(asked)

    named: list[dict[str, EvalResult]] = []
    for results in by_kind.values():
        tasks = [result.task for _, result in results]
        named.append({})
        for name, result in sorted(results, key=place):
            plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", result.task.removeprefix("agreement:")).strip("-.")
            extra = name.removeprefix(plain).strip("-")
            twice = tasks.count(result.task) > 1 and extra
            named[-1][f"{result.task}@{extra}" if twice else result.task] = result
    return named[0], named[1], named[2]


def _lost(
    asked: Sequence[str], results: Mapping[str, EvalResult], which: str, traits: Mapping[str, Traits]
) -> list[str]:
    """The evaluations of a recipe that have no result of this model, and should.

    Args:
        traits: of the tasks that have a result of either model.
    """
    have = [base_of(result.task) for result in results.values()]
    return [
        f"{task} ({which})"
        for task in dict.fromkeys(asked)
        if traits.get(task, traits_of(task)).of in ("both", which) and have.count(task) < asked.count(task)
    ]


def _read_recipe(file: Path) -> dict[str, Any]:
    data = read_yaml(file)
    if "model" not in data:
        raise ValueError(f"{file} is no recipe: it names no model")
    evaluate = data.get("evaluate") or []
    if not isinstance(evaluate, list) or any(isinstance(item, Mapping) and "task" not in item for item in evaluate):
        raise ValueError(f"{file}: evaluate is not a list of tasks")
    return data


def _check_compression(facts: dict[str, Any], file: Path) -> dict[str, Any]:
    """The facts, if what the report reads of them has the right form."""
    for what in ("params", "bytes"):
        pair = facts.get(what)
        if pair is not None and not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))):
            raise ValueError(f"{file}: {what} is not a pair of numbers, before and after")
    for name, site in _sites_of(facts).items():
        shape = site.get("shape") if isinstance(site, Mapping) else ()
        if shape is not None and not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_width, shape))):
            raise ValueError(f"{file}: site {name} has no shape [d_out, d_in]")
        if site.get("block") is not None and not _is_number(site["block"]):
            raise ValueError(f"{file}: site {name} has block {site['block']!r}, not a number")
    return facts


def _sites_of(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sites of a compression by name; none where it only counts them, as a baseline does."""
    sites = facts.get("sites")
    return sites if isinstance(sites, Mapping) else {}


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_study(file: Path) -> Study:
    data = read_json(file)
    columns = tuple(str(column) for column in data.get("columns") or ())
    # A study that was written without them has the evaluations of that time, which are known by name.
    sections = tuple(data.get("sections") or (traits_of(column.partition("#")[0]).section for column in columns))
    if len(sections) != len(columns):
        raise ValueError(f"{file}: {len(sections)} sections for {len(columns)} columns")
    rows = tuple(data.get("rows") or ())
    for place, row in enumerate(rows):
        for key in ("ours", "published", "difference"):
            values = row.get(key) or [None] * len(columns)
            if len(values) != len(columns) or any(not isinstance(value, int | float | None) for value in values):
                raise ValueError(f"{file}: row {place} has {key} that does not fit its {len(columns)} columns")
    return Study(
        str(data.get("title") or file.parent.name),
        str(data.get("paper") or ""),
        str(data.get("about") or ""),
        columns,
        sections,
        rows,
        tuple(str(note) for note in data.get("notes") or ()),
    )


def _name(runs: list[Run]) -> list[Run]:
    """Names that are unique: as much of the path's end as that takes."""
    parts = 1
    names = [run.name for run in runs]
    while len(set(names)) < len(names) and parts < 8:
        parts += 1
        names = ["/".join(part for part in run.directory.resolve().parts[-parts:] if part != "runs") for run in runs]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _label(runs: list[Run]) -> list[Run]:
    """The runs with the names under which model and method are shown."""
    full = {str(run.recipe["model"]) for run in runs}
    short = {name: PurePath(name).name or name for name in full}
    models = {name: short[name] if list(short.values()).count(short[name]) == 1 else name for name in full}
    varied: dict[str, set[tuple[str, str]]] = {}
    for group in _groups(runs, lambda run: (run.recipe["model"], run.method)):
        settings = [settings_of(run.recipe) for run in group]
        for key in {key for setting in settings for key in setting}:
            for head in {_head(key, setting) for setting in settings}:
                having = [setting.get(key) for setting in settings if _head(key, setting) == head]
                if len({json.dumps(value, sort_keys=True, default=str) for value in having}) > 1:
                    varied.setdefault(group[0].method, set()).add((key, head))
    labelled = []
    for run in runs:
        own, differ = settings_of(run.recipe), varied.get(run.method, set())
        keys = sorted({key for key, _ in differ if (key, _head(key, own)) in differ})
        words = [word for key in keys if (word := _words(key, own.get(key)))]
        series = f"{run.method} ({', '.join(words)})" if words else run.method
        labelled.append(replace(run, model=models[str(run.recipe["model"])], series=series))
    unique: list[Run] = []
    for group in _groups(labelled, lambda run: (run.model, run.series, run.size)):
        unique += [replace(run, series=f"{run.series} [{run.name}]") for run in group] if len(group) > 1 else group
    return unique


def _groups(runs: list[Run], key: Any) -> list[list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _head(key: str, settings: Mapping[str, Any]) -> str:
    """Of a setting of a part, such as "recover.steps", what the part is: only among runs with the same does it tell
    them apart.
    """
    part, _, below = key.partition(".")
    return str(settings.get(part)) if below else ""


def _words(key: str, value: Any) -> str:
    """A setting in a label: "alpha 0.5", "corpus ptb", "pivoted", "4 bits"; nothing for a part that is not there."""
    if key in PARTS:
        return PARTS[key] if value else ""
    if key in ("allocation", "layout", "order"):
        return str(value or "")
    if key in WRITTEN:
        return WRITTEN[key].format(value) if value else ""
    return f"{key.rpartition('.')[2]} {'default' if value is None else value}"


def _order(runs: list[Run]) -> list[Run]:
    """By model, then by the names of method and series, from large to small; what has no size of its own comes last."""

    def place(run: Run) -> tuple[Any, ...]:
        size = run.keep if run.keep is not None else (run.share or 0.0)
        return (run.model, run.size is None, run.method, run.series, run.keep is None, -size, run.name)

    return sorted(runs, key=place)
