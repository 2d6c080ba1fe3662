"""Profiles: what a probing result says of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from eckart.evals.result import CHECK, EvalResult, Score
from eckart.reports.rows import tasks_of
from eckart.reports.runs import Collection


@dataclass(frozen=True)
class Layer:
    """Probes of one layer.

    Attributes:
        number: 0 is the embeddings, 1 ... L the blocks.
        f1: weighted F1 of the task; its error, as all others, is over the seeds.
        control: weighted F1 of the control task.
        selectivity: f1 - control.
        accuracy, mcc: of the task; None where the result does not say.
        passes: selectivity is at least what the result says, 0.2.
    """

    number: int
    f1: Score
    control: Score
    selectivity: Score
    accuracy: float | None
    mcc: float | None
    passes: bool


def layers_of(result: EvalResult) -> tuple[Layer, ...]:
    """The layers of a probing result, from the embeddings up.

    Raises:
        ValueError: no layer, or one without its control or selectivity; the message names the task.
    """
    numbers = sorted(int(name.partition(".")[2]) for name in result.scores if name.startswith("f1."))
    if not numbers:
        raise ValueError(f"{result.task} has no scores f1.0, f1.1, ...: it is no result of a probing of layers")
    details = {item.get("layer"): item for item in result.details.get("layers") or ()}
    layers = []
    for number in numbers:
        f1, control, selectivity = (_score(result, f"{name}.{number}") for name in ("f1", "control", "selectivity"))
        detail = details.get(number, {})
        passes = bool(detail.get("passes", selectivity.value >= check_of(result)))
        layers.append(Layer(number, f1, control, selectivity, _mean(detail, "accuracy"), _mean(detail, "mcc"), passes))
    return tuple(layers)


def blocks_of(result: EvalResult) -> tuple[Layer, ...]:
    """The same without the embeddings, which no compression of blocks changes."""
    return tuple(layer for layer in layers_of(result) if layer.number > 0)


def probings(collection: Collection) -> list[str]:
    """The probing tasks of the compressed models, then those that only dense models have."""
    return tasks_of(collection, "probing")


def check_of(result: EvalResult) -> float:
    """By how much a layer's F1 has to be above its control's."""
    return float(result.details.get("check", CHECK))


def _score(result: EvalResult, name: str) -> Score:
    if name not in result.scores:
        raise ValueError(f"{result.task} has no score {name!r}, though it has F1 of that layer")
    return result.scores[name]


def _mean(detail: Mapping[str, object], name: str) -> float | None:
    values = detail.get(name)
    return fmean(values) if isinstance(values, list) and values else None
