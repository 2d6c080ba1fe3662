"""Compositions: what is done around a method, as data; what does not go together is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from eckart.allocation import Allocation
from eckart.allocation.search.surgical import PERPLEXITY_TOLERANCE, Tolerance
from eckart.compression.tuning.distillation import Distillation
from eckart.compression.tuning.refinement import Refinement
from eckart.lowrank import METHODS, build_method
from eckart.lowrank.catalogue import ANCHOR_SHRINKAGE
from eckart.runs.composition import COMPOSITIONS, Composition, best, composition_options

SCORE = "perplexity:builtin/prose"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": "per-role", "shares": {"mlp": 2, "attention": 1}},
        {"name": "effective-rank"},
        {"name": "global", "weights": "probes", "exact": True},
        {"name": "sensitivity", "score": SCORE, "limit": 4},
        {"name": "surgical", "score": "lm-eval:piqa", "tolerance": "0.5% per linear"},
        {"name": "surgical", "score": "stereoset", "tolerance": 0.01},
        {"name": "surgical", "score": SCORE, "tolerance": 0},
    ],
)
def test_an_allocation_survives_its_own_data(settings: dict[str, Any]) -> None:
    allocation = Allocation(**settings)
    assert Allocation(**allocation.model_dump()) == allocation
    assert (allocation.row.needs == "trials") == ("score" in settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "per-role"}, "per-role needs shares, such as {mlp: 2, attention: 1}"),
        ({"name": "global", "shares": {"mlp": 2}}, "shares goes with per-role, not with global: leave it out"),
        ({"name": "surgical"}, "surgical needs score, such as perplexity:wikitext2 or lm-eval:piqa"),
        ({"name": "sensitivity"}, "sensitivity needs score, such as"),
        ({"name": "global", "score": SCORE}, "score goes with sensitivity and surgical, not with global: leave it out"),
        ({"name": "global", "limit": 3}, "limit goes with sensitivity and surgical, not with global"),
        ({"name": "surgical", "score": "perplexty:ptb"}, "did you mean 'perplexity'"),
        ({"name": "surgical", "score": "perplexity"}, "names no corpus"),
        ({"name": "surgical", "score": "cost"}, "'cost' is no score to search by"),
        ({"name": "surgical", "score": "divergence:ptb"}, "is no score to search by"),
        ({"name": "surgical", "score": "similarity:ptb"}, "is no score to search by"),
        ({"name": "surgical", "score": SCORE, "tolerance": "a little"}, "tolerance 'a little' is none of"),
        ({"name": "sensitivity", "score": SCORE, "tolerance": "5%"}, "tolerance goes with surgical, not with"),
        ({"name": "uniform", "exact": True}, "exact goes with global, not with uniform"),
        ({"name": "surgical", "score": SCORE, "weights": "probes"}, "weights goes with global, not with surgical"),
        ({"name": "surgical", "score": SCORE, "limit": 0}, "greater than 0"),
        ({"name": "best"}, "unknown allocation 'best'; known: uniform, per-role"),
        ({"name": "global", "wieghts": "probes"}, "wieghts"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Allocation(**settings)
    assert message in str(caught.value)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("score", "tolerance", "allowed"),
    [
        (SCORE, None, PERPLEXITY_TOLERANCE),
        ("lm-eval:piqa", None, Tolerance(0.0, relative=False)),
        ("lm-eval:piqa", "5%", Tolerance(0.05)),
        (SCORE, 0.02, Tolerance(0.02, relative=False)),
        (SCORE, "0.3% per linear", Tolerance(0.003, per_site=True)),
    ],
)
def test_the_tolerance_is_what_is_said_or_the_authors(score: str, tolerance: Any, allowed: Tolerance) -> None:
    allocation = Allocation(name="surgical", score=score, tolerance=tolerance)
    assert allocation.allowed == allowed
    whole = allocation.spelled_out()
    assert whole.tolerance is not None
    assert Tolerance.parse(whole.tolerance) == whole.allowed == allowed
    assert whole.spelled_out() == whole
    for name in ("uniform", "global"):
        assert Allocation(name=name).spelled_out() == Allocation(name=name)  # type: ignore[arg-type]


def test_best_is_everything_together() -> None:
    composition = best("high", shrink_out=0.5)
    assert (composition.method.name, composition.method.options["shrink_out"]) == ("kfac", 0.5)
    assert (composition.allocation.name, composition.layout, composition.order) == ("global", "pivoted", "anchored")
    assert composition.refinement == Refinement()
    assert composition.holds_out
    assert composition.distillation is None
    distilled = COMPOSITIONS["best-distilled"](shrink_out=0.5)
    assert distilled.distillation == Distillation()
    assert replace(distilled, method=composition.method, distillation=None) == composition
    assert next(iter(COMPOSITIONS)) == "best", "the first is the default"


@pytest.mark.parametrize("name", METHODS)
def test_the_order_decides_how_a_method_factors(name: str) -> None:
    method = build_method(name)
    assert Composition(method).in_order == method
    assert Composition(method, order="sequential").in_order == method
    assert Composition(method, order="anchored").in_order == method.anchored(ANCHOR_SHRINKAGE)
    refit = Composition(method, refit=True)
    assert refit.in_order.needs == method.needs | {"second_moment"}, "nothing else could be refit on"
    assert refit.holds_out
    assert not Composition(method).holds_out


def test_settings_are_those_of_the_method() -> None:
    assert composition_options("best") == composition_options("kfac")
    assert composition_options("nsvd-i") == {"share": 0.95}
    with pytest.raises(ValueError, match=r"unknown method 'bets'; did you mean 'best'\? known: best, .*, svd, "):
        composition_options("bets")


def test_in_words() -> None:
    plain = Composition(build_method("svd"))
    assert plain.describe() == "Ranks: uniform, layout: plain, order: one-shot"
    assert plain.describe("by rules").startswith("Ranks: by rules, ")
    whole = Composition(
        build_method("svd"),
        Allocation(name="surgical", score=SCORE),
        "pivoted",
        "sequential",
        joint=True,
        refit=True,
        refinement=Refinement(steps=7),
        distillation=Distillation(steps=9),
    ).describe()
    for part in ("surgical", "pivoted", "sequential", "shared", "refit", "7 steps", "9 steps"):
        assert part in whole
