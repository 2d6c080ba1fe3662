"""The catalogue: every evaluation as one row, and what a search, a study and a command read off it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.labelled import LABELLED, Labelled, read_labelled
from eckart.data.pairs import check_reads_text
from eckart.evals.accumulation import accumulation
from eckart.evals.classification import classification
from eckart.evals.cost import cost
from eckart.evals.distance import distance
from eckart.evals.divergence import divergence
from eckart.evals.harness import harness_direction, run_harness
from eckart.evals.harness_tasks import is_family
from eckart.evals.perplexity import perplexity
from eckart.evals.probing import probe
from eckart.evals.result import TRAITS, Better, EvalResult, Traits
from eckart.evals.similarity import similarity
from eckart.evals.stereoset import read_stereoset, stereoset
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.evals.texts import length_of, specials_around, text_of
from eckart.evals.windows import check_predicts


@dataclass(frozen=True)
class Searched:
    """How a rank search reads an evaluation: as one number, on data that its report does not read.

    Attributes:
        split: what the search reads.
        others: what remains to report on.
        score: of the result; None is its main value.
        on_windows: (model, windows of token ids) -> number, where the windows can be read once for all trials.
    """

    split: str
    others: str
    score: str | None = None
    on_windows: Callable[[PreTrainedModel, Int[Tensor, "windows length"]], float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """A row of the table.

    Attributes:
        run: (subject, task, setup) -> result.
        about: one line for people.
        traits: how its numbers are to be read. `evaluate` writes them into every result.
        argument: what follows the colon: "corpus", "task" (of the harness), "labelled" (a set of texts with
            classes), or "".
        needs: which optional fields of `Subject` it reads.
        compares: it reads the dense model that this one came from, where there is one.
        alone: it times the machine, so nothing else may run meanwhile.
        search: how a search reads it; None is no score to search by.
        direction: (task, setup) -> which way the value is good, where the traits cannot say.
    """

    run: Callable[[Subject, Task, Setup], EvalResult]
    about: str
    traits: Traits
    argument: str = "corpus"
    needs: frozenset[str] = frozenset()
    compares: bool = False
    alone: bool = False
    search: Searched | None = None
    direction: Callable[[Task, Setup], Better | None] | None = None

    @property
    def wants_reference(self) -> bool:
        """Whether a compressed model is measured together with the dense one that it came from."""
        return self.compares or "reference" in self.needs


def find_task(name: str) -> Evaluation:
    """The evaluation behind a task's name. Raises ValueError with the nearest known name."""
    kind, _, argument = name.partition(":")
    if kind not in EVALUATIONS:
        near = difflib.get_close_matches(kind, EVALUATIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(EVALUATIONS)}"
        raise ValueError(f"unknown evaluation {kind!r} in {name!r}; {hint}")
    row = EVALUATIONS[kind]
    if row.argument and not argument:
        examples = {"corpus": f"wikitext2, or {kind}:FILE", "task": "piqa", "labelled": f"cola, or {kind}:FILE"}
        example = examples[row.argument]
        raise ValueError(f"{name!r} names no {NOUNS[row.argument]}; write {kind}:{example}")
    if argument and not row.argument:
        raise ValueError(f"{name!r}: {kind} stands alone; write {kind}")
    return row


def counted_by(name: str) -> str | None:
    """What a limit of a task counts: "windows", "documents", "members" (documents of each), or None for nothing."""
    row = find_task(name)
    return "members" if row.argument == "task" and is_family(Task(name).argument) else row.traits.counts


def searched_by(name: str) -> Searched:
    """How a search reads a task. Raises ValueError where none can, and what there is."""
    row, task = find_task(name), Task(name)
    if row.search is None:
        known = [
            kind + (each.argument and f":{PLACES[each.argument]}") for kind, each in EVALUATIONS.items() if each.search
        ]
        raise ValueError(f"{name!r} is no score to search by; there are {', '.join(known)}")
    if row.argument == "labelled":
        labelled = LABELLED.get(task.argument)
        if Path(task.argument).is_file() or (labelled is not None and "train" not in labelled.splits):
            raise ValueError(
                f"{task.argument} has one split, which would be searched and reported on; give another set"
            )
    return row.search


def direction_of(task: Task, setup: Setup) -> Better:
    """Which way a task's value is good.

    Raises:
        ValueError: neither way is, so that nothing can be searched by it; and what asking the task raises.
    """
    row = find_task(task.name)
    better = row.traits.better or (row.direction and row.direction(task, setup))
    if better is None:
        raise ValueError(f"{task.name}: neither a high nor a low value is good, so it is no score to search by")
    return better


