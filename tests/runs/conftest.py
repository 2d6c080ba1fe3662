"""A tiny model in many files, for what is compressed from files to files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from eckart.runs import in_memory, out_of_core
from eckart.runs.in_memory import make_checkpoint
from tiny import tiny_tokenizer

from .from_files import BATCHED, BEST, put_model, recipe_of


@pytest.fixture
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer, whatever the model: some families' names stand for a tokenizer of their own."""
    for module in (out_of_core, in_memory):
        monkeypatch.setattr(module, "load_tokenizer", lambda _path, **_options: tiny_tokenizer())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_model(tmp_path_factory.mktemp("outofcore"), "llama")


@pytest.fixture
def own_place(place: Path, tmp_path: Path) -> Path:
    """The place, for a test that damages it."""
    return shutil.copytree(place, tmp_path / "own")


@pytest.fixture(scope="module")
def two_passes() -> Iterator[None]:
    """In memory in two passes, as out of core: one sums inputs in float32, which a cut between near values shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eckart.calibration.moments.IN_ONE_PASS", 0)
        yield


@pytest.fixture(scope="module")
def expected(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `best` makes in memory in a run that nothing stopped and that keeps nothing."""
    folder = tmp_path_factory.mktemp("expected") / "best"
    make_checkpoint(recipe_of(place, **BEST), folder, BATCHED)
    return folder
