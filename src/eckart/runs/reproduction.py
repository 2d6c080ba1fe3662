"""Reproduction: the runs of a study carried out, and its table with the paper's numbers next to ours."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eckart.compression.tuning.finetuning import NOTES, FineTuning, fine_tune
from eckart.evals.catalogue import EVALUATIONS, find_task
from eckart.evals.improvement import average_improvement
from eckart.evals.result import EvalResult, SectionName, Traits, traits_of
from eckart.runs.experiment import Measured, run
from eckart.runs.how import How
from eckart.runs.inputs import check_inputs, read_inputs
from eckart.runs.recipe import Recipe, parse_recipe
from eckart.runs.study import Row, Study, merge
from eckart.support.files import claimed, write_whole
from eckart.support.names import LONGEST, dashed, dashed_apart
from eckart.support.plain_data import read_json


@dataclass(frozen=True)
class Line:
    """One row of a study's table, all lists in the order of the columns; None where there is no number.

    Attributes:
        label: of the row.
        run: name of its run directory; None for the dense model's row.
        ours, published: numbers.
        improvement, published_improvement: average improvement over the baseline, as a share.
        unmeasured: columns that the improvement is a mean over and that lack a number, so that there is none.
        refusals: {task: why it was not measured}.
    """

    label: str
    run: str | None
    ours: list[float | None]
    published: list[float | None]
    improvement: float | None = None
    published_improvement: float | None = None
    refusals: dict[str, str] | None = None
    unmeasured: list[str] | None = None

    @property
    def difference(self) -> list[float | None]:
        """Ours minus the paper's."""
        return [None if a is None or b is None else a - b for a, b in zip(self.ours, self.published, strict=True)]


def run_study(
    study: Study, directory: Path, how: How, *, force: bool = False, keep_weights: bool = False
) -> list[Line]:
    """Carry out every run of a study at a scale (see `Study.at`), and give its table.

    The directory gets runs/<name>/ (run directories), dense/ (dense results, shared by the runs) and study.json (the
    table). Finished runs and evaluations are not repeated. An evaluation that refuses is a gap in the table, with its
    reason. Where the study fine-tunes its models, finetuned/<name>/ has them, and
    the runs start from there.

    Args:
        keep_weights: of the compressed models; a table of thirty 7B models would be 300 GB.

    Raises:
        FileExistsError: a run directory holds another recipe, or a model was fine-tuned with other settings, and
            `force` is not given.
        ValueError: a recipe that does not fit, or two runs whose names make one folder, found before anything runs; and
            what compression raises.
    """
    with claimed(directory):
        return _run_study(study, directory, how, force, keep_weights)


def _run_study(study: Study, directory: Path, how: How, force: bool, keep_weights: bool) -> list[Line]:
    planned = study.recipes()
    for _, _, recipe in planned:
        recipe.check_apart()
    _check_folders({label: slug(label) for label, *_ in planned})
    if study.finetune is not None:
        planned = fine_tune_models(planned, study.finetune.to_settings(), directory, how, force=force)
    measured: dict[str, list[Measured]] = {}
    lines: list[Line] = []
    for label, _, recipe in how.track(planned, "runs", len(planned)):
        name = slug(label)
        measured[name] = run(
            recipe,
            directory / "runs" / name,
            how,
            force=force,
            shared=directory / "dense",
            keep_going=True,
            keep_weights=keep_weights,
        )
        lines = tabulate(study, planned, measured)
        write_study(study, lines, directory)
    return lines


def fine_tune_models(
    planned: Sequence[tuple[str, Row, Recipe]], settings: FineTuning, directory: Path, how: How, *, force: bool = False
) -> list[tuple[str, Row, Recipe]]:
    """The runs, of fine-tuned models: each distinct model is fine-tuned into `directory`/finetuned/<name>.

    A model that was fine-tuned with the same settings is kept. With `force` one of other settings is fine-tuned anew,
    and all results in the directory are removed first: they are of other weights under the same name.

    Raises:
        FileExistsError: a model was fine-tuned with other settings and `force` is not given; raised before any
            training.
        ValueError: as `fine_tune` raises it; or two models whose names make one folder.
    """
    models = list(dict.fromkeys(recipe.model for _, _, recipe in planned))
    names = [slug(Path(model).name) for model in models]
    places = {
        model: directory / "finetuned" / (name if names.count(name) == 1 else slug(model))
        for model, name in zip(models, names, strict=True)
    }
    _check_folders({model: place.name for model, place in places.items()})
    missing = []
    for model, place in places.items():
        notes = place / NOTES
        facts = read_json(notes) if notes.is_file() else {}
        noted = directory / "inputs" / f"{place.name}.json"  # not in the checkpoint, which is read as a model
        inputs = read_inputs(
            parse_recipe({"model": model, "keep": 1, "evaluate": [f"probing:{settings.task}"]}), how.data
        )
        changes: list[str] = []
        if (facts.get("model"), facts.get("settings")) == (model, asdict(settings)):
            changes = check_inputs(noted, inputs)
            if not changes:
                continue
        if facts and not force:
            why = "; ".join(changes[:3]) or f"{facts['model']}, {facts['settings']}"
            raise FileExistsError(f"{place} was fine-tuned otherwise ({why}); give another place, or --force")
        if facts:
            for folder in ("runs", "dense"):
                shutil.rmtree(directory / folder, ignore_errors=True)
        missing.append(model)
        noted.unlink(missing_ok=True)
        check_inputs(noted, inputs)
    for model in how.track(missing, "models", len(missing)) if missing else ():
        fine_tune(
            model,
            places[model],
            settings,
            data=how.data,
            device=how.device,
            force=force,
            trust_remote_code=how.trust_remote_code,
            track=how.track,
        )
    return [
        (label, row, recipe.model_copy(update={"model": str(places[recipe.model])})) for label, row, recipe in planned
    ]


