"""Scores: evaluations as one number of a model, for searches that ask many times; and the split of text for them."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation.search.trials import Better
from eckart.evals.harness_tasks import SPLIT_SEED
from eckart.evals.perplexity import perplexity
from eckart.evals.tasks import Task, evaluate, find_task

# SFSD searches on this share of the data and reports on the rest.
SEARCH_SHARE = 0.2


@dataclass(frozen=True)
class Criterion:
    """A score with what a search has to know about it. Calling it scores a model.

    Attributes:
        measure: model -> number.
        better: which way is good.
        about: what makes the number: task, data, settings. For the header of a journal.
    """

    measure: Callable[[PreTrainedModel], float]
    better: Better
    about: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: PreTrainedModel) -> float:
        return self.measure(model)


def split_windows(
    rows: Int[Tensor, "windows length"], share: float = SEARCH_SHARE, *, seed: int = SPLIT_SEED
) -> tuple[Int[Tensor, "some length"], Int[Tensor, "others length"]]:
    """The windows of text to search on, and the others, to report on: disjoint, each in the order of the text.

    Drawn as the splits of a task's documents are (`split_rows`): 0 ... n-1 shuffled by `random.Random(seed)`, the first
    floor(share n) for the search.

    Args:
        rows: (windows, length) token ids.
        seed: leave it, so that no search and no report share a window.

    Raises:
        ValueError: a share outside (0, 1), or so few windows that one side is empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} is outside (0, 1)")
    count = math.floor(round(share * len(rows), 9))
    if not 0 < count < len(rows):
        raise ValueError(f"{len(rows)} windows are too few to search on a share of {share:g} of them")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows[sorted(order[:count])], rows[sorted(order[count:])]


def perplexity_score(rows: Int[Tensor, "windows length"]) -> Criterion:
    """Perplexity on these windows of token ids, as `evals.perplexity` takes it."""

    def measure(model: PreTrainedModel) -> float:
        return perplexity(model, rows.flatten(), length=rows.shape[1]).value

    digest = hashlib.sha256(rows.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:32]
    return Criterion(measure, "lower", {"score": "perplexity", "windows": list(rows.shape), "tokens": digest})


def task_score(
    task: Task | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    better: Better = "higher",
    score: str | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    workers: int = 1,
    context: int | None = None,
) -> Criterion:
    """Any evaluation's value, or one of its further scores.

    Args:
        better: which way the score is good.
        score: of the result; None is its main value.
        data, batch_size, workers, context: as in `evaluate`.
    """
    task = task if isinstance(task, Task) else Task(task)
    find_task(task.name)

    def measure(model: PreTrainedModel) -> float:
        (result,) = evaluate(
            model, tokenizer, [task], data=data, batch_size=batch_size, workers=workers, context=context
        )
        return result.read(score)

    return Criterion(measure, better, {"task": asdict(task), "score": score, "context": context})


def labelled_score(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, split: str = "train", **options: Any
) -> Criterion:
    """A score on a labelled set: of probing the mean selectivity of the layers, of a classifier its correlation.

    Args:
        split: searches read the rows to train on, so that the others are left to report on.
        options: as in `task_score`.
    """
    score = "selectivity" if task.kind == "probing" else None
    return task_score(replace(task, split=split), tokenizer, score=score, **options)


def accuracy_score(
    task: Task | str, tokenizer: PreTrainedTokenizerBase, *, score: str | None = None, **options: Any
) -> Criterion:
    """Accuracy at a task of lm-evaluation-harness ("lm-eval:piqa") on the 20 % that SFSD searches on.

    Args:
        task: one without a split gets "sfsd-search"; report on "sfsd-evaluation".
        score: "acc_norm", or None for accuracy.
        options: as in `task_score`.

    Raises:
        ValueError: the task is none of the harness's.
    """
    task = task if isinstance(task, Task) else Task(task)
    if task.kind != "lm-eval":
        raise ValueError(f"{task.name}: accuracy is of a task such as lm-eval:piqa")
    if task.split == "test":
        task = replace(task, split="sfsd-search")
    return task_score(task, tokenizer, score=score, **options)
