"""Agreement: does a compressed model answer as the dense one did, example by example?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from eckart.evals.result import TRAITS, EvalResult, Score


def agreement(dense: EvalResult, compressed: EvalResult) -> EvalResult:
    """Compare the answers of two models to the same examples, as SFSD's Table 3 does.

    The disagreement is the share of examples whose answers differ. It counts changes among wrong answers too, so it
    is never less than |delta|; accuracy alone hides what was learned (wrong before, right now) and unlearned.

    Args:
        dense, compressed: results of one task with the same settings. `examples` holds 1 for a right answer and 0 for
            a wrong one, `details["answers"]` the option that was chosen, both one per example in the same order.

    Returns:
        value = disagreement; examples = 1 where the answers differ; details = indices of the examples "learned" and
        "unlearned". Scores:
            accuracy.dense, accuracy.compressed;
            delta: compressed minus dense, with the paired standard error, that of the mean of the differences;
            learned, unlearned: counts; delta is their difference over n;
            p_value: of McNemar's exact test, that learning and unlearning are equally likely.

    Raises:
        ValueError: other tasks, settings or numbers of examples; answers or outcomes that are missing; one answer
            that is right in one result and wrong in the other, which then read different examples.
    """
    _check_comparable(dense, compressed)
    answers = [_read_answers(result, which) for result, which in ((dense, "dense"), (compressed, "compressed"))]
    before, after = (_read_outcomes(result, which) for result, which in ((dense, "dense"), (compressed, "compressed")))
    count = len(before)
    differs = np.array([one != other for one, other in zip(*answers, strict=True)])
    impossible = (before != after) & ~differs
    if impossible.any():
        raise ValueError(
            f"{dense.task}: example {int(impossible.argmax())} has the same answer in both results, right in one and "
            "wrong in the other; they are not of the same examples"
        )
    learned, unlearned = np.flatnonzero(after > before), np.flatnonzero(after < before)
    flips = len(learned) + len(unlearned)
    p_value = float(binomtest(len(learned), flips, 0.5).pvalue) if flips else 1.0
    disagreement = differs.astype(np.float64)
    return EvalResult(
        task=f"agreement:{dense.task}",
        metric="disagreement",
        value=float(disagreement.mean()),
        stderr=_stderr(disagreement),
        n=count,
        traits=TRAITS["agreement"],
        settings=dict(dense.settings),
        examples=disagreement.tolist(),
        scores={
            "accuracy.dense": Score(float(before.mean()), _stderr(before), count),
            "accuracy.compressed": Score(float(after.mean()), _stderr(after), count),
            "delta": Score(float((after - before).mean()), _stderr(after - before), count),
            "learned": Score(float(len(learned)), None, count),
            "unlearned": Score(float(len(unlearned)), None, count),
            "p_value": Score(p_value, None, flips),
        },
        details={"learned": learned.tolist(), "unlearned": unlearned.tolist()},
    )


def has_answers(result: EvalResult | None) -> bool:
    """Whether a result is of questions that are answered rightly or wrongly, so that two can be compared."""
    if result is None or not isinstance(result.details.get("answers"), list):
        return False
    return bool(result.examples) and all(outcome in (0, 1) for outcome in result.examples)


def _check_comparable(dense: EvalResult, compressed: EvalResult) -> None:
    if dense.task != compressed.task:
        raise ValueError(f"results of {dense.task} and {compressed.task} cannot be compared: give two of one task")
    missing = object()
    for name in dict.fromkeys([*dense.settings, *compressed.settings]):
        one, other = dense.settings.get(name, missing), compressed.settings.get(name, missing)
        if one != other:
            shown = " and ".join("none" if value is missing else repr(value) for value in (one, other))
            raise ValueError(
                f"{dense.task}: the results differ in {name!r}, {shown}: evaluate both models with the same settings"
            )
    if len(dense.examples) != len(compressed.examples):
        raise ValueError(
            f"{dense.task}: {len(dense.examples)} examples of the dense model, {len(compressed.examples)} of the "
            "compressed one: evaluate both on the same examples"
        )


def _read_answers(result: EvalResult, which: str) -> list[Any]:
    answers = result.details.get("answers")
    if not isinstance(answers, list):
        raise ValueError(f"{result.task}: the {which} model's result has no details['answers'] to compare")
    if len(answers) != len(result.examples):
        raise ValueError(
            f"{result.task}: the {which} model's result has {len(answers)} answers to {len(result.examples)} examples"
        )
    return answers


def _read_outcomes(result: EvalResult, which: str) -> NDArray[np.float64]:
    outcomes = np.array(result.examples, dtype=np.float64)
    if not len(outcomes):
        raise ValueError(f"{result.task}: the {which} model's result has no outcomes per example to compare")
    if not np.isin(outcomes, (0, 1)).all():
        raise ValueError(f"{result.task}: the {which} model's examples are not all right (1) or wrong (0)")
    return outcomes


def _stderr(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
