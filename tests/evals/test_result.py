"""Results in files: what they carry, and how older ones are read."""

from __future__ import annotations

import json

import pytest

from eckart.evals.catalogue import EVALUATIONS
from eckart.evals.result import TRAITS, EvalResult, Score, Traits, traits_of
from eckart.evals.task import Task


@pytest.mark.parametrize("kind", TRAITS)
def test_a_result_written_before_traits_has_those_of_its_name(kind: str) -> None:
    result = EvalResult(f"{kind}:x@sfsd-search", "value", 0.5, None, 4, scores={"more": Score(0.1)})
    data = json.loads(result.to_json())
    assert data.pop("traits")["section"] == TRAITS[kind].section
    old = EvalResult.from_json(json.dumps(data))
    assert old == result
    assert (old.traits, old.better) == (TRAITS[kind], TRAITS[kind].better)


def test_a_result_of_an_unknown_name_keeps_what_it_says() -> None:
    old = EvalResult.from_json(
        '{"task": "else:x", "metric": "m", "value": 1, "stderr": null, "n": 1, "better": "lower"}'
    )
    assert (old.traits, old.better) == (Traits(), "lower")
    assert traits_of("stereoset@sfsd-search") == TRAITS["stereoset"]


def test_what_a_result_says_itself_wins() -> None:
    traits = Traits("cost", "higher", None, quality=False, ratio=True, of="dense", shown=("a", "b"))
    result = EvalResult("perplexity:x", "m", 1.0, None, 1, traits=traits)
    assert (result.better, EvalResult.from_json(result.to_json())) == ("higher", result)
    assert EvalResult("perplexity:x", "m", 1.0, None, 1, "higher").better == "higher"


@pytest.mark.parametrize("kind", sorted(TRAITS.keys() & EVALUATIONS.keys()))
def test_rows_and_old_results_are_read_alike(kind: str) -> None:
    """One place: a row of an evaluation that older results know has the traits that those are read with."""
    assert EVALUATIONS[kind].traits is TRAITS[kind]


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 1}, {"length": -5}, {"limit": 0}, {"shots": -1}])
def test_a_task_of_no_length_is_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"perplexity:ptb: {name} {wrong[name]} is below"):
        Task("perplexity:ptb", **wrong)  # type: ignore[arg-type]
