"""Results: a folder of them, one file a task, with a note of what each was asked for, so that none is made twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from eckart.evals.result import EvalResult, read_result, write_result
from eckart.evals.task import Task, check_distinct
from eckart.runs.inputs import changes_in, inputs_of, names_in
from eckart.support.files import claimed, write_whole
from eckart.support.plain_data import read_yaml

# In the folder: {task's file name without .json: what it was asked for}. All .json in it are results.
ASKED = "asked.yaml"


class Results:
    """Results by task, in a folder or, for None, nowhere."""

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        models: Sequence[str],
        texts: Sequence[str],
        data: Path | None,
    ) -> None:
        self._folder, self._settings = folder, dict(settings)
        self._models, self._texts, self._data = models, texts, data
        self._asked = {} if folder is None or not (folder / ASKED).is_file() else read_yaml(folder / ASKED)

    def find(self, task: Task) -> EvalResult | None:
        """The result that is there, if it was asked for as now; None where there is none.

        Raises:
            FileExistsError: it was asked for otherwise, or of other files; the message says what differs.
        """
        file = self._file(task)
        if file is None or not file.is_file():
            return None
        differs = self._differences(task)
        if differs:
            raise FileExistsError(
                f"{file} exists, and is of something else ({'; '.join(differs[:3])}); give another --out, or --force"
            )
        return read_result(file)

    def write(self, task: Task, result: EvalResult) -> None:
        """Keep a result; the note comes first, so that no result is without."""
        file = self._file(task)
        if file is None or self._folder is None:
            return
        self._asked[task.slug] = self._note(task)
        write_whole(self._folder / ASKED, yaml.safe_dump(self._asked, sort_keys=False))
        write_result(result, file)

    def _file(self, task: Task) -> Path | None:
        return None if self._folder is None else self._folder / f"{task.slug}.json"

    def _note(self, task: Task) -> dict[str, Any]:
        asked = json.loads(json.dumps({**self._settings, **asdict(task)}))
        inputs = inputs_of(self._models, [*names_in(task.name), *self._texts], self._data)
        return {"asked": asked, "inputs": inputs}

    def _differences(self, task: Task) -> list[str]:
        before, now = self._asked.get(task.slug), self._note(task)
        if not isinstance(before, dict):
            return ["there is no note of what it was asked for"]
        asked = before.get("asked", {})
        differs = [
            f"{name} was {asked.get(name)!r} and is {now['asked'].get(name)!r}"
            for name in sorted(asked.keys() | now["asked"].keys())
            if asked.get(name) != now["asked"].get(name)
        ]
        return differs + changes_in(now["inputs"], before.get("inputs", {}))


@contextmanager
def open_results(
    folder: Path | None,
    tasks: Sequence[Task],
    settings: Mapping[str, Any],
    *,
    models: Sequence[str],
    texts: Sequence[str] = (),
    data: Path | None = None,
    force: bool = False,
) -> Iterator[tuple[Results, dict[str, EvalResult]]]:
    """The results in a folder, which is nobody else's meanwhile, and {slug: result} of the tasks that are done.

    Args:
        settings: everything but the task that changes a number: the model, its type, seeds. Plain data.
        models, texts, data: what is read; what is in these files counts, and not only their names.
        force: nothing that is there counts; each is replaced once its successor is complete.

    Raises:
        FileExistsError: a task has a result of something else.
        ValueError: another process writes there, a file is damaged, or a task is given twice.
    """
    check_distinct(tasks)
    with nullcontext() if folder is None else claimed(folder):
        results = Results(folder, settings, models, texts, data)
        kept = {} if force else {task.slug: result for task in tasks if (result := results.find(task)) is not None}
        yield results, kept
