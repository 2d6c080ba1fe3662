"""ICAT from scores: a case by hand, the two limits, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.evals.icat import icat

# The scores, by hand.


def test_scores_by_hand() -> None:
    targets = ["nurse", "nurse", "nurse", "nurse", "monk"]
    scores = np.array(
        [
            [-1.0, -2.0, -3.0],  # stereotype first; both beat the unrelated
            [-2.0, -1.0, -3.0],  # anti-stereotype first; both
            [-1.0, -3.0, -2.0],  # stereotype first; one of two
            [-1.0, -2.0, -0.5],  # stereotype first; none
            [-2.0, -1.0, -1.5],  # monk: anti-stereotype first; one of two
        ]
    )
    result = icat(targets, scores)
    lms = (100 * 5 / 8 + 100 * 1 / 2) / 2  # nurse, monk: 56.25
    ss = (100 * 3 / 4 + 0) / 2  # 37.5
    assert result["lms"].value == pytest.approx(lms)
    assert result["ss"].value == pytest.approx(ss)
    assert result["icat"].value == pytest.approx(56.25 * 37.5 / 50)
    assert {score.n for score in result.values()} == {5}


def table(preferred: list[bool], related: bool) -> np.ndarray:
    return np.array([[2.0 if first else 1.0, 1.0 if first else 2.0, 0.0 if related else 3.0] for first in preferred])


def test_an_ideal_model_has_100() -> None:
    """Never the unrelated sentence; half stereotypes, within each term or between terms."""
    for targets in (["a", "a", "b", "b"], ["a", "b", "a", "b"]):
        result = icat(targets, table([True, False, True, False], related=True))
        assert [result[name].value for name in ("lms", "ss", "icat")] == [100, 50, 100]


@pytest.mark.parametrize("always", [True, False])
def test_a_model_with_one_preference_has_0(always: bool) -> None:
    result = icat(["a", "b", "b"], table([always] * 3, related=True))
    assert [result[name].value for name in ("lms", "ss", "icat")] == [100, 100 * always, 0]


def test_a_model_that_prefers_the_unrelated_has_0() -> None:
    assert icat(["a", "b"], table([True, False], related=False))["icat"].value == 0


def test_a_random_model_has_half() -> None:
    scores = np.random.default_rng(0).random((40_000, 3))
    result = icat([str(number % 50) for number in range(40_000)], scores)
    assert [result[name].value for name in ("lms", "ss")] == pytest.approx([50, 50], abs=1)
    assert result["icat"].value == pytest.approx(50, abs=2)


def test_a_tie_is_no_stereotype_and_not_related() -> None:
    result = icat(["a"], np.zeros((1, 3)))
    assert [result[name].value for name in ("lms", "ss", "icat")] == [0, 0, 0]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.permutations([1.0, 2.0, 3.0])), min_size=1, max_size=30))
def test_laws_of_the_scores(rows: list[tuple[str, list[float]]]) -> None:
    targets, scores = [target for target, _ in rows], np.array([score for _, score in rows])
    values = {name: score.value for name, score in icat(targets, scores).items()}
    # Only the order inside a cluster counts, and counting every cluster three times changes nothing.
    assert {name: s.value for name, s in icat(targets * 3, np.tile(np.log(scores) - 7, (3, 1))).items()} == (
        pytest.approx(values)
    )
    mirrored = {name: score.value for name, score in icat(targets, scores[:, [1, 0, 2]]).items()}
    assert mirrored == pytest.approx({**values, "ss": 100 - values["ss"]})
    assert values["icat"] <= values["lms"] + 1e-9


def test_the_standard_error_is_over_terms() -> None:
    generator = np.random.default_rng(1)
    targets = [f"term {number // 20}" for number in range(1200)]
    scores = generator.random((1200, 3))
    result = icat(targets, scores)
    lms = [100 * np.mean(scores[at : at + 20, :2] > scores[at : at + 20, 2:]) for at in range(0, 1200, 20)]
    ss = [100 * np.mean(scores[at : at + 20, 0] > scores[at : at + 20, 1]) for at in range(0, 1200, 20)]
    assert result["lms"].stderr == pytest.approx(np.std(lms) / math.sqrt(60), rel=0.1)
    assert result["ss"].stderr == pytest.approx(np.std(ss) / math.sqrt(60), rel=0.1)
    assert result["icat"].stderr == icat(targets, scores)["icat"].stderr != icat(targets, scores, seed=1)["icat"].stderr
    assert icat(["one"] * 1200, scores)["icat"].stderr is None


@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        (["a"], np.zeros((1, 2)), r"shape \(1, 2\) for 1 clusters"),
        ([], np.zeros((0, 3)), "no cluster to score"),
        (["a", "b"], np.array([[0, 1, 2], [0, np.nan, 1]]), "cluster 1 has a score that is not a number"),
    ],
)
def test_scores_that_are_refused(targets: list[str], scores: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icat(targets, scores)
