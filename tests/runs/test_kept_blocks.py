"""In memory: a killed walk goes on from its finished blocks, which the cache keeps until the checkpoint is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eckart.calibration import gradients, unfinished
from eckart.compression.tuning.refinement import Refinement
from eckart.data.tokens import Rows
from eckart.runs import in_memory, workbench
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.kept_blocks import KeptBlocks
from tiny import BLOCKS

from .from_files import BATCHED, BEST, Killed, check_same, killing, note_blocks, recipe_of

pytestmark = pytest.mark.usefixtures("any_tokenizer")


def cached(tmp_path: Path) -> How:
    return replace(BATCHED, cache=tmp_path / "cache")


def note_refined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of each block that is refined."""
    refined: list[int] = []
    refine = Refinement.__call__

    def note(self: Refinement, number: int, *rest: Any) -> Any:
        refined.append(number)
        return refine(self, number, *rest)

    monkeypatch.setattr(Refinement, "__call__", note)
    return refined


def files_of(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("blocks/*/*/block-*.safetensors"))


def test_a_kill_costs_one_block(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path) -> None:
    recipe, out, how = recipe_of(place, **BEST), tmp_path / "out", cached(tmp_path)
    with pytest.raises(Killed), killing(monkeypatch, Refinement, "__call__", 2):
        make_checkpoint(recipe, out, how)
    assert [file.name for file in files_of(tmp_path)] == ["block-000.safetensors", "block-001.safetensors"]
    refined, passed = note_refined(monkeypatch), note_blocks(monkeypatch)
    monkeypatch.setattr(workbench, "rank", None)  # the ranks are there: no linear is factored for its losses again
    outcome = make_checkpoint(recipe, out, how)
    assert refined == [2]
    assert passed == [0, 0, 1, 1, 2]  # both streams, and of the last block the dense one
    assert [report.place for report in outcome.passes] == [f"block {number}" for number in range(BLOCKS)]
    check_same(out, expected, 0)
    assert not list((tmp_path / "cache" / "blocks").iterdir())


def test_a_kill_while_gradients_are_gathered_costs_one_sample(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in ((unfinished, "LEAST", 0.0), (unfinished, "TIMES", 0.0), (gradients, "ACTIVATIONS", 1)):
        monkeypatch.setattr(module, name, value)  # a sample and a write at a time
    recipe, out, cache = recipe_of(place, method="best"), tmp_path / "out", tmp_path / "cache"
    asked: list[int] = []
    ask = gradients.Loss.ask

    def note(self: gradients.Loss, rows: Rows) -> gradients.Batch:
        asked.append(len(rows.ids))
        return ask(self, rows)

    monkeypatch.setattr(gradients.Loss, "ask", note)
    make_checkpoint(recipe, tmp_path / "expected", BATCHED)
    samples = len(asked)
    with pytest.raises(Killed), killing(monkeypatch, gradients.Loss, "gradient", 2):
        make_checkpoint(recipe, out, cached(tmp_path))
    assert len(list(cache.rglob("unfinished*"))) == 1
    asked.clear()
    make_checkpoint(recipe, out, cached(tmp_path))
    assert len(asked) == samples - 2
    check_same(out, tmp_path / "expected", 0)
    assert not list(cache.rglob("unfinished*"))


@pytest.mark.parametrize(
    "keys", [{"order": "sequential", "joint": True}, {"order": "anchored", "refit": True}], ids=str
)
def test_other_walks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    recipe, how = recipe_of(place, **keys), cached(tmp_path)
    make_checkpoint(recipe, tmp_path / "expected", BATCHED)
    with pytest.raises(Killed), killing(monkeypatch, KeptBlocks, "_keep", 1):
        make_checkpoint(recipe, tmp_path / "out", how)
    make_checkpoint(recipe, tmp_path / "out", how)
    check_same(tmp_path / "out", tmp_path / "expected", 0)


def test_a_kill_while_saving_costs_no_block(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
) -> None:
    recipe, out, how = recipe_of(place, **BEST), tmp_path / "out", cached(tmp_path)
    with pytest.raises(Killed), killing(monkeypatch, in_memory, "save", 0):
        make_checkpoint(recipe, out, how)
    passed = note_blocks(monkeypatch)
    make_checkpoint(recipe, out, how)
    assert passed == []
    check_same(out, expected, 0)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("damage", ["flipped", "shortened"])
def test_a_damaged_block_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path, number: int, damage: str
) -> None:
    recipe, out, how = recipe_of(place, **BEST), tmp_path / "out", cached(tmp_path)
    with pytest.raises(Killed), killing(monkeypatch, Refinement, "__call__", 2):
        make_checkpoint(recipe, out, how)
    data = bytearray(files_of(tmp_path)[number].read_bytes())
    data[-5] ^= 1
    files_of(tmp_path)[number].write_bytes(bytes(data if damage == "flipped" else data[:-5]))
    with pytest.warns(UserWarning, match=f"block-00{number}.safetensors is damaged"):
        make_checkpoint(recipe, out, how)
    check_same(out, expected, 0)


def test_another_recipe_or_place_takes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
) -> None:
    how = cached(tmp_path)
    with pytest.raises(Killed), killing(monkeypatch, Refinement, "__call__", 2):
        make_checkpoint(recipe_of(place, **BEST), tmp_path / "out", how)
    before = files_of(tmp_path)
    passed = note_blocks(monkeypatch)
    make_checkpoint(recipe_of(place, **{**BEST, "refine": {"steps": 2}}), tmp_path / "out", how)
    make_checkpoint(recipe_of(place, **BEST), tmp_path / "other", how)
    assert files_of(tmp_path) == before
    assert passed == [0, 0, 1, 1, 2] * 2
    check_same(tmp_path / "other", expected, 0)


def test_damaged_ranks_are_measured_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
) -> None:
    recipe, out, how = recipe_of(place, **BEST), tmp_path / "out", cached(tmp_path)
    with pytest.raises(Killed), killing(monkeypatch, Refinement, "__call__", 2):
        make_checkpoint(recipe, out, how)
    (ranks,) = (tmp_path / "cache").glob("blocks/*/ranks.json")
    text = ranks.read_text()
    assert "down_proj" in text
    ranks.write_text(text.replace("down_proj", "down_poor", 1))
    refined = note_refined(monkeypatch)
    with pytest.warns(UserWarning, match=r"ranks.json is damaged"):
        make_checkpoint(recipe, out, how)
    assert refined == [2]
    check_same(out, expected, 0)


def test_a_real_kill(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path) -> None:
    """SIGKILL, once a block is there."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(place, **BEST).to_yaml())
    code = (
        "import sys, time; from pathlib import Path; from eckart.runs import in_memory, kept_blocks\n"
        "from eckart.runs.how import How; from eckart.runs.recipe import load_recipe\n"
        "keep = kept_blocks.KeptBlocks._keep\n"
        "def slow(*arguments): keep(*arguments); time.sleep(60)\n"
        "kept_blocks.KeptBlocks._keep = slow\n"
        "how = How(batch_size=3, cache=Path(sys.argv[3]))\n"
        "in_memory.make_checkpoint(load_recipe(sys.argv[1]), Path(sys.argv[2]), how)\n"
    )
    out, cache = tmp_path / "out", tmp_path / "cache"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as the tests: bits follow threads
    child = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out), str(cache)], env=one_thread)
    try:
        deadline = time.monotonic() + 240
        while not files_of(tmp_path):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists()
    refined = note_refined(monkeypatch)
    make_checkpoint(recipe_of(place, **BEST), out, cached(tmp_path))
    assert refined == [1, 2]
    check_same(out, expected, 0)
