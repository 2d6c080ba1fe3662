"""Agreement: a table counted by hand, and laws for any pair of results."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.evals.agreement import agreement, has_answers
from eckart.evals.result import EvalResult


def result_of(answers: list[Any], right: list[float], **changes: Any) -> EvalResult:
    fields: dict[str, Any] = {
        "task": "boolq",
        "metric": "acc",
        "value": sum(right) / max(1, len(right)),
        "stderr": None,
        "n": len(right),
        "settings": {"shots": 0, "split": "validation"},
        "examples": right,
        "details": {"answers": answers},
    }
    return EvalResult(**{**fields, **changes})


def test_counts_by_hand() -> None:
    dense = result_of([0, 1, 2, 0, 1, 3, 0, 1], [1, 1, 0, 0, 0, 1, 1, 0])
    compressed = result_of([0, 2, 2, 1, 0, 3, 1, 3], [1, 0, 0, 1, 0, 1, 0, 0])
    # Answers differ at 1 (unlearned), 3 (learned), 4 (wrong both times), 6 (unlearned), 7 (wrong both times).
    result = agreement(dense, compressed)
    assert (result.task, result.metric, result.better, result.n) == ("agreement:boolq", "disagreement", "lower", 8)
    assert result.value == 5 / 8
    assert result.stderr == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 7))
    assert result.examples == [0, 1, 0, 1, 1, 0, 1, 1]
    assert result.details == {"learned": [3], "unlearned": [1, 6]}
    values = {name: score.value for name, score in result.scores.items()}
    assert values == pytest.approx(
        {
            "accuracy.dense": 4 / 8,
            "accuracy.compressed": 3 / 8,
            "delta": -1 / 8,
            "learned": 1,
            "unlearned": 2,
            "p_value": 1,  # one or two of three flips to either side: every outcome is as likely or less
        }
    )
    # The differences are -1 twice, 1 once, 0 five times, around a mean of -1/8.
    squares = 2 * (-1 + 1 / 8) ** 2 + (1 + 1 / 8) ** 2 + 5 * (1 / 8) ** 2
    assert result.scores["delta"].stderr == pytest.approx(math.sqrt(squares / 7 / 8))
    assert result.scores["accuracy.dense"].stderr == pytest.approx(math.sqrt(1 / 4 / 7))
    assert result.settings == dense.settings
    assert EvalResult.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    ("learned", "unlearned", "expected"), [(0, 0, 1), (0, 6, 2 / 2**6), (1, 6, 16 / 2**7), (3, 3, 1)]
)
def test_mcnemars_test_by_hand(learned: int, unlearned: int, expected: float) -> None:
    """Two-sided: twice the tail of the binomial with one half, at most 1."""
    before = [0.0] * learned + [1.0] * unlearned + [1.0]
    after = [1.0] * learned + [0.0] * unlearned + [1.0]
    result = agreement(result_of(before, before), result_of(after, after))
    assert result.read("p_value") == pytest.approx(expected)
    assert result.scores["p_value"].n == learned + unlearned


@st.composite
def pairs(draw: st.DrawFn) -> tuple[EvalResult, EvalResult]:
    golds = draw(st.lists(st.integers(0, 3), min_size=1, max_size=40))
    results = []
    for _ in range(2):
        answers = [draw(st.integers(0, 3)) for _ in golds]
        results.append(result_of(answers, [float(answer == gold) for answer, gold in zip(answers, golds, strict=True)]))
    return results[0], results[1]


@given(pairs())
def test_laws(pair: tuple[EvalResult, EvalResult]) -> None:
    there, back = agreement(*pair), agreement(*reversed(pair))
    read = there.read
    assert read("delta") == pytest.approx((read("learned") - read("unlearned")) / there.n)
    assert read("delta") == pytest.approx(read("accuracy.compressed") - read("accuracy.dense"))
    assert there.value * there.n >= read("learned") + read("unlearned") - 1e-9
    assert there.value >= abs(read("delta")) - 1e-9
    assert 0 <= read("p_value") <= 1
    assert (there.stderr is None) == (there.n == 1)
    # The other way round: learning is unlearning.
    assert (back.value, back.stderr, back.examples) == (there.value, there.stderr, there.examples)
    assert back.read("delta") == -read("delta")
    assert back.scores["delta"].stderr == pytest.approx(there.scores["delta"].stderr)
    assert (back.details["learned"], back.details["unlearned"]) == (
        there.details["unlearned"],
        there.details["learned"],
    )
    assert back.read("p_value") == read("p_value")


@given(pairs())
def test_a_result_agrees_with_itself(pair: tuple[EvalResult, EvalResult]) -> None:
    result = agreement(pair[0], pair[0])
    assert result.value == result.read("delta") == result.read("learned") == result.read("unlearned") == 0
    assert result.read("p_value") == 1


def test_answers_may_be_anything_that_json_holds() -> None:
    result = agreement(result_of(["yes", [1, 2]], [1, 0]), result_of(["yes", [1, 3]], [1, 0]))
    assert result.examples == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "piqa"}, "results of boolq and piqa cannot be compared"),
        ({"settings": {"shots": 5, "split": "validation"}}, "boolq: the results differ in 'shots', 0 and 5"),
        ({"settings": {"shots": 0}}, "differ in 'split', 'validation' and none"),
        ({"settings": {"shots": 0, "split": "validation", "limit": 9}}, "differ in 'limit', none and 9"),
        ({"examples": [1.0]}, "2 examples of the dense model, 1 of the compressed one"),
        ({"details": {}}, r"the compressed model's result has no details\['answers'\]"),
        ({"details": {"answers": [1]}}, "the compressed model's result has 1 answers to 2 examples"),
        ({"examples": [1.0, 0.5]}, r"the compressed model's examples are not all right \(1\) or wrong \(0\)"),
        ({"examples": [1.0, math.nan]}, "are not all right"),
        (
            {"examples": [1.0, 1.0]},
            "example 1 has the same answer in both results, right in one and wrong in the other",
        ),
    ],
)
def test_results_that_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreement(result_of([0, 1], [1, 0]), result_of([0, 1], [1, 0], **changes))


def test_results_without_examples() -> None:
    with pytest.raises(ValueError, match="the dense model's result has no outcomes per example"):
        agreement(result_of([], []), result_of([], []))
    with pytest.raises(ValueError, match=r"the dense model's result has no details\['answers'\]"):
        agreement(result_of([0], [1], details={}), result_of([0], [1]))


def test_only_answers_that_are_right_or_wrong_can_be_compared() -> None:
    def result(examples: list[float], **details: object) -> EvalResult:
        return EvalResult("t", "acc", 0.5, None, len(examples), examples=examples, details=dict(details))

    assert has_answers(result([0.0, 1.0], answers=[0, 1]))
    assert not has_answers(result([0.3, 1.0], answers=[0, 1])), "a probability is no answer"
    assert not has_answers(result([0.0, 1.0]))
    assert not has_answers(result([], answers=[]))
    assert not has_answers(None)
