"""Texts: a task's corpus as the tokens that an evaluation reads, and the windows that it reads them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import check_split, read_text
from eckart.data.encoding import check_vocabulary, encode, specials_of, warn_of_tokenizer
from eckart.data.pairs import is_encoder_decoder
from eckart.data.positions import usable_positions
from eckart.evals.harness_tasks import SPLITS, split_rows
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.evals.windows import Specials, cut_text

# The window of the published tables; a model with fewer positions is read at its own.
DEFAULT_LENGTH = 2048


def windows_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    data: Path | None = None,
    context: int | None = None,
) -> Int[Tensor, "windows length"]:
    """The windows of token ids that `evaluate` reads for a task on text: read once, to measure many models on.

    Raises:
        ValueError: as `evaluate`.
    """
    warn_of_tokenizer(model, tokenizer)
    subject = Subject(model, tokenizer, context=context)
    stream, _ = text_of(subject, task, Setup(data))
    length = length_of(subject, task)
    return cut_text(model, stream, length=length, limit=task.limit, specials=specials_around(subject)).ids


def default_length(model: PreTrainedModel, context: int | None = None) -> int:
    """The window of a model where none is asked for: `context` (None is 2048) tokens, or its positions if fewer.

    Of an encoder-decoder source and target together, each of which has as many positions; of one that reads sound, the
    target alone.
    """
    longest, positions = context or DEFAULT_LENGTH, usable_positions(model)
    sides = 2 if is_encoder_decoder(model) and model.main_input_name == "input_ids" else 1
    return longest if positions is None else min(longest, sides * positions)


def text_of(subject: Subject, task: Task, setup: Setup) -> tuple[Tensor, dict[str, Any]]:
    """The task's corpus as a stream of tokens, and the arguments that every evaluation on text takes.

    The splits that a rank search and its report read are windows of the text.
    """
    part, _, whole = task.split.partition(" of ")
    whole, part = (whole or "test", part) if part in SPLITS else (task.split, "test")
    check_split([task.argument], whole, "test")
    text = read_text(task.argument, split=whole, data=setup.data, column=task.column, tokenizer=subject.tokenizer)
    source = {**text.source, "split": task.split}
    shared = {"limit": task.limit, "task": task.label, "settings": source, "track": setup.track}
    stream = encode(text, subject.tokenizer)
    if part != "test":
        length = length_of(subject, task)
        rows = stream[: len(stream) // length * length].view(-1, length)
        try:
            stream = rows[split_rows(len(rows), part)].flatten()
        except ValueError as error:
            raise ValueError(f"{task.name}: of windows of {length} tokens, {error}") from error
    read = stream if task.limit is None else stream[: task.limit * length_of(subject, task)]
    if len(read):
        check_vocabulary(subject.model, read, subject.tokenizer)
    return stream, shared


def length_of(subject: Subject, task: Task) -> int:
    """The tokens of a window: those that the task asks for, else those that the model reads by default."""
    return task.length or default_length(subject.model, subject.context)


def specials_around(subject: Subject) -> Specials:
    """The special tokens around each half of a window of an encoder-decoder; there are none around other windows."""
    return specials_of(subject.tokenizer) if is_encoder_decoder(subject.model) else ((), ())
