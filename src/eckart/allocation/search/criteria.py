"""Criteria: an evaluation as one number of a model, for searches that ask for it many times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation.search.trials import Better
from eckart.data.corpora import BUILTIN
from eckart.data.labelled import LABELLED
from eckart.data.pairs import is_encoder_decoder
from eckart.evals.catalogue import direction_of, find_task, searched_by
from eckart.evals.harness_tasks import LOCAL_TASKS, SPLITS
from eckart.evals.subject import Setup
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.evals.texts import windows_of
from eckart.support.files import digest_of


@dataclass(frozen=True)
class Criterion:
    """A score and the facts that a search needs of it. Calling it scores a model.

    Attributes:
        measure: model -> number.
        better: which way is good.
        about: task, data and settings behind the number, for the header of a journal.
    """

    measure: Callable[[PreTrainedModel], float]
    better: Better
    about: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: PreTrainedModel) -> float:
        return self.measure(model)


def search_criterion(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str | None = None,
    limit: int | None = None,
    others: bool = False,
    data: Path | None = None,
    batch_size: int = 8,
    workers: int = 1,
    context: int | None = None,
) -> Criterion:
    """A task as the score of a search, on the part of its data that is for searching.

    The evaluation's row says what is read, which score counts and which way it is good; for a task of lm-eval, the
    harness's definition does.

    Args:
        name: "perplexity:wikitext2", "lm-eval:piqa", "stereoset", "probing:cola".
        model: gives the length of a window; the tokenizer is checked against it.
        split: of a corpus of text: the split whose windows are divided between search and report; None is "test".
        limit: windows, documents or texts read at most, of the part that is read.
        others: read the part that no search reads instead, to report on the search's result.
        data, batch_size, workers, context: as in `evaluate`.

    Raises:
        ValueError: no score to search by, one that is good neither way, a split of data that is not text, too little
            data to divide, and what reading it raises.
    """
    searched = searched_by(name)
    part = searched.others if others else searched.split
    if split is not None:
        check_split(name, split)
        part = f"{part} of {split}"
    task = Task(name, split=part, limit=limit)
    if searched.on_windows is not None and not is_encoder_decoder(model):
        return windows_criterion(task, windows_of(model, tokenizer, task, data=data, context=context))
    return task_criterion(
        task,
        tokenizer,
        better=direction_of(task, Setup(data)),
        score=searched.score,
        data=data,
        batch_size=batch_size,
        workers=workers,
        context=context,
    )


def check_split(name: str, split: str) -> None:
    """Raises ValueError for a split of an evaluation that does not read a corpus of text."""
    if find_task(name).argument != "corpus":
        raise ValueError(f"split {split!r} is of a corpus of text, and {name} has its own: leave it out")


def check_apart(score: str, split: str | None, tasks: Iterable[Task], *, context: int | None = None) -> None:
    """Refuses a report on what a search has read.

    Args:
        score, split: of the search, as `search_criterion` takes them.
        tasks: what the searched model will be measured on.
        context: the window of the search, and of tasks that name none.

    Raises:
        ValueError: a task may read documents or windows that the search reads; the message has the split that does not.
    """
    searched, read = searched_by(score), Task(score)
    others = searched.others if split is None else f"{searched.others} of {split}"
    for task in tasks:
        row = find_task(task.name)
        if row.traits.counts is None or row.traits.of == "dense" or not _is_same_data(read, task):
            continue
        if find_task(score).argument == "labelled":
            # Its search reads rows to train on, and only another evaluation of a labelled set reads those.
            apart = row.argument != "labelled" or task.split == searched.others
        elif find_task(score).argument == "corpus":
            part, _, of = task.split.partition(" of ")
            same_windows = task.argument == read.argument and task.length in (None, context)
            other_text = _is_other_part(read, split or "test", of or ("test" if part in SPLITS else part))
            apart = row.argument == "corpus" and (other_text or (part == searched.others and same_windows))
        else:
            apart = row.argument == find_task(score).argument and task.split == searched.others
        if not apart:
            raise ValueError(
                f"{task.label} would be measured on what the search by {score} reads: give it the split {others}"
                + (", and no length of its own" if task.length not in (None, context) else "")
                + (f", of {read.argument} itself" if task.argument != read.argument else "")
            )


def _is_same_data(one: Task, other: Task) -> bool:
    """Whether two tasks read one data set, or may. The built-in text has parts, and its bare name is all of them."""
    first, second = sorted((_data_of(one), _data_of(other)), key=len)
    return first == second or (first == BUILTIN and second.startswith(f"{BUILTIN}/"))


def _data_of(task: Task) -> str:
    """What tells a data set from others: its file, or the folder where local copies of it lie."""
    row, name = find_task(task.name), task.argument or task.kind
    if Path(name).is_file():
        return str(Path(name).resolve())
    if row.argument == "labelled" and name in LABELLED:
        return LABELLED[name].folder or name
    if row.argument == "task":
        family = next((known for known in LOCAL_TASKS if name == known or name.startswith(f"{known}_")), None)
        return name if family is None else LOCAL_TASKS[family].folder
    return name


def _is_other_part(corpus: Task, one: str, other: str) -> bool:
    """Whether two splits of a corpus are of different text. A file has one; of the built-in text all but train are."""
    if Path(corpus.argument).is_file():
        return False
    if corpus.argument.partition("/")[0] == BUILTIN:
        return (one == "train") != (other == "train")
    return one != other


def windows_criterion(task: Task, windows: Int[Tensor, "windows length"]) -> Criterion:
    """A task's number on these windows of token ids, read once for all trials.

    Raises:
        ValueError: a task that is not measured on windows.
    """
    on_windows = searched_by(task.name).on_windows
    if on_windows is None:
        raise ValueError(f"{task.name} is not measured on windows of text")
    digest = hashlib.sha256(windows.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:32]
    return Criterion(
        lambda model: on_windows(model, windows),
        direction_of(task, Setup()),
        {"score": task.kind, "windows": list(windows.shape), "tokens": digest},
    )


def task_criterion(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    better: Better,
    score: str | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    workers: int = 1,
    context: int | None = None,
) -> Criterion:
    """Any evaluation's value, or one of its further scores, evaluated anew for each trial.

    Args:
        better: which way the score is good.
        score: name of one of the result's scores; None is its main value.
        data, batch_size, workers, context: as in `evaluate`.

    Raises:
        ValueError: an unknown evaluation. Calling it: what `evaluate` raises, and a main value that is good the other
            way, by what its result says.
    """
    find_task(task.name)

    def measure(model: PreTrainedModel) -> float:
        (result,) = evaluate(
            model, tokenizer, [task], data=data, batch_size=batch_size, workers=workers, context=context
        )
        if score is None and result.better != better:
            raise ValueError(f"{task.label}: a search takes {better} values for good, and its result {result.better}")
        return result.read(score)

    about = {"task": asdict(task), "score": score, "context": context, "read": _digest_of_what_is_read(task, data)}
    return Criterion(measure, better, {**about, "tokenizer": _digest_of_tokenizer(tokenizer)})


def _digest_of_what_is_read(task: Task, data: Path | None) -> str | None:
    """Of the task's file, or of the files in its folder of local copies; None where it is read from the hub.

    Where its files would lie in `data` itself, of all that are there.
    """
    name = _data_of(task)
    if Path(name).is_file():
        files = [Path(name)]
    elif data is None:
        return None
    else:
        files = sorted((data / name).rglob("*") if (data / name).is_dir() else data.glob("*"))
    return _digest((file.name, digest_of(file)) for file in files if file.is_file())


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that it does, where it says that, as the fast ones do; else of its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _digest([sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()])


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps([*parts]).encode()).hexdigest()[:32]
