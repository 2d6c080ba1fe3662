"""Out of core: the same checkpoint as in memory, with one block there at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import eckart
from eckart.calibration import doors
from eckart.models.checkpoint import CheckpointError
from eckart.models.families import UnsupportedModelError
from eckart.models.shards import INDEX, Skeleton
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from tiny import BLOCKS, FAMILY_CONFIGS, logits_of

from .from_files import BATCHED, both, check_same, put_model, recipe_of, tensors_of

pytestmark = pytest.mark.usefixtures("any_tokenizer", "two_passes")


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_every_family_comes_out_as_in_memory(tmp_path: Path, model_type: str) -> None:
    both(put_model(tmp_path, model_type), tmp_path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == BLOCKS + 1
    ours, theirs = (eckart.load_model(tmp_path / name) for name in ("out", "expected"))
    torch.testing.assert_close(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize(
    "keys",
    [
        {"layout": "pivoted"},
        {"layout": "pivoted", "joint": True},
        {"joint": True},
        {"method": "svd"},
        {"method": "nsvd-i"},
        {"method": "sfsd"},
        {"method": "fwsvd"},
        {"method": "kfac"},
        {"method": "kfac", "joint": True, "layout": "pivoted"},
        {"dtype": "bfloat16"},
        {"keep_total": 0.8},
        {"allocation": {"name": "per-role", "shares": {"mlp": 2, "q_proj": 0.5}}},
        {"rules": [{"keep": 0.5, "blocks": "1"}]},
        {"method": "kfac", "rules": [{"keep": 0.5, "include": ["mlp"], "blocks": "1"}]},
        {"sites": {"blocks": "last 1"}},
        {"keep": 1.0},
    ],
    ids=str,
)
def test_every_recipe_of_one_share_comes_out_as_in_memory(place: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    both(place, tmp_path, **keys)


def test_a_plan_edited_by_hand_is_carried_out(place: Path, tmp_path: Path) -> None:
    outcome = compress_out_of_core(recipe_of(place), tmp_path / "first", BATCHED)
    plan = json.loads(outcome.plan.to_json())
    plan["ranks"]["model.layers.1.mlp.down_proj"] = 3
    plan["ranks"]["model.layers.2.mlp.down_proj"] = None
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    both(place, tmp_path, plan=str(tmp_path / "plan.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["asvd-i", "kfac"])
def test_stored_types_are_kept(tmp_path: Path, dtype: torch.dtype, method: str) -> None:
    place = put_model(tmp_path, "llama", dtype=dtype)
    recipe = recipe_of(place, method=method)
    for name, make in (("out", compress_out_of_core), ("expected", make_checkpoint)):
        make(recipe, tmp_path / name, BATCHED)
    check_same(tmp_path / "out", tmp_path / "expected", 1e-2)


@pytest.mark.parametrize(("model_type", "head"), [("bert", "masked"), ("bert", "classifier"), ("gpt2", None)])
def test_gradients_of_other_heads(tmp_path: Path, model_type: str, head: str | None) -> None:
    both(put_model(tmp_path, model_type, head=head), tmp_path, method="kfac")


def test_one_file_will_do(tmp_path: Path) -> None:
    place = put_model(tmp_path, "gpt2")
    save_file(tensors_of(place / "model"), tmp_path / "model.safetensors", {"format": "pt"})
    for file in (place / "model").glob("model*"):
        file.unlink()
    (tmp_path / "model.safetensors").rename(place / "model" / "model.safetensors")
    both(place, tmp_path)


def test_a_checkpoint_of_the_base_model_lacks_the_head(tmp_path: Path) -> None:
    place = put_model(tmp_path, "llama")
    for file in (place / "model").glob("*.safetensors"):
        tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = json.loads((place / "model" / INDEX).read_text())
    index["weight_map"] = {name.removeprefix("model."): file for name, file in index["weight_map"].items()}
    (place / "model" / INDEX).write_text(json.dumps(index))
    both(place, tmp_path)  # names without the prefix, head and all


@pytest.mark.parametrize("method", ["asvd-i", "kfac", "best"])
def test_one_block_is_resident_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen: list[int] = []
    fill, emptied = Skeleton.fill, Skeleton.empty

    def count(skeleton: Skeleton) -> None:
        there = {
            number
            for number, block in enumerate(skeleton.blocks)
            if any(parameter.device.type != "meta" for parameter in block.parameters())
        }
        assert len(there) <= 1
        seen.append(len(there))

    def watch(skeleton: Skeleton, names: Any) -> None:
        fill(skeleton, names)
        count(skeleton)

    def watch_after(skeleton: Skeleton, number: int) -> None:
        count(skeleton)
        emptied(skeleton, number)
        assert all(parameter.device.type == "meta" for parameter in skeleton.blocks.parameters())

    monkeypatch.setattr(Skeleton, "fill", watch)
    monkeypatch.setattr(Skeleton, "empty", watch_after)
    compress_out_of_core(recipe_of(place, method=method), tmp_path / "out", BATCHED)
    assert seen.count(1) >= 2 * BLOCKS


def test_hidden_states_are_not_all_in_memory(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    save = doors.save_file

    def note(tensors: dict[str, Tensor], path: Path, *metadata: dict[str, str]) -> None:
        assert tensors["hidden"].shape == (3, 16, 32) or tensors["hidden"].shape == (2, 16, 32)
        written.append(path)
        save(tensors, path, *metadata)

    monkeypatch.setattr(doors, "save_file", note)
    compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    assert len(written) == (BLOCKS + 1) * 3  # doors, times batches of 3, 3 and 2


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "best-distilled"},
        {"method": "best", "recover": {"steps": 2}},
        {"allocation": {"name": "global", "weights": "probes"}},
        {"allocation": {"name": "surgical", "score": "perplexity:wikitext2"}},
    ],
    ids=str,
)
def test_what_needs_the_whole_model_is_refused(place: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one block is in memory at a time") as caught:
        compress_out_of_core(recipe_of(place, **keys), tmp_path / "out", BATCHED)
    assert "--method best" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_named(own_place: Path, tmp_path: Path) -> None:
    file = sorted((own_place / "model").glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged or missing"):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED)


def test_a_missing_or_misshapen_tensor_is_named(own_place: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    file = own_place / "model" / json.loads((own_place / "model" / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(31, 48\), expected \(32, 48\)"):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=rf"missing tensor {name}"):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED)


def test_older_formats_and_compressed_models_are_refused(own_place: Path, tmp_path: Path) -> None:
    compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED)
    shutil.copytree(tmp_path / "out", tmp_path / "again" / "model")
    shutil.copy(own_place / "train.jsonl", tmp_path / "again")
    with pytest.raises(UnsupportedModelError, match="start from the dense model"):
        compress_out_of_core(recipe_of(tmp_path / "again"), tmp_path / "twice", BATCHED)
    for file in (own_place / "model").glob("model*"):
        file.unlink()
    (own_place / "model" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is of an older format"):
        compress_out_of_core(recipe_of(own_place), tmp_path / "other", BATCHED)


def test_the_index_says_where_everything_is(place: Path, tmp_path: Path) -> None:
    compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 (not a mapping)
    tensors_there = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors_there.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors_there.values())
