"""Tasks: evaluations run on a model, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.encoding import warn_of_tokenizer
from eckart.evals.catalogue import NEEDS, find_task
from eckart.evals.distance import LinearErrors
from eckart.evals.result import EvalResult
from eckart.evals.similarity import Activations
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.evals.windows import check_evaluating
from eckart.support.progress import Track, silent


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Task],
    *,
    data: Path | None = None,
    batch_size: int = 8,
    weights: Sequence[Path] = (),
    reference: PreTrainedModel | None = None,
    activations: Activations | None = None,
    errors: LinearErrors | None = None,
    blocks: Sequence[str] = (),
    context: int | None = None,
    workers: int = 1,
    cache: Path | None = None,
    track: Track = silent,
) -> list[EvalResult]:
    """Run evaluations on a model, in order.

    Args:
        tasks: names such as "perplexity:wikitext2", "perplexity:notes.txt", "lm-eval:piqa", "stereoset", or `Task`s.
        data: folder with local copies of known corpora and tasks; None asks the hub.
        batch_size: examples at a time, for tasks of examples.
        weights, reference, activations, errors, blocks, context: see `Subject`; only some evaluations need them.
        workers, cache: see `Setup`.

    Raises:
        ValueError: an unknown evaluation or corpus, something that an evaluation needs and `Subject` lacks, and what
            the evaluation itself raises. All names are checked before anything runs.

    Warns where the tokenizer may be another model's.
    """
    to_run = [task if isinstance(task, Task) else Task(task) for task in tasks]
    subject = Subject(model, tokenizer, tuple(weights), reference, activations, errors, tuple(blocks), context)
    for task in to_run:
        missing = [name for name in sorted(find_task(task.name).needs) if not getattr(subject, name)]
        if "reference" in missing:  # those are read beside it
            missing = [name for name in missing if name not in ("errors", "blocks")]
        if missing:
            raise ValueError(f"{task.name} needs {' and '.join(NEEDS[name] for name in missing)}")
    check_evaluating(model)
    warn_of_tokenizer(model, tokenizer)
    setup = Setup(data, batch_size, workers, cache, track)
    return [_run(subject, task, setup) for task in to_run]


def _run(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    row = find_task(task.name)
    result = row.run(subject, task, setup)
    return replace(result, traits=row.traits, better=result.better or row.traits.better)
