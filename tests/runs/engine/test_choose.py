"""An engine by its name: those of the table and no others, and one more by a row and a class."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import eckart
from eckart.allocation.search.loss_weights import Spread
from eckart.allocation.search.trials import ScoreModel, Team
from eckart.calibration.moments import BlockCalibration
from eckart.compression.cuts import Cut, CutRequest, FactorRequest
from eckart.evals.result import EvalResult
from eckart.lowrank import GradientMoments
from eckart.models.units import Unit
from eckart.runs.engine.base import CalibrationRequest, Engine, EvaluationRequest, SearchRequest
from eckart.runs.engine.choose import DEFAULT, ENGINES, Backend, open_engine
from eckart.runs.engine.local import HERE
from tiny import Run

PACKAGE = Path(eckart.__file__).parent


def test_engines_are_named(run: Run, place: Path, tmp_path: Path) -> None:
    for more, told in (
        (("--engine", "mpi"), "none of local, ray"),
        (("--address", "auto"), "say with --engine whose it is"),
        (("--engine", "ray", "--out-of-core"), "leave out --engine"),
    ):
        status, printed = run("compress", place / "llama", tmp_path / "out", "--keep", "0.5", *more)
        assert status == 2
        assert told in printed
    with open_engine() as engine:
        assert engine is HERE


def test_help_reads_the_table(run: Run) -> None:
    status, printed = run("eval", "--help")
    assert status == 0
    words = " ".join(printed.replace("\u2502", " ").split())
    for name, backend in ENGINES.items():
        assert f"{name} ({backend.about})" in words


def test_only_the_table_has_the_names() -> None:
    for file in PACKAGE.rglob("*.py"):
        if (PACKAGE / "runs" / "engine") not in file.parents:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            assert not set(ENGINES) & {text for text in texts if isinstance(text, str)}, file


def test_an_engine_that_lacks_something_cannot_be_made() -> None:
    class Half(Engine):
        """Has only a part."""

        def losses(self, request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
            return HERE.losses(request)

    with pytest.raises(TypeError, match="outcomes"):
        Half()  # type: ignore[abstract]


class Noting(Engine):
    """This process, which notes what it was asked for."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def calibrate_by_block(self, request: CalibrationRequest) -> Iterator[BlockCalibration]:
        self.notes.append("calibrate_by_block")
        return HERE.calibrate_by_block(request)

    def gather_gradients(self, request: CalibrationRequest) -> dict[str, GradientMoments]:
        self.notes.append("gather_gradients")
        return HERE.gather_gradients(request)

    def cut_units(self, request: CutRequest) -> Iterator[tuple[Unit, Cut]]:
        self.notes.append("cut_units")
        return HERE.cut_units(request)

    def losses(self, request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
        self.notes.append("losses")
        return HERE.losses(request)

    def team(self, request: SearchRequest, score: ScoreModel) -> AbstractContextManager[Team | None]:
        self.notes.append("team")
        return HERE.team(request, score)

    def probing(self, request: SearchRequest) -> AbstractContextManager[Spread | None]:
        self.notes.append("probing")
        return HERE.probing(request)

    def outcomes(self, request: EvaluationRequest) -> Iterator[EvalResult | ValueError]:
        self.notes.append("outcomes")
        return HERE.outcomes(request)


OPENED: list[tuple[str | None, int | None]] = []
NOTES: list[str] = []


@contextmanager
def open_noting(address: str | None, workers: int | None) -> Iterator[Engine]:
    """A new engine's opener; it refuses what it cannot use."""
    if workers == 7:
        raise ValueError("seven workers are too many")
    OPENED.append((address, workers))
    yield Noting(NOTES)


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more engine."""
    monkeypatch.setitem(ENGINES, "noting", Backend("this process, with notes", f"{__name__}:open_noting"))
    OPENED.clear()
    NOTES.clear()


def test_a_new_engine_is_a_class_and_a_row(run: Run, noting: None, place: Path, tmp_path: Path) -> None:
    """Recipes that need all of an engine are carried out by it, and give what this process gives."""
    allocations: dict[str, dict[str, Any]] = {
        "probes": {"name": "global", "weights": "probes"},
        "search": {"name": "sensitivity", "limit": 4, "score": f"perplexity:{place / 'test.txt'}"},
    }
    for name, allocation in allocations.items():
        recipe = {
            "model": str(place / "llama"),
            "method": {"name": "kfac" if name == "probes" else "asvd-i"},
            "keep": 0.6,
            "context": 16,
            "allocation": allocation,
            "calibration": {"corpus": str(place / "train.txt"), "samples": 8},
            "evaluate": [{"task": f"perplexity:{place / 'test.txt'}", "split": "sfsd-evaluation"}],
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        contents = []
        for engine in (DEFAULT, "noting"):
            out = tmp_path / f"{name}-{engine}"
            options = ["--engine", engine, "--no-cache", *(["--address", "there"] if engine == "noting" else [])]
            status, printed = run("run", tmp_path / "recipe.yaml", "--out", out, *options)
            assert status == 0, printed
            files = [out / "model/plan.json", out / "model/model.safetensors"]
            contents.append([file.read_bytes() for file in files])
        assert contents[0] == contents[1]
    assert OPENED == [("there", None)] * 2
    assert set(NOTES) == Engine.__abstractmethods__


def test_an_engine_refuses_what_it_cannot_use(run: Run, noting: None, place: Path) -> None:
    status, printed = run("eval", place / "llama", "--task", "cost", "--engine", "noting", "--workers", "7")
    assert status == 2
    assert "seven workers are too many" in printed
