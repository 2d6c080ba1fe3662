"""Experiment: a recipe carried out in a run directory, both models measured, resumed where it was stopped."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.compression.baselines import build_baseline
from eckart.data.mixtures import parts_of
from eckart.evals.agreement import agreement, has_answers
from eckart.evals.catalogue import find_task
from eckart.evals.distance import LinearErrors
from eckart.evals.result import EvalResult, read_result, write_result
from eckart.evals.similarity import Activations, read_activations
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.lowrank import DecompositionError
from eckart.models.loading import load_model, load_tokenizer, locate, weights_on_disk
from eckart.models.remote_code import carries_code
from eckart.models.sites import common_blocks, input_groups
from eckart.runs.calibration_errors import calibration_errors
from eckart.runs.calibration_text import make_tokens
from eckart.runs.card import write_card
from eckart.runs.engine.base import EvaluationRequest
from eckart.runs.engine.local import HERE
from eckart.runs.facts import FACTS, Facts
from eckart.runs.how import How
from eckart.runs.in_memory import make_baseline, make_checkpoint
from eckart.runs.inputs import INPUTS, Inputs, check_inputs, digest_inputs, names_in, read_inputs
from eckart.runs.recipe import Recipe, load_recipe
from eckart.support.files import claimed, write_whole
from eckart.support.plain_data import read_json

WEIGHTS = "*.safetensors"
# In a run directory: the recipe of the model in it.
MADE = "made.yaml"


@dataclass(frozen=True)
class Measured:
    """The results of one task: the dense model's, the compressed one's, and how the two agree.

    None where the evaluation is of the other model only, or where it was refused (`refusals` says why).
    """

    task: Task
    dense: EvalResult | None = None
    compressed: EvalResult | None = None
    agreement: EvalResult | None = None
    refusals: dict[str, str] = field(default_factory=dict)


def run(
    recipe: Recipe,
    directory: Path,
    how: How,
    *,
    force: bool = False,
    shared: Path | None = None,
    keep_going: bool = False,
    keep_weights: bool = True,
) -> list[Measured]:
    """Carry out a whole recipe in a run directory, and go on where a killed run stopped.

    The directory gets recipe.yaml (as given), inputs.json (a digest of every file that was read), environment.json,
    model/ (see `make_checkpoint`; of a baseline only its facts), made.yaml (the recipe of that model), and of each task
    evals/<task>.json of the compressed model, <task>.dense.json of the dense one and <task>.agreement.json of the two.
    Files that exist are not made again. A recipe that keeps everything (keep 1) compresses nothing, and only the dense
    model is measured.

    Args:
        shared: folder of dense results that several runs share, named by model, task and settings.
        keep_going: an evaluation that refuses, or a compression that fails, is noted in refusals.json and the run goes
            on; otherwise it stops.
        keep_weights: otherwise the compressed model's weight files are removed once it is measured, and made again when
            needed.

    Raises:
        FileExistsError: the directory holds a run of another recipe, or of other files at the same places (the message
            names them), and `force` is not given.
        ValueError: as the stages raise it; an unknown task, and one that would be measured on what the recipe's search
            reads, are found before anything runs.
    """
    recipe.check_apart()
    if recipe.is_baseline and not keep_going:
        build_baseline(recipe.method.name, recipe.method.options).check()
    with claimed(directory):
        return _run(recipe, directory, how, force, shared, keep_going, keep_weights)


def _run(
    recipe: Recipe, directory: Path, how: How, force: bool, shared: Path | None, keep_going: bool, keep_weights: bool
) -> list[Measured]:
    inputs = read_inputs(recipe, how.data)
    _claim(directory, recipe, inputs, force)
    write_whole(directory / "environment.json", json.dumps(environment(), indent=2))
    models = _Models(recipe, directory / "model", how)
    results = _Results(directory / "evals", shared, recipe, inputs)
    refusals: dict[str, dict[str, str]] = {task.label: {} for task in recipe.tasks}

    def measure(which: str) -> list[EvalResult | None]:
        by_place = {
            place: results.read(task, which)
            for place, task in enumerate(recipe.tasks)
            if find_task(task.name).traits.of in ("both", which)
        }
        missing = [place for place, result in by_place.items() if result is None]
        for place, outcome in zip(
            missing, models.evaluate([recipe.tasks[place] for place in missing], which), strict=True
        ):
            task = recipe.tasks[place]
            if isinstance(outcome, EvalResult):
                results.write(outcome, task, which)
                by_place[place] = outcome
            elif keep_going:
                refusals[task.label][which] = str(outcome)
            else:
                raise outcome
        return [by_place.get(place) for place in range(len(recipe.tasks))]

    dense = measure("dense")
    compressed: list[EvalResult | None] = [None] * len(dense)
    if recipe.keep == 1:
        compressed = dense
    else:
        try:
            models.compress()
        except (ValueError, DecompositionError) as error:
            if not keep_going:
                raise
            for reasons in refusals.values():
                reasons["compressed"] = f"the model was not compressed: {error}"
        else:
            compressed = measure("compressed")
    measured = []
    for task, before, after in zip(recipe.tasks, dense, compressed, strict=True):
        both = None
        if recipe.keep != 1 and before and after and has_answers(before) and has_answers(after):
            both = agreement(before, after)
            write_result(both, directory / "evals" / f"{task.slug}.agreement.json")
        measured.append(Measured(task, before, after, both, refusals[task.label]))
    _note_refusals(directory, {label: reasons for label, reasons in refusals.items() if reasons})
    _write_card(directory / "model", measured)
    if not keep_weights:
        for file in (directory / "model").glob(WEIGHTS):
            file.unlink()
    return measured


def _write_card(model: Path, measured: Sequence[Measured]) -> None:
    """The checkpoint's README with the results in it; nothing where there is no checkpoint."""
    if not (model / "config.json").is_file():
        return
    pairs = [(item.dense, item.compressed) for item in measured if item.dense and item.compressed]
    config, recipe, facts = read_json(model / "config.json"), load_recipe(model / "recipe.yaml"), Facts.read(model)
    kind = config["architectures"][0]
    text = write_card(recipe, facts, pairs, architecture=kind, remote_code=carries_code(config))
    write_whole(model / "README.md", text)


