"""Probing: what a small classifier reads off a model's hidden states, compared with a control that says what is chance.

For every layer a two-layer network is trained on the pooled hidden states of four fifths of a labelled set, and scored
on the rest (Belinkov 2021). The same network is trained on a control task (Hewitt & Liang 2019, arXiv 1909.03368):
labels at random, with the task's own frequencies, one for each type of input. Selectivity is the task's score minus the
control's.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.labelled import Labelled
from eckart.evals.hidden_states import Pooling, read_hidden_states
from eckart.evals.result import CHECK, TRAITS, EvalResult, Score
from eckart.support.progress import Track, silent

Control = Literal["text", "last-word"]
# One row in this many is for the test: the paper's 80 to 20.
FOLDS = 5
# Units of the probe's hidden layer; neither the paper nor anything in it says how many.
UNITS = 128
# Passes over the training rows, at Adam's usual rate. There is no early stopping: a stop by accuracy makes a probe of
# random labels answer the commonest class, and the control would be of another kind of probe than the task.
PASSES = 30
BATCH = 200
# Steps at least, so that a small set is learned as well.
LEAST_STEPS = 200


@dataclass(frozen=True)
class Reading:
    """One probe of the task and one of the control, on one layer with one seed: scores on the rows kept for the test.

    Attributes:
        f1, accuracy, mcc: of the task; F1 is weighted by the classes' frequencies.
        control: weighted F1 of the control.
    """

    f1: float
    accuracy: float
    mcc: float
    control: float

    @property
    def selectivity(self) -> float:
        return self.f1 - self.control


@dataclass(frozen=True)
class Draw:
    """What a seed decides: which rows are for the test, and the control's labels."""

    seed: int
    train: NDArray[np.intp]
    test: NDArray[np.intp]
    control: NDArray[np.intp]


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Labelled,
    *,
    pooling: Pooling = "mean",
    control: Control = "text",
    seeds: int = 3,
    seed: int = 0,
    length: int | None = None,
    batch_size: int = 8,
    workers: int = 1,
    cache: Path | None = None,
    task: str = "probing",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """What every layer knows of a labelled set: weighted F1 of a probe, and of its control.

    Args:
        rows: texts with classes.
        pooling, length, batch_size, cache: of the hidden states, see `read_hidden_states`.
        control: what is one type of input, and so has one random label. "text": the text itself. A test text is then
            new to the probe, and the control can be no better than chance: it is the floor of the score. "last-word":
            the text's last word, which recurs, so that a probe that remembers words does well at the control.
        seeds: probes of each layer. A seed decides the split, the control's labels and the probe's first weights.
        seed: the first of them.
        workers: probes trained at a time: speed only.

    Returns:
        value = weighted F1, mean over the blocks' layers 1 ... L (the embeddings, layer 0, are read but not counted).
        stderr is that of the mean over seeds. Scores, of the same layers: `control`, `selectivity`, `accuracy`, `mcc`,
        `passed` (the share of layers whose selectivity is at least 0.2); and `f1.K`, `control.K`, `selectivity.K` of
        every layer K. details: `layers`, the scores by seed; `check`, the 0.2; `majority`, the weighted F1 of always
        answering the commonest class; `truncated`, texts that were cut.

    Raises:
        ValueError: seeds below 1, fewer than five groups of a class (the message has the numbers), and what
            `read_hidden_states` raises.

    Cost: one forward pass over the texts; (L + 1) seeds probes of 2 x 30 passes over 4/5 of (texts, width) each.
    """
    if seeds < 1:
        raise ValueError(f"seeds {seeds} is not positive")
    if control not in get_args(Control):
        raise ValueError(f"control {control!r} is none of {', '.join(get_args(Control))}")
    labels = np.array(rows.labels)
    draws = [draw(rows, control, seed + number) for number in range(seeds)]
    with read_hidden_states(
        model, tokenizer, rows.texts, pooling=pooling, length=length, batch_size=batch_size, cache=cache, track=track
    ) as states:
        readings = _read_layers(states.values, labels, draws, workers, task, track)
        truncated, length = states.truncated, states.length
    majority = _scores(labels, np.full_like(labels, np.bincount(labels).argmax()))["f1"]
    return EvalResult(
        task=task,
        metric="f1",
        **asdict(_mean(readings[1:], "f1", len(rows))),
        traits=TRAITS["probing"],
        settings={
            **rows.source,
            **(settings or {}),
            "pooling": pooling,
            "control": control,
            "seeds": seeds,
            "seed": seed,
            "length": length,
            "rows": len(rows),
            "units": UNITS,
            "passes": PASSES,
        },
        scores={
            **{name: _mean(readings[1:], name, len(rows)) for name in ("control", "selectivity", "accuracy", "mcc")},
            "passed": Score(float(np.mean([_passes(layer) for layer in readings[1:]])), None, len(readings) - 1),
            **{
                f"{name}.{number}": _mean([layer], name, len(rows))
                for number, layer in enumerate(readings)
                for name in ("f1", "control", "selectivity")
            },
        },
        details={
            "layers": [
                {
                    "layer": number,
                    **{name: [getattr(one, name) for one in layer] for name in ("f1", "accuracy", "mcc", "control")},
                    "passes": _passes(layer),
                }
                for number, layer in enumerate(readings)
            ],
            "check": CHECK,
            "majority": majority,
            "classes": list(rows.classes),
            "truncated": truncated,
        },
    )


