"""Tasks: evaluations by name, "perplexity:wikitext2"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.corpora import encode, read_text
from eckart.evals.perplexity import check_causal, perplexity
from eckart.evals.result import EvalResult
from eckart.tracking import Track, silent

# The window of the published tables; a model with fewer positions is read at its own.
DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Task:
    """One evaluation to run: what changes its value.

    Attributes:
        name: "<evaluation>:<corpus>".
        split, column: of the corpus.
        length: window; None is 2048, or the model's positions if fewer.
        limit: windows read at most.
    """

    name: str
    split: str = "test"
    column: str | None = None
    length: int | None = None
    limit: int | None = None

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Task],
    *,
    data: Path | None = None,
    track: Track = silent,
) -> list[EvalResult]:
    """Run evaluations on a model, in order.

    Args:
        tasks: names such as "perplexity:wikitext2", "perplexity:builtin/code", "perplexity:notes.txt", or `Task`s.
        data: folder with local copies of known corpora; None asks the hub.

    Raises:
        ValueError: an unknown evaluation or corpus, and what the evaluation itself raises. Names are checked before
            anything runs.
    """
    chosen = [task if isinstance(task, Task) else Task(task) for task in tasks]
    runners = [find_task(task.name) for task in chosen]
    return [run(model, tokenizer, task, data, track) for run, task in zip(runners, chosen, strict=True)]


def find_task(name: str) -> Callable[..., EvalResult]:
    """The evaluation behind a task's name. Raises ValueError with the nearest known name."""
    kind, _, corpus = name.partition(":")
    if kind not in EVALUATIONS:
        near = difflib.get_close_matches(kind, EVALUATIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(EVALUATIONS)}"
        raise ValueError(f"unknown evaluation {kind!r} in {name!r}; {hint}")
    if not corpus:
        raise ValueError(f"{name!r} names no corpus; write {kind}:wikitext2, or {kind}:FILE")
    return EVALUATIONS[kind]


def default_length(model: PreTrainedModel) -> int:
    """The window of a model where none is asked for: 2048 tokens, or its positions if it has fewer."""
    return min(DEFAULT_LENGTH, getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH)


def _perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, data: Path | None, track: Track
) -> EvalResult:
    check_causal(model)
    text = read_text(task.name.partition(":")[2], split=task.split, data=data, column=task.column)
    length = task.length or default_length(model)
    stream = encode(text.joined, tokenizer)
    return perplexity(model, stream, length=length, limit=task.limit, task=task.name, settings=text.source, track=track)


EVALUATIONS: dict[str, Callable[..., EvalResult]] = {"perplexity": _perplexity}