def _perplexity(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    check_reads_text(subject.model)
    check_predicts(subject.model, "perplexity")
    stream, shared = text_of(subject, task, setup)
    length, specials = length_of(subject, task), specials_around(subject)
    return perplexity(subject.model, stream, length=length, specials=specials, **shared)


def _perplexity_on(model: PreTrainedModel, windows: Int[Tensor, "windows length"]) -> float:
    return perplexity(model, windows.flatten(), length=windows.shape[1]).value


def _divergence(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    assert subject.reference is not None
    stream, shared = text_of(subject, task, setup)
    length, specials = length_of(subject, task), specials_around(subject)
    return divergence(subject.model, subject.reference, stream, length=length, specials=specials, **shared)


def _distance(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    assert subject.reference is not None
    assert subject.errors is not None
    stream, shared = text_of(subject, task, setup)
    return distance(
        subject.model,
        subject.reference,
        subject.errors,
        stream,
        length=task.length,
        specials=specials_around(subject),
        **shared,
    )


def _accumulation(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    assert subject.reference is not None
    stream, shared = text_of(subject, task, setup)
    return accumulation(
        subject.model,
        subject.reference,
        subject.blocks,
        stream,
        length=length_of(subject, task),
        batch_size=setup.batch_size,
        **shared,
    )


def _similarity(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    assert subject.activations is not None
    stream, shared = text_of(subject, task, setup)
    return similarity(
        subject.model, subject.activations, stream, length=task.length, specials=specials_around(subject), **shared
    )


def _harness(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    return run_harness(
        subject.model,
        subject.tokenizer,
        task.argument,
        split=task.split,
        shots=task.shots,
        seed=task.seed,
        limit=task.limit,
        data=setup.data,
        batch_size=setup.batch_size,
        task=task.label,
        track=setup.track,
    )


def _harness_direction(task: Task, setup: Setup) -> Better | None:
    return harness_direction(task.argument, data=setup.data)


def _stereoset(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    return stereoset(
        subject.model,
        subject.tokenizer,
        read_stereoset(setup.data).take(task.split),
        limit=task.limit,
        batch_size=setup.batch_size,
        leave_out_long=task.leave_out_long,
        task=task.label,
        track=setup.track,
    )


def _labelled(task: Task, setup: Setup) -> tuple[Labelled, dict[str, Any]]:
    """The task's rows, and the arguments that every evaluation on a labelled set takes."""
    rows = _labelled_rows(task, setup)
    shared = {"length": task.length, "batch_size": setup.batch_size, "task": task.label, "track": setup.track}
    return rows.draw(task.limit, task.seed), {**shared, "settings": {"limit": task.limit}}


def _labelled_rows(task: Task, setup: Setup) -> Labelled:
    """The rows of the task's split. A search reads those of train whose text is not in test, where a report reads it.

    CoLA has 16 sentences in both.
    """

    def read(split: str) -> Labelled:
        return read_labelled(task.argument, split=split, data=setup.data, column=task.column)

    if task.split != UNREAD:
        return read(task.split)
    rows, reported = read("train"), set(read("test").texts)
    unread = rows.take([place for place, text in enumerate(rows.texts) if text not in reported])
    return replace(unread, source={**rows.source, "split": task.split, "rows": len(unread)})


def _probing(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    rows, shared = _labelled(task, setup)
    return probe(
        subject.model,
        subject.tokenizer,
        rows,
        pooling=task.pooling,
        control=task.control,
        seeds=task.seeds,
        seed=task.seed,
        workers=setup.workers,
        cache=None if setup.cache is None else setup.cache / "states",
        **shared,
    )


def _classification(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    rows, shared = _labelled(task, setup)
    return classification(subject.model, subject.tokenizer, rows, **shared)


def _cost(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    return cost(
        subject.model,
        reference=subject.reference,
        weights=subject.weights,
        prompt=task.length,
        task=task.label,
        track=setup.track,
    )


NOUNS = {"corpus": "corpus", "task": "task", "labelled": "labelled set"}
PLACES = {"corpus": "CORPUS", "task": "TASK", "labelled": "SET"}

NEEDS = {
    "reference": "the dense model to compare with (--reference)",
    "activations": "the model's activations on the calibration text (--calibration TEXT)",
    "errors": "the errors of its linears on the calibration text",
    "blocks": "the names of its blocks",
}

# Of a labelled set: the rows to train on whose text is in no row of test.
UNREAD = "train-without-test"
# What SFSD searches on, and what it reports on.
_FIFTH = Searched("sfsd-search", "sfsd-evaluation")

EVALUATIONS: dict[str, Evaluation] = {
    "perplexity": Evaluation(
        _perplexity,
        "exp of the mean negative log-likelihood per token",
        TRAITS["perplexity"],
        search=replace(_FIFTH, on_windows=_perplexity_on),
    ),
    "lm-eval": Evaluation(
        _harness,
        "a task of lm-evaluation-harness, by its name there",
        TRAITS["lm-eval"],
        "task",
        search=_FIFTH,
        direction=_harness_direction,
    ),
    "stereoset": Evaluation(
        _stereoset,
        "StereoSet: language modelling, stereotype and ICAT scores",
        TRAITS["stereoset"],
        "",
        search=_FIFTH,
    ),
    "divergence": Evaluation(
        _divergence,
        "KL divergence and top-1 agreement of next tokens, against the dense model",
        TRAITS["divergence"],
        needs=frozenset({"reference"}),
    ),
    "distance": Evaluation(
        _distance,
        "how many times as much the compressed linears err as on the calibration text",
        TRAITS["distance"],
        needs=frozenset({"reference", "errors"}),
    ),
    "accumulation": Evaluation(
        _accumulation,
        "the error after each block, against the dense model: the block's own, and what it inherits",
        TRAITS["accumulation"],
        needs=frozenset({"reference", "blocks"}),
    ),
    "similarity": Evaluation(
        _similarity,
        "cosine between activations on calibration and evaluation text",
        TRAITS["similarity"],
        needs=frozenset({"activations"}),
    ),
    "probing": Evaluation(
        _probing,
        "what a probe reads off each layer, compared with a control task: F1 and selectivity",
        TRAITS["probing"],
        "labelled",
        search=Searched(UNREAD, "test", "selectivity"),
    ),
    "classification": Evaluation(
        _classification,
        "a fine-tuned classifier: Matthews' correlation, accuracy, F1",
        TRAITS["classification"],
        "labelled",
        search=Searched(UNREAD, "test"),
    ),
    "cost": Evaluation(
        _cost,
        "parameters, bytes, multiply-accumulates, speed",
        TRAITS["cost"],
        "",
        compares=True,
        alone=True,
    ),
}