def _claim(directory: Path, recipe: Recipe, inputs: Inputs, force: bool) -> None:
    """Make the directory this recipe's, of these inputs.

    With `force` the results of another recipe or of other inputs go at once, and their model when the new one is
    complete. A directory of an older eckart does not say what its inputs were: they are taken to be these.
    """
    written = directory / "recipe.yaml"
    same_recipe = written.is_file() and written.read_text(encoding="utf-8") == recipe.to_yaml()
    changes = check_inputs(directory / INPUTS, inputs) if same_recipe else []
    if same_recipe and not changes:
        return
    if changes and not force:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise FileExistsError(
            f"{directory} has results of other files at the same places ({'; '.join(changes[:3])}{more}): give another "
            "place, or --force to remove them and start anew"
        )
    if directory.exists() and any(directory.iterdir()) and not force:
        raise FileExistsError(
            f"{directory} holds something else than a run of this recipe; give another place, or --force"
        )
    if written.is_file():
        shutil.rmtree(directory / "evals", ignore_errors=True)
        for name in (MADE, INPUTS):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    check_inputs(directory / INPUTS, inputs)
    write_whole(written, recipe.to_yaml())


def _note_refusals(directory: Path, refusals: dict[str, dict[str, str]]) -> None:
    """refusals.json: {task: {"dense" or "compressed": why}}; no file where nothing was refused."""
    file = directory / "refusals.json"
    if refusals:
        write_whole(file, json.dumps(refusals, indent=2, ensure_ascii=False))
    else:
        file.unlink(missing_ok=True)


# (length, limit) of a task.
_Windows = tuple[int | None, int | None]


