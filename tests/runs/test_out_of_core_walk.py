"""Out of core in other orders, with ranks by losses and refined blocks: as in memory, and a kill costs one block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eckart.calibration.doors import whole_doors
from eckart.calibration.streams import Streams
from eckart.compression.tuning.refinement import Refinement
from eckart.runs import out_of_core, recorded_losses
from eckart.runs.out_of_core import compress_out_of_core
from tiny import BLOCKS, MIXTURE_CONFIGS

from .from_files import (
    BATCHED,
    BEST,
    Killed,
    both,
    check_same,
    killing,
    note_blocks,
    put_model,
    recipe_of,
    resume_until_done,
)

pytestmark = pytest.mark.usefixtures("any_tokenizer", "two_passes")

WEIGHTED = {"name": "kfac", "options": {"weighted": True}}


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "opt", "gpt2", "gpt_neox", "bert"])
def test_best_comes_out_as_in_memory(tmp_path: Path, model_type: str) -> None:
    head = {"head": "masked"} if model_type == "bert" else {}
    outcome, in_memory = both(put_model(tmp_path, model_type, **head), tmp_path, **BEST)
    assert outcome.passes == in_memory.passes
    assert [report.place for report in outcome.passes] == [f"block {number}" for number in range(BLOCKS)]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MIXTURE_CONFIGS))
def test_every_mixture_comes_out_as_in_memory(tmp_path: Path, model_type: str) -> None:
    both(put_model(tmp_path, model_type), tmp_path, tolerance=1e-3, order="anchored")


@pytest.mark.parametrize("keys", [{"order": "sequential"}, {"order": "anchored"}, BEST], ids=str)
def test_experts_that_share_a_factor_come_out_as_in_memory(tmp_path: Path, keys: dict[str, Any]) -> None:
    # An expert has few tokens here, and what few tokens decide is moved the most by rounding.
    outcome, _ = both(put_model(tmp_path, "mixtral"), tmp_path, tolerance=1e-3, joint=True, **keys)
    assert any("experts.*" in group for group in outcome.plan.joint) or keys is BEST


@pytest.mark.parametrize(
    "keys",
    [
        {"order": "sequential"},
        {"order": "sequential", "refine": {"steps": 2}, "sites": {"blocks": "last 1"}},
        {"order": "anchored", "refit": True, "joint": True},
        {"method": "svd", "refine": {"steps": 2}},
        {"method": "sfsd", "refit": True},
        {"allocation": "effective-rank", "sites": {"blocks": "1-2"}},
        {"method": "svd", "allocation": "global"},
        {"method": "fwsvd", "allocation": "global"},
        {"allocation": {"name": "global", "exact": True}, "joint": True, "keep": None, "keep_total": 0.8},
        {"method": WEIGHTED, "allocation": "global"},
        {"method": WEIGHTED, "order": "anchored", "rules": [{"keep": 0.5, "include": ["k_proj", "mlp"]}]},
        {**BEST, "keep": 1.0},
        {**BEST, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_part_comes_out_as_in_memory(place: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    both(place, tmp_path, **keys)


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (out_of_core, "write_shard", 1),
        (out_of_core._Compression, "_factor", 3),
        (Refinement, "__call__", 1),
        (Streams, "separate", 0),
        (Streams, "_turn", 3),
        (recorded_losses.RecordedLosses, "__call__", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_killed_run_goes_on(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: Path,
    module: Any,
    name: str,
    after: int,
) -> None:
    recipe, out = recipe_of(place, **BEST), tmp_path / "out"
    if name == "write_shard":
        assert resume_until_done(recipe, out, monkeypatch, module, name, after) == BLOCKS
    else:
        with pytest.raises(Killed), killing(monkeypatch, module, name, after):
            compress_out_of_core(recipe, out, BATCHED)
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected, 0)


def test_a_kill_costs_one_block(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path) -> None:
    recipe, out = recipe_of(place, **BEST), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core._Compression, "_dense_parts", 0):
        compress_out_of_core(recipe, out, BATCHED)  # gradients are there, losses are not
    with pytest.raises(Killed), killing(monkeypatch, recorded_losses.RecordedLosses, "__call__", BLOCKS - 1):
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    passed = note_blocks(monkeypatch)
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", BLOCKS - 1):
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    last = BLOCKS - 1
    # The last block's losses; then both streams through every block but the last, where only the dense one goes on.
    assert passed == [last, *(number for number in range(last) for _ in range(2)), last]
    passed.clear()
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    assert passed == [last]
    check_same(out, expected, 0)


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path, number: int
) -> None:
    recipe, out = recipe_of(place, **BEST), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 2):
        compress_out_of_core(recipe, out, BATCHED)
    shard = sorted((tmp_path / ".out.work" / "checkpoint").glob("*.safetensors"))[number]
    shard.write_bytes(shard.read_bytes()[:-5])
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected, 0)


def test_a_lost_door_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
) -> None:
    """The streams go through the finished blocks again, the compressed one through those of the shards."""
    recipe, out = recipe_of(place, **BEST), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 2):
        compress_out_of_core(recipe, out, BATCHED)
    (hidden,) = (tmp_path / ".out.work").glob("hidden-*")
    doors = whole_doors(hidden / "compressed")
    assert doors
    for file in (hidden / "compressed").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(OSError, match="go on with --resume"):
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected, 0)
