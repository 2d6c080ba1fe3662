"""The catalogue of baselines: names, settings, what each needs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eckart.compression.baselines import BASELINES, Baseline, baseline_options, build_baseline
from tiny import tiny_model, tiny_tokens

# The catalogue.


def test_the_catalogue() -> None:
    for name, entry in BASELINES.items():
        baseline = build_baseline(name)
        assert baseline == entry()
        assert baseline.name == name
        assert baseline.options == baseline_options(name)
        json.dumps(baseline.options)
    assert build_baseline("int4", {"group_size": 32}).options == {"group_size": 32}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int3", {}, r"unknown baseline 'int3'; did you mean 'int[48]'\? known: int8, int4, llm-pruner"),
        ("zzz", {}, "unknown baseline 'zzz'; known: int8"),
        ("int8", {"group_size": 3}, "baseline int8 has no setting 'group_size'; its settings: none"),
        ("int4", {"bits": 3}, "baseline int4 has no setting 'bits'; its settings: group_size"),
        ("int4", {"group_size": 8}, "group_size 8 is below 16"),
        ("llm-pruner", {"samples": 0}, "samples 0 is below 1"),
        ("llm-pruner", {"length": 1}, "length 1 is below 2"),
        ("llm-pruner", {"last": -1}, "last -1 is below 0"),
    ],
)
def test_bad_settings(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_baseline(name, options)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("int8", {"keep": 0.7}, "baseline int8 has one size; it takes no keep"),
        ("llm-pruner", {"tokens": tiny_tokens()}, r"keep None is not in \(0, 1\]"),
        ("llm-pruner", {"tokens": tiny_tokens(), "keep": 1.2}, r"keep 1.2 is not in \(0, 1\]"),
        ("llm-pruner", {"keep": 0.7}, "reads calibration text; give tokens"),
    ],
)
def test_what_a_baseline_needs(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_baseline(name).apply(tiny_model("llama"), **given)


def test_a_baseline_is_a_frozen_value() -> None:
    baseline: Baseline = build_baseline("int8")
    with pytest.raises(AttributeError):
        baseline.name = "other"  # type: ignore[misc]