class _Models:
    """The two models of a run, each loaded when something first asks for it."""

    def __init__(self, recipe: Recipe, directory: Path, how: How) -> None:
        self.recipe, self.directory, self.how = recipe, directory, how
        self.loaded: dict[str, PreTrainedModel] = {}
        self._errors: dict[_Windows, LinearErrors] = {}
        self.tokenizer = load_tokenizer(recipe.model, trust_remote_code=how.trust_remote_code)

    def get(self, which: str) -> PreTrainedModel:
        """The "dense" or the "compressed" model."""
        trust = self.how.trust_remote_code
        if which not in self.loaded:
            if which == "dense":
                self.loaded[which] = load_model(
                    self.recipe.model, dtype=self.recipe.dtype, device=self.how.device, trust_remote_code=trust
                )
            elif self.recipe.is_baseline:
                self.loaded[which] = make_baseline(self.recipe, self.directory, self.how)
            else:
                if not any(self.directory.glob(WEIGHTS)):
                    make_checkpoint(self.recipe, self.directory, self.how, force=True)
                self.loaded[which] = load_model(self.directory, device=self.how.device, trust_remote_code=trust)
        return self.loaded[which]

    def compress(self) -> None:
        """Make the compressed model's directory, unless this recipe has made it already. The dense model is let go."""
        self.loaded.clear()
        mark, recipe = self.directory.with_name(MADE), self.recipe.to_yaml()
        whole = (self.directory / FACTS).is_file()
        if whole and mark.is_file() and mark.read_text(encoding="utf-8") == recipe:
            return
        if self.recipe.is_baseline:
            self.get("compressed")
        else:
            make_checkpoint(self.recipe, self.directory, self.how, force=True)
        write_whole(mark, recipe)

    def evaluate(self, tasks: Sequence[Task], which: str) -> Iterator[EvalResult | ValueError]:
        """The results of one of the models, in the tasks' order; or why one was refused."""

        def needs(task: Task) -> tuple[bool, bool, bool, _Windows | None]:
            """(the dense model to compare with, names of its blocks, its activations, windows to read errors for)."""
            row = find_task(task.name)
            windows = (task.length, task.limit) if "errors" in row.needs else None
            compare = which == "compressed" and row.wants_reference
            return compare, "blocks" in row.needs, "activations" in row.needs, windows

        for (compare, by_block, read, windows), group in itertools.groupby(tasks, needs):
            together = list(group)
            try:
                model = self.get(which)
                reference = self.get("dense") if compare else None
                blocks = common_blocks(model, self.get("dense")) if by_block else ()
                activations = self.activations if read else None
                errors = self.errors(windows) if windows is not None else None
            except ValueError as error:
                yield from [error] * len(together)
                continue
            weights = weights_on_disk(locate(self.recipe.model) if which == "dense" else self.directory)
            if which == "compressed" and self.recipe.is_baseline:
                weights = ()
            # A baseline is made in memory: no worker elsewhere could load it.
            engine = HERE if which == "compressed" and self.recipe.is_baseline else self.how.engine
            how, context = self.how, self.recipe.context
            subject = Subject(model, self.tokenizer, weights, reference, activations, errors, blocks, context)
            setup = Setup(how.data, how.batch_size, how.workers, how.cache, how.track)
            yield from engine.outcomes(EvaluationRequest(subject, together, setup))

    @functools.cached_property
    def activations(self) -> Activations:
        """Of the dense model on the calibration text."""
        model = self.get("dense")
        tokens = make_tokens(self.recipe, model, self.tokenizer, self.how.data)
        return read_activations(model, tokens, input_groups(model), track=self.how.track)

    def errors(self, windows: _Windows) -> LinearErrors:
        """Of the compressed model's linears on text like its calibration text, to compare windows of text with."""
        if windows not in self._errors:
            self._errors[windows] = calibration_errors(
                self.directory,
                self.get("compressed"),
                self.get("dense"),
                self.tokenizer,
                length=windows[0],
                limit=windows[1],
                data=self.how.data,
                track=self.how.track,
            )
        return self._errors[windows]


class _Results:
    """Results on disk: those of a run directory, and dense ones that runs share."""

    def __init__(self, folder: Path, shared: Path | None, recipe: Recipe, inputs: Inputs) -> None:
        self.folder, self.shared, self.recipe, self.inputs = folder, shared, recipe, inputs

    def read(self, task: Task, which: str) -> EvalResult | None:
        for file in self._files(task, which):
            if file.is_file():
                result = read_result(file)
                if file.parent != self.folder:
                    write_result(result, self._files(task, which)[0])
                return result
        return None

    def write(self, result: EvalResult, task: Task, which: str) -> None:
        for file in self._files(task, which):
            write_result(result, file)

    def _files(self, task: Task, which: str) -> list[Path]:
        files = [self.folder / f"{task.slug}{'.dense' if which == 'dense' else ''}.json"]
        if which == "dense" and self.shared is not None:
            settings: list[Any] = [self.recipe.model, self.recipe.dtype, self.recipe.context, asdict(task)]
            names = [*names_in(task.name)]
            if "activations" in find_task(task.name).needs:
                settings.append(self.recipe.calibration.model_dump())
                names += parts_of(self.recipe.calibration.corpus)
            settings.append(digest_inputs(self.inputs, names))
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
            files.append(self.shared / f"{task.slug}-{digest}.json")
        return files


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they may move a number."""
    packages = ("eckart", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "scipy")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }
