"""Recipes with bits: one checkpoint in memory and out of core, through a kill, and from its own plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import eckart
from eckart.runs import out_of_core
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.kept_blocks import KeptBlocks
from eckart.runs.out_of_core import compress_out_of_core
from tiny import logits_of, relative

from .from_files import BATCHED, Killed, check_same, killing, recipe_of, resume_until_done, tensors_of

pytestmark = pytest.mark.usefixtures("any_tokenizer", "two_passes")

BYTES = 80_000
RECIPES: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 3, "method": "svd", "group": 16},
    {"bits": 4, "method": "best"},
    {"bits": 4, "method": "kfac", "rules": [{"keep": 0.5, "include": ["mlp"], "blocks": "1"}]},
    {"bits": "auto", "method": "best", "keep": None, "max_bytes": BYTES, "group": 16, "turns": 1},
    {"bits": 8, "method": "best", "keep": None, "max_bytes": BYTES, "group": 16},
]


def plan_of(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return plan


@pytest.mark.parametrize("keys", RECIPES, ids=str)
def test_out_of_core_is_as_in_memory(place: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    """And the files are as large as the plan said, within the bytes that were given."""
    recipe, folders = recipe_of(place, **keys), [tmp_path / "memory", tmp_path / "core"]
    outcomes = [
        make(recipe, out, BATCHED) for make, out in zip((make_checkpoint, compress_out_of_core), folders, strict=True)
    ]
    plans = [plan_of(folder) for folder in folders]
    assert plans[0] == plans[1]
    assert plans[0]["stored"]
    ours, theirs = (eckart.load_model(folder) for folder in folders)
    # A number between two codes may fall to either side by rounding.
    assert relative(logits_of(ours), logits_of(theirs)) < 0.02
    assert {n: t.shape for n, t in tensors_of(folders[0]).items()} == {
        n: t.shape for n, t in tensors_of(folders[1]).items()
    }
    size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    assert outcomes[0].summary.file_bytes[1] == size
    if recipe.max_bytes is not None:
        assert 0.7 * BYTES < size <= BYTES
    facts = json.loads((folders[0] / "compression.json").read_text())
    assert {name for name, site in facts["sites"].items() if "bits" in site or "base" in site} == plans[0][
        "stored"
    ].keys()


@pytest.mark.parametrize("keys", [{}, {"bits": 4}, {"layout": "pivoted"}], ids=str)
def test_out_of_core_one_block_at_a_time_is_in_memory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """Codes and orders of rows are buffers, and go as parameters do; tables of positions stay."""
    resident, finish = [], out_of_core._Compression._finish

    def look(compression: Any, *arguments: Any) -> Any:
        blocks = compression.skeleton.blocks
        tensors = {**dict(blocks.named_parameters()), **dict(blocks.named_buffers())}
        resident.extend(name for name, tensor in tensors.items() if tensor.device.type != "meta")
        return finish(compression, *arguments)

    monkeypatch.setattr(out_of_core._Compression, "_finish", look)
    compress_out_of_core(recipe_of(place, **keys), tmp_path / "out", BATCHED)
    assert resident == []


def test_a_kill_costs_a_block_in_memory(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, how = recipe_of(place, **RECIPES[4]), How(batch_size=3, cache=tmp_path / "cache")
    make_checkpoint(recipe, tmp_path / "expected", BATCHED)
    with pytest.raises(Killed), killing(monkeypatch, KeptBlocks, "_keep", 1):
        make_checkpoint(recipe, tmp_path / "out", how)
    make_checkpoint(recipe, tmp_path / "out", how)
    check_same(tmp_path / "out", tmp_path / "expected", 0)


def test_a_kill_costs_a_block_out_of_core(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(place, **RECIPES[2])
    compress_out_of_core(recipe, tmp_path / "expected", BATCHED)
    assert resume_until_done(recipe, tmp_path / "out", monkeypatch, out_of_core, "write_shard", 1) > 0
    check_same(tmp_path / "out", tmp_path / "expected", 0)


def test_its_plan_makes_it_again(place: Path, tmp_path: Path) -> None:
    """And one that is edited by hand is carried out, or refused with the linear's name."""
    first = tmp_path / "first"
    make_checkpoint(recipe_of(place, **RECIPES[4]), first, BATCHED)
    by_plan = recipe_of(place, method="best", plan=str(first / "plan.json"), turns=1)
    make_checkpoint(by_plan, tmp_path / "again", BATCHED)
    assert tensors_of(first).keys() == tensors_of(tmp_path / "again").keys()
    assert relative(*(logits_of(eckart.load_model(folder)) for folder in (first, tmp_path / "again"))) < 1e-5
    plan, name = plan_of(first), "model.layers.0.mlp.up_proj"
    for entry, message in (
        ({"base": 5, "group": 16}, f"{name}: bits 5 is none of"),
        ({"base": 4, "bit": 4}, f"{name}: stored has 'bit'"),
        ({"base": "4"}, f"{name}: bits '4' is none of"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "stored": {name: entry}}))
        with pytest.raises(ValueError, match=message):
            make_checkpoint(recipe_of(place, plan=str(tmp_path / "plan.json")), tmp_path / "never", BATCHED)
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "stored": {"model.nothing": {"base": 4}}}))
    with pytest.raises(ValueError, match=r"stores model\.nothing, which this model has not"):
        make_checkpoint(recipe_of(place, plan=str(tmp_path / "plan.json")), tmp_path / "never", BATCHED)
    assert not (tmp_path / "never").exists()


def test_too_few_bytes_say_how_many_it_takes(place: Path, tmp_path: Path) -> None:
    for most, message in (
        (20_000, "what is not compressed takes"),
        (46_400, "bytes for the selected linears is too small"),
    ):
        with pytest.raises(ValueError, match=message):
            make_checkpoint(recipe_of(place, **{**RECIPES[4], "max_bytes": most}), tmp_path / "out", BATCHED)