def tabulate(
    study: Study, planned: Sequence[tuple[str, Row, Recipe]], measured: Mapping[str, Sequence[Measured]]
) -> list[Line]:
    """The table of the runs measured so far; a dense row before the first run of each model."""
    nothing: list[float | None] = [None] * len(study.columns)
    lines: list[Line] = []
    models: list[str] = []
    for label, row, recipe in planned:
        name = slug(label)
        if name not in measured:
            continue
        if recipe.model not in models:
            models.append(recipe.model)
            lines.append(
                Line(
                    f"{Path(recipe.model).name}, dense",
                    None,
                    [read(measured[name], column, dense=True) for column in study.columns],
                    study.dense if study.dense and len(models) == 1 else nothing,
                )
            )
        refusals = {
            item.task.label: "; ".join(dict.fromkeys(item.refusals.values()))
            for item in measured[name]
            if item.refusals
        }
        improvement, unmeasured = _improvement(study, label, recipe, planned, measured)
        lines.append(
            Line(
                label,
                name,
                [read(measured[name], column) for column in study.columns],
                row.published or nothing,
                improvement,
                row.improvement,
                refusals,
                unmeasured,
            )
        )
    return lines


def read(measured: Sequence[Measured], column: str, *, dense: bool = False) -> float | None:
    """The number of a column, "task" or "task#score", in a run; None where the run has none."""
    result = result_of(measured, column, dense=dense)
    return None if result is None else result.read(column.partition("#")[2] or None)


def result_of(measured: Sequence[Measured], column: str, *, dense: bool = False) -> EvalResult | None:
    """The result that a column reads, in a run; None where the run has none."""
    task = column.partition("#")[0]
    kind, _, inner = task.partition(":")
    for item in measured:
        if kind == "agreement" and item.task.name == inner:
            return None if dense else item.agreement
        if item.task.name == task:
            of_dense = dense or find_task(task).traits.of == "dense"
            return item.dense if of_dense else item.compressed
    return None


def _improvement(
    study: Study,
    label: str,
    recipe: Recipe,
    planned: Sequence[tuple[str, Row, Recipe]],
    measured: Mapping[str, Sequence[Measured]],
) -> tuple[float | None, list[str]]:
    """This run's average improvement over the study's baseline at the same size, in scores that are compared by ratio.

    It is a mean over all columns of such scores out of domain, as the paper's is. Where some were not measured, of the
    run or of its baseline, there is none, and they are named: a mean over the others is another number.

    None for the baseline itself, for a run without a counterpart, and for a study without such a column.
    """
    if study.compare is None:
        return None, []
    try:
        baseline = parse_recipe(merge(recipe.model_dump(exclude_none=True), study.compare.baseline))
    except ValueError:
        return None, []  # a rival of one size has no keep, which the baseline needs
    counterpart = next(
        (other for other, _, candidate in planned if candidate == baseline and slug(other) in measured), None
    )
    if counterpart is None or counterpart == label:
        return None, []
    outside = [
        column
        for column in study.columns
        if "#" not in column and column not in study.compare.in_domain and traits_at(column).ratio
    ]
    ours, theirs = (
        {column: value for column in outside if (value := read(measured[slug(name)], column)) is not None}
        for name in (label, counterpart)
    )
    unmeasured = [column for column in outside if column not in ours or column not in theirs]
    return (average_improvement(ours, theirs) if outside and not unmeasured else None), unmeasured


def write_study(study: Study, lines: Sequence[Line], directory: Path) -> None:
    """study.json, the table for the report and for machines; it appears whole or not at all."""
    data = {
        "title": study.title,
        "paper": study.paper,
        "about": study.about,
        "columns": study.columns,
        "sections": [_section(column) for column in study.columns],
        **({} if study.finetune is None else {"finetune": study.finetune.model_dump()}),
        "rows": [
            {
                "label": line.label,
                "run": line.run,
                "ours": line.ours,
                "published": line.published,
                "difference": line.difference,
                "improvement": line.improvement,
                "published_improvement": line.published_improvement,
                "refusals": line.refusals or {},
                **({"unmeasured": line.unmeasured} if line.unmeasured else {}),
            }
            for line in lines
        ],
    }
    write_whole(directory / "study.json", json.dumps(data, indent=2, ensure_ascii=False))


def _section(column: str) -> SectionName:
    """The part of the report that a column's task belongs to."""
    return traits_at(column).section


def traits_at(column: str) -> Traits:
    """How the numbers of a column's task are to be read."""
    task = column.partition("#")[0]
    kind = task.partition(":")[0]
    return EVALUATIONS[kind].traits if kind in EVALUATIONS else traits_of(task)


def _check_folders(folders: Mapping[str, str]) -> None:
    """Raises ValueError where two of {what: its folder's name} have one folder."""
    owners: dict[str, str] = {}
    for what, folder in folders.items():
        if folder in owners:
            raise ValueError(f"{owners[folder]!r} and {what!r} would share the folder {folder}: give one another name")
        owners[folder] = what


def slug(label: str) -> str:
    """A folder name: with dashes for what stands between words, and a digest where more than that became a dash."""
    name = dashed(label)
    usual = 0 < len(name) <= LONGEST and re.fullmatch(r"[A-Za-z0-9_.=\- ,()%/:;]+", label)
    return name if usual else dashed_apart(label)
