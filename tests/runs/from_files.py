"""Models in files, their recipes, and what two checkpoints of one recipe have to agree in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eckart.calibration.streams import Streams
from eckart.runs.facts import Outcome
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import Recipe, parse_recipe
from tiny import closed_model, tiny_text, tiny_tokenizer

BATCHED = How(batch_size=3)
# With steps of refinement, so that passes are there to be kept.
BEST: dict[str, Any] = {"method": "best", "refine": {"steps": 4}}


def put_model(folder: Path, model_type: str, **changes: Any) -> Path:
    """A folder with a tiny model in many files, its tokenizer and a calibration text."""
    closed_model(model_type, **changes).save_pretrained(folder / "model", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(folder / "model")
    documents = [{"text": tiny_text(5 + 7 * number % 20, seed=number)} for number in range(80)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


def recipe_of(place: Path, **changes: Any) -> Recipe:
    calibration = {"corpus": str(place / "train.jsonl"), "samples": 8, "length": 16}
    budget = {} if {"rules", "plan", "keep_total"} & changes.keys() else {"keep": 0.6}
    keys = {"method": "asvd-i", **budget, **changes}
    return parse_recipe({"model": str(place / "model"), "context": 16, "calibration": calibration, **keys})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "compression.json").read_text())
    return {key: value for key, value in facts.items() if key != "seconds"}


def check_same(folder: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Two checkpoints hold the same: tensors, configuration, facts and the files next to them."""
    ours, theirs = tensors_of(folder), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for name in ("config.json", "generation_config.json", "plan.json", "recipe.yaml", "tokenizer.json"):
        assert (folder / name).exists() == (expected / name).exists(), name
        if (folder / name).exists():
            assert (folder / name).read_text() == (expected / name).read_text(), name
    assert_close(facts_of(folder), facts_of(expected))
    assert (folder / "README.md").is_file()


def assert_close(value: Any, expected: Any) -> None:
    """The same plain data, numbers to within rounding."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_close(value[key], expected[key])
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for pair in zip(value, expected, strict=True):
            assert_close(*pair)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    else:
        assert value == expected


def both(
    place: Path, tmp_path: Path, how: How = BATCHED, tolerance: float = 1e-5, **changes: Any
) -> tuple[Outcome, Outcome]:
    """The recipe out of core and in memory; what they leave is the same."""
    recipe = recipe_of(place, **changes)
    outcome = compress_out_of_core(recipe, tmp_path / "out", how)
    expected = make_checkpoint(recipe, tmp_path / "expected", how)
    check_same(tmp_path / "out", tmp_path / "expected", tolerance)
    assert not list(tmp_path.glob(".out*"))
    assert dict(outcome.plan.ranks) == dict(expected.plan.ranks)
    assert outcome.summary == expected.summary
    assert outcome.recipe == expected.recipe
    return outcome, expected


class Killed(BaseException):
    """A kill, as far as a test in one process can see one: nothing catches it."""


@contextmanager
def killing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int) -> Iterator[None]:
    """Inside, the call of a function after so many others ends the run."""
    original, calls = getattr(module, name), []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) > after:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, count)
        yield


def resume_until_done(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int
) -> int:
    """Runs, each killed at the same call, until one comes through; how many were killed."""
    for killed in range(200):
        try:
            with killing(monkeypatch, module, name, after):
                compress_out_of_core(recipe, out, BATCHED, resume=True)
        except Killed:
            continue
        return killed
    raise AssertionError("no run gets on")


def note_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of each block that a stream has gone through."""
    passed: list[int] = []
    turn = Streams._turn

    def note(streams: Streams, name: str) -> None:
        passed.append(streams.number)
        turn(streams, name)

    monkeypatch.setattr(Streams, "_turn", note)
    return passed
