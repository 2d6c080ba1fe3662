"""Inputs: the files that a run reads, by what is in them, so that results of others are not taken for its own."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from eckart.data.corpora import BUILTIN
from eckart.data.labelled import LABELLED
from eckart.data.mixtures import parts_of
from eckart.evals.catalogue import find_task
from eckart.evals.harness_tasks import LOCAL_TASKS
from eckart.evals.result import traits_of
from eckart.models.adapters import read_adapter
from eckart.models.gguf_header import gguf_file
from eckart.models.loading import locate
from eckart.models.shards import COMPANIONS
from eckart.models.weight_files import weight_files
from eckart.runs.facts import FACTS
from eckart.runs.recipe import Recipe
from eckart.runs.sections import RecoverSection
from eckart.support.files import digest_of, write_whole

# In a run directory.
INPUTS = "inputs.json"
# In a model's directory, and of no influence on what it computes.
NOTES = (FACTS, "plan.json", "allocation.json", "finetuning.json")

# In place of the files of a set that is not in a folder.
FROM_HUB = {"its copy on the hub": "any version"}

# {source: {file: its digest}}. A source is a model, a text or a set of texts, all files of it or none.
Inputs = dict[str, dict[str, str]]


def read_inputs(recipe: Recipe, data: Path | None) -> Inputs:
    """The files that a recipe reads on this machine, with a digest of each.

    Those of the model and its tokenizer, of texts and plans that the recipe names by their paths, and of the known sets
    in `data`. A model on the hub has its commit instead. Of a set on the hub there is only that it is from there:
    `datasets` keeps the version that it has.

    Cost: one read of each file, and none of those that this process has read already.
    """
    return inputs_of([recipe.model], _names(recipe), data)


def inputs_of(models: Iterable[str], names: Iterable[str], data: Path | None) -> Inputs:
    """The files of models, and of the texts and sets of these names, as `read_inputs` gives them."""
    inputs: Inputs = {}
    for name in models:
        inputs |= _files_of_model(name)
    for name in names:
        if name == BUILTIN or name.startswith(f"{BUILTIN}/"):
            inputs[f"the text {BUILTIN}"] = {"Python's documentation": platform.python_version()}
        elif Path(name).is_file():
            inputs[name] = _digests([Path(name)])
        else:
            inputs[f"the data of {name}"] = ({} if data is None else _files_of_set(name, data)) or FROM_HUB
    return {source: files for source, files in inputs.items() if files}


def changes_in(inputs: Inputs, recorded: Inputs) -> list[str]:
    """What differs from what was recorded, in words.

    A source that only one of the two has is no difference: older notes do not say what was from the hub.
    """
    changes = []
    for source in inputs.keys() & recorded.keys():
        before, now = recorded[source], inputs[source]
        words = {
            "changed": [name for name in before.keys() & now.keys() if before[name] != now[name]],
            "gone": before.keys() - now.keys(),
            "new": now.keys() - before.keys(),
        }
        changes += [f"{source}: {name} is {word}" for word, names in words.items() for name in sorted(names)]
    return sorted(changes)


def check_inputs(file: Path, inputs: Inputs) -> list[str]:
    """What differs from the inputs in `file`; where nothing does, those of new sources are added to the file."""
    try:
        recorded: Inputs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        changes = changes_in(inputs, recorded)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} does not say what the run was made of ({error}): give another place") from error
    if not changes and {**recorded, **inputs} != recorded:
        write_whole(file, json.dumps({**recorded, **inputs}, indent=1, ensure_ascii=False))
    return changes


def digest_inputs(inputs: Inputs, names: Iterable[str]) -> str:
    """One digest of the model's files and of those of these names, for the name of a result that runs share."""
    wanted = {source for name in names for source in (name, f"the data of {name}", f"the text {BUILTIN}")}
    some = {
        source: files
        for source, files in inputs.items()
        if files != FROM_HUB and (source.startswith("the model ") or source in wanted)
    }
    return hashlib.sha256(json.dumps(some, sort_keys=True).encode()).hexdigest()


def _names(recipe: Recipe) -> Iterator[str]:
    """Everything that the recipe names and that may be a file or a known set."""
    tasks = [task.name for task in recipe.tasks]
    if recipe.keep != 1 or any("activations" in find_task(task).needs for task in tasks):
        yield from parts_of(recipe.calibration.corpus)
    if recipe.allocation is not None and recipe.allocation.score is not None:
        tasks.append(recipe.allocation.score)
    for task in tasks:
        yield from names_in(task)
    if isinstance(recipe.recover, RecoverSection) and recipe.recover.corpus is not None:
        yield recipe.recover.corpus
    if recipe.plan is not None:
        yield recipe.plan


def names_in(task: str) -> tuple[str, ...]:
    """The texts or sets that an evaluation of this name reads."""
    kind, _, argument = task.partition(":")
    return parts_of(argument or kind) if argument or traits_of(task).counts else ()


def _files_of_set(name: str, data: Path) -> dict[str, str]:
    """Of a known set, in its folder in `data`, or in `data` where that is the set's folder."""
    family = next((row for row in LOCAL_TASKS if name.startswith(f"{row}_") and LOCAL_TASKS[row].member), name)
    rows = [table[family] for table in (LABELLED, LOCAL_TASKS) if family in table]
    folders = [data / (row.folder or name) for row in rows] + [data / name]
    found = [file for folder in folders if folder.is_dir() for file in folder.rglob("*")]
    return _digests(found or data.glob("*.*"))


def _files_of_model(name: str) -> Inputs:
    """Of a model; and of an adapter's base model, as of a model of its own."""
    place = Path(locate(name))
    if (file := gguf_file(place)) is not None:
        return {f"the model {name}": _digests([file])}
    if not place.is_dir():
        return {f"the model {name}": _commit_of(name)}
    adapter = read_adapter(place)
    return {f"the model {name}": _files_in(place), **({} if adapter is None else _files_of_model(adapter.base))}


def _files_in(folder: Path) -> dict[str, str]:
    weights = "*.safetensors" if any(folder.glob("*.safetensors")) else "*.bin"
    files = {file for pattern in (*COMPANIONS, weights) for file in folder.glob(pattern)}
    return _digests(files | set(weight_files(folder)))  # a .bin beside a .safetensors that is no model


def _commit_of(model: str) -> dict[str, str]:
    """The version of a model on the hub that is in the hub's cache; nothing where none is."""
    config = try_to_load_from_cache(model, "config.json")
    return {"its commit on the hub": Path(config).parent.name} if isinstance(config, str) else {}


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: _digest_of(file) for file in sorted(files) if file.is_file() and file.name not in NOTES}


def _digest_of(file: Path) -> str:
    state = file.stat()
    return _digest(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@functools.cache
def _digest(file: Path, *_state: int) -> str:
    """Of a file in this state: one that was written to is in another."""
    return digest_of(file)
