"""What the tests of a cluster share: work that one engine does like another, and workers that die at it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan
from eckart.allocation.search.criteria import Criterion, windows_criterion
from eckart.allocation.search.surgical import Tolerance, search
from eckart.compression.spectra import spectra_on_demand
from eckart.data.tokens import Tokens
from eckart.evals.task import Task
from eckart.lowrank import build_method
from eckart.runs.engine.base import CalibrationRequest, SearchRequest
from eckart.runs.engine.local import HERE
from tiny import tiny_tokens

TOKENS = tiny_tokens(11, 16, padded=True)
BLOCKS = 3


def compressed(
    where: Any, path: Path, method: str, tokens: Tokens = TOKENS, options: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model at a path, compressed to half on an engine; first all of the moments, so that few workers do."""
    model, built = eckart.load_model(path), build_method(method, options or {})
    moments = list(where.calibrate_by_block(CalibrationRequest(model, tokens, built, batch_size=4)))
    if where is not HERE:
        where.cluster.requested = min(where.cluster.requested, 2)
    eckart.compress(model, built, plan(model, 0.5), moments, cut=where.cut_units)
    return model


@cache
def score() -> Criterion:
    """How good a tiny model is at a text that no test calibrates on."""
    return windows_criterion(Task("perplexity:text"), tiny_tokens(4, 16, seed=5).ids)


def searched(where: Any, path: Path, criterion: Any = None, **more: Any) -> Any:
    """A surgical search on an engine."""
    model, method = eckart.load_model(path), build_method("asvd-i")
    moments = list(HERE.calibrate_by_block(CalibrationRequest(model, TOKENS, method)))
    with where.team(SearchRequest(model, method, lambda: moments), criterion or score()) as team:
        spectra = {} if team else spectra_on_demand(model, method, moments)
        return search(model, spectra, score(), better="lower", tolerance=Tolerance.parse("-1%"), team=team, **more)


def told(result: Any) -> dict[str, Any]:
    """A result without what is never the same, seconds and the last digits."""
    text = json.dumps(result.to_dict())
    return json.loads(text, parse_float=lambda digits: round(float(digits), 3), object_hook=_timeless)


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def dying_once(marks: Path, work: Callable[..., Any], call: int = 1) -> Callable[..., Any]:
    """`work`, but the worker that is at its n-th call, of all workers together, kills itself."""
    kill, number = os.kill, signal.SIGKILL
    marks.mkdir()

    def called(*arguments: Any) -> Any:
        (marks / str(time.time_ns())).touch()
        if len(list(marks.iterdir())) >= call and not (marks / "died").exists():
            (marks / "died").touch()
            kill(os.getpid(), number)
        return work(*arguments)

    return called


def processes(nodes: Any, name: str) -> list[int]:
    """The workers of these nodes that are at something of this name."""
    ours = {process.process.pid for node in nodes.list_all_nodes() for process in node.all_processes["raylet"]}
    numbers = []
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if folder.name.isdigit() and parent in ours and title.startswith(f"ray::{name}"):
            numbers.append(int(folder.name))
    return numbers