def draw(rows: Labelled, control: Control, seed: int) -> Draw:
    """The split of a seed, which leaves groups whole and keeps the classes' shares, and its control labels.

    Raises:
        ValueError: fewer than five groups of a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import, and needed only here

    labels, groups = np.array(rows.labels), np.array(rows.groups)
    for number, name in enumerate(rows.classes):
        count = len(np.unique(groups[labels == number]))
        if count < FOLDS:
            raise ValueError(
                f"{rows.source.get('corpus')}: {count} texts of class {name!r}; a probe is trained on four fifths and "
                f"tested on the rest, so give at least {FOLDS} of every class"
            )
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    train, test = next(folds.split(np.zeros(len(labels)), labels, groups))
    return Draw(seed, train, test, control_labels(rows, control, seed))


def control_labels(rows: Labelled, control: Control, seed: int) -> NDArray[np.intp]:
    """A random label for every row: one for each type of input, drawn with the frequencies of the task's classes."""
    kinds: dict[str, int] = {}
    types = [kinds.setdefault(_type(text, control), len(kinds)) for text in rows.texts]
    shares = np.bincount(rows.labels, minlength=len(rows.classes)) / len(rows)
    drawn = np.random.default_rng(seed).choice(len(rows.classes), size=len(kinds), p=shares)
    return np.asarray(drawn[types], dtype=np.intp)


def train_probe(
    states: NDArray[np.float32], labels: NDArray[np.intp], train: NDArray[np.intp], test: NDArray[np.intp], seed: int
) -> NDArray[np.intp]:
    """The classes that a probe, trained on some rows, gives to others.

    A network of one hidden layer of 128 rectified units (scikit-learn's MLPClassifier, Adam, 30 passes and 200 steps at
    least), on states that are scaled to mean 0 and deviation 1 over the training rows.

    Args:
        states: (texts, width) of one layer. labels: (texts,).
        seed: of the first weights and the order of the rows.
    """
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels[train])) == 1:
        return np.full(len(test), labels[train][0])
    scaler = StandardScaler().fit(states[train])
    batch = min(BATCH, len(train))
    # A state and not a number: it is drawn from in every pass, so that each has an order of its own.
    network = MLPClassifier((UNITS,), batch_size=batch, random_state=np.random.RandomState(seed))
    scaled, kinds = scaler.transform(states[train]), np.unique(labels[train])
    for _ in range(max(PASSES, math.ceil(LEAST_STEPS / math.ceil(len(train) / batch)))):
        network.partial_fit(scaled, labels[train], classes=kinds)
    answers: NDArray[np.intp] = network.predict(scaler.transform(states[test]))
    return answers


def _read_layers(
    values: NDArray[np.float32],
    labels: NDArray[np.intp],
    draws: Sequence[Draw],
    workers: int,
    task: str,
    track: Track,
) -> list[list[Reading]]:
    """Readings by layer and seed."""
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_limits

    jobs = [(layer, drawn) for layer in range(len(values)) for drawn in draws]
    # Threads: the matrix products run in parallel, and no process has to import the models' libraries again.
    with threadpool_limits(1):
        probes = Parallel(workers, backend="threading", return_as="generator")(
            delayed(_read)(values[layer], labels, drawn) for layer, drawn in jobs
        )
        readings = list(track(probes, task, len(jobs)))
    return [readings[start : start + len(draws)] for start in range(0, len(readings), len(draws))]


def _read(states: NDArray[np.float32], labels: NDArray[np.intp], drawn: Draw) -> Reading:
    states = np.ascontiguousarray(states)
    answers = train_probe(states, labels, drawn.train, drawn.test, drawn.seed)
    random = train_probe(states, drawn.control, drawn.train, drawn.test, drawn.seed)
    control = _scores(drawn.control[drawn.test], random)["f1"]
    return Reading(**_scores(labels[drawn.test], answers), control=control)


def _scores(labels: NDArray[np.intp], answers: NDArray[np.intp]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "f1": float(f1_score(labels, answers, average="weighted", zero_division=0.0)),
        "accuracy": float(accuracy_score(labels, answers)),
        "mcc": float(matthews_corrcoef(labels, answers)),
    }


def _mean(layers: Sequence[Sequence[Reading]], name: str, count: int) -> Score:
    """The mean over layers, its error from the spread over seeds."""
    by_seed = np.array([[getattr(one, name) for one in layer] for layer in layers]).mean(0)
    stderr = float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else None
    return Score(float(by_seed.mean()), stderr, count)


def _passes(layer: Sequence[Reading]) -> bool:
    return bool(np.mean([one.selectivity for one in layer]) >= CHECK)


def _type(text: str, control: Control) -> str:
    if control == "text":
        return text
    words = text.lower().split()
    return next((word for word in reversed([w.strip(string.punctuation) for w in words]) if word), "")
