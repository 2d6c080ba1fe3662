"""Out of core: the same checkpoint as in memory, with one block there at a time, and nothing lost by a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eckart
from eckart.calibration import doors
from eckart.models import shards
from eckart.models.checkpoint import CheckpointError
from eckart.models.families import UnsupportedModelError
from eckart.models.shards import INDEX, Skeleton
from eckart.runs import in_memory, out_of_core
from eckart.runs.facts import Outcome
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import Recipe, parse_recipe
from tiny import BLOCKS, FAMILY_CONFIGS, Run, logits_of, tiny_model, tiny_text, tiny_tokenizer

BATCHED = How(batch_size=3)


def put_model(folder: Path, model_type: str, **changes: Any) -> Path:
    """A folder with a tiny model in many files, its tokenizer and a calibration text."""
    tiny_model(model_type, **changes).save_pretrained(folder / "model", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(folder / "model")
    documents = [{"text": tiny_text(5 + 7 * number % 20, seed=number)} for number in range(80)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer, whatever the model: some families' names stand for a tokenizer of their own."""
    for module in (out_of_core, in_memory):
        monkeypatch.setattr(module, "load_tokenizer", lambda _path: tiny_tokenizer())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_model(tmp_path_factory.mktemp("outofcore"), "llama")


@pytest.fixture
def own_place(place: Path, tmp_path: Path) -> Path:
    """The place, for a test that damages it."""
    return shutil.copytree(place, tmp_path / "own")


def recipe_of(place: Path, **said: Any) -> Recipe:
    calibration = {"corpus": str(place / "train.jsonl"), "samples": 8, "length": 16}
    given = {"method": "asvd-i", **({} if {"rules", "plan", "keep_total"} & said.keys() else {"keep": 0.6}), **said}
    return parse_recipe({"model": str(place / "model"), "context": 16, "calibration": calibration, **given})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "compression.json").read_text())
    return {key: value for key, value in facts.items() if key != "seconds"}


def check_same(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Two checkpoints hold the same: tensors, configuration, facts and the files beside them."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for name in ("config.json", "generation_config.json", "plan.json", "recipe.yaml", "tokenizer.json"):
        assert (found / name).exists() == (expected / name).exists(), name
        if (found / name).exists():
            assert (found / name).read_text() == (expected / name).read_text(), name
    assert_close(facts_of(found), facts_of(expected))
    assert (found / "README.md").is_file()


def assert_close(found: Any, expected: Any) -> None:
    """The same plain data, numbers to within rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_close(*pair)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    else:
        assert found == expected


def both(place: Path, tmp_path: Path, how: How = BATCHED, **said: Any) -> tuple[Outcome, Outcome]:
    """The recipe out of core and in memory; what they leave is the same."""
    recipe = recipe_of(place, **said)
    found = compress_out_of_core(recipe, tmp_path / "found", how)
    expected = make_checkpoint(recipe, tmp_path / "expected", how)
    check_same(tmp_path / "found", tmp_path / "expected")
    assert not list(tmp_path.glob(".found*"))
    assert dict(found.plan.ranks) == dict(expected.plan.ranks)
    assert found.summary == expected.summary
    assert found.recipe == expected.recipe
    return found, expected


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_every_family_comes_out_as_in_memory(tmp_path: Path, model_type: str) -> None:
    both(put_model(tmp_path, model_type), tmp_path)
    assert len(list((tmp_path / "found").glob("*.safetensors"))) == BLOCKS + 1
    ours, theirs = (eckart.load_model(tmp_path / name) for name in ("found", "expected"))
    torch.testing.assert_close(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize(
    "said",
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
def test_every_recipe_of_one_share_comes_out_as_in_memory(place: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    both(place, tmp_path, **said)


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
    for name, make in (("found", compress_out_of_core), ("expected", make_checkpoint)):
        make(recipe, tmp_path / name, BATCHED)
    check_same(tmp_path / "found", tmp_path / "expected", 1e-2)


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


@pytest.mark.parametrize("method", ["asvd-i", "kfac"])
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

    def note(tensors: dict[str, Tensor], path: Path) -> None:
        assert tensors["hidden"].shape == (3, 16, 32) or tensors["hidden"].shape == (2, 16, 32)
        written.append(path)
        save(tensors, path)

    monkeypatch.setattr(doors, "save_file", note)
    compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    assert len(written) == (BLOCKS + 1) * 3  # doors, times batches of 3, 3 and 2


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


@pytest.fixture(scope="module")
def expected(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{method: what it makes in memory}."""
    folder = tmp_path_factory.mktemp("expected")
    for method in ("asvd-i", "kfac"):
        make_checkpoint(recipe_of(place, method=method), folder / method, BATCHED)
    return {method: folder / method for method in ("asvd-i", "kfac")}


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


@pytest.mark.parametrize("method", ["asvd-i", "kfac"])
@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (out_of_core, "write_shard", 1),
        (out_of_core._Run, "_factor", 1),
        (out_of_core._Run, "_calibrate", 1),
        (out_of_core, "write_index", 0),
        (shutil, "rmtree", 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_killed_run_goes_on(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, Path],
    method: str,
    module: Any,
    name: str,
    after: int,
) -> None:
    recipe, out = recipe_of(place, method=method), tmp_path / "out"
    if name == "write_index":  # it would be killed there for ever
        with pytest.raises(Killed), killing(monkeypatch, module, name, after):
            compress_out_of_core(recipe, out, BATCHED)
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    else:
        assert resume_until_done(recipe, out, monkeypatch, module, name, after) > 0
    check_same(out, expected[method])


@pytest.mark.parametrize("name", ["_head", "_backward", "_forward"])
def test_a_killed_sweep_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path], name: str
) -> None:
    recipe, out = recipe_of(place, method="kfac"), tmp_path / "out"
    if name == "_backward":
        assert resume_until_done(recipe, out, monkeypatch, out_of_core.Sweep, name, 1) == BLOCKS - 1
    else:
        with pytest.raises(Killed), killing(monkeypatch, out_of_core.Sweep, name, 0):
            compress_out_of_core(recipe, out, BATCHED)
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected["kfac"])


def test_at_most_one_block_is_done_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core._Run, "_factor", BLOCKS - 1):
        compress_out_of_core(recipe, out, BATCHED)
    forward: list[int] = []
    advance = out_of_core.Walk._advance
    monkeypatch.setattr(
        out_of_core.Walk, "_advance", lambda walk, text: (forward.append(walk.next), advance(walk, text))[1]
    )
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    assert forward == [BLOCKS - 1]


def test_another_batch_size_on_the_way(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path]
) -> None:
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    compress_out_of_core(recipe_of(place), tmp_path / "out", How(batch_size=4), resume=True)
    check_same(tmp_path / "out", expected["asvd-i"])


@pytest.mark.parametrize("damage", ["flipped", "shortened", "removed"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path], damage: str, number: int
) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 2):
        compress_out_of_core(recipe, out, BATCHED)
    shard = sorted((tmp_path / ".out.work" / "checkpoint").glob("*.safetensors"))[number]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data if damage == "flipped" else data[:-5]))
    if damage == "removed":
        shard.unlink()
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])


def test_work_of_an_earlier_run_is_not_thrown_away(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path]
) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe, out, BATCHED)
    with pytest.raises(FileExistsError, match="--resume, or --force to start anew"):
        compress_out_of_core(recipe, out, BATCHED)
    with pytest.raises(ValueError, match=r"another compression out of core: ranks was"):
        compress_out_of_core(recipe_of(place, keep=0.5), out, BATCHED, resume=True)
    assert len(list((tmp_path / ".out.work" / "checkpoint").glob("*.safetensors"))) == 1
    compress_out_of_core(recipe, out, BATCHED, force=True)
    check_same(out, expected["asvd-i"])
    with pytest.raises(FileExistsError, match="exists; give another place"):
        compress_out_of_core(recipe, out, BATCHED)


def test_another_model_on_the_way_is_refused(own_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED)
    tiny_model("llama", seed=3).save_pretrained(own_place / "model", max_shard_size="10KB")
    with pytest.raises(ValueError, match="another compression out of core: model was"):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED, resume=True)


def test_two_runs_do_not_share_a_place(place: Path, tmp_path: Path) -> None:
    with out_of_core._locked(tmp_path / "out"), pytest.raises(ValueError, match="another run is making"):
        compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "said", [{"method": "best"}, {"order": "sequential"}, {"refit": True}, {"refine": {"steps": 3}}], ids=str
)
def test_what_needs_the_whole_model_is_refused(place: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one block is in memory at a time") as caught:
        compress_out_of_core(recipe_of(place, **said), tmp_path / "out", BATCHED)
    assert "--method asvd-i" in str(caught.value)
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


def test_a_full_disk_loses_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path]
) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    usage, save = shutil.disk_usage(tmp_path), shards.save_file

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=100))
        with pytest.raises(OSError, match=r"has room for 100 bytes, and the hidden states take [\d,]+: make room"):
            compress_out_of_core(recipe, out, BATCHED)

    def full(tensors: dict[str, Tensor], path: Path, *rest: Any) -> None:
        if "00002-of" in path.name or "door-002" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, *rest)

    for module, what in ((doors, "hidden states"), (shards, "bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", full)
            with pytest.raises(
                OSError,
                match=rf"cannot write .*{what}.*No space left.*what was finished before is kept|"
                rf"cannot write {what} .*No space left.*kept",
            ):
                compress_out_of_core(recipe, out, BATCHED, resume=True)
        assert not list((tmp_path / ".out.work").rglob("*.partial"))
        assert (tmp_path / ".out.work" / "checkpoint" / "model-00001-of-00004.safetensors").is_file()
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])


def test_a_real_kill(place: Path, tmp_path: Path, expected: dict[str, Path]) -> None:
    """SIGKILL, once the journal has a block."""
    out, journal = tmp_path / "out", tmp_path / ".out.work" / "journal.jsonl"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(place).to_yaml())
    code = (
        "import sys, time; from pathlib import Path; from eckart.runs import out_of_core\n"
        "from eckart.runs.workbench import How; from eckart.runs.recipe import load_recipe\n"
        "do = out_of_core._Run._do\n"
        "def slow(*given): do(*given); time.sleep(2)\n"
        "out_of_core._Run._do = slow\n"
        "out_of_core.compress_out_of_core(load_recipe(sys.argv[1]), Path(sys.argv[2]), How(batch_size=3))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out)])
    try:
        deadline = time.monotonic() + 240
        while not (journal.is_file() and '"block 0"' in journal.read_text()):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists()
    compress_out_of_core(recipe_of(place), out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])


def test_the_command(place: Path, tmp_path: Path, run: Run, expected: dict[str, Path]) -> None:
    arguments = (place / "model", tmp_path / "out", "--calibration", place / "train.jsonl", "--samples", 8)
    arguments += ("--length", 16, "--keep", 0.6, "--batch-size", 3)
    status, text = run("compress", *arguments, "--out-of-core")
    assert status == 2
    assert "--method asvd-i" in text
    status, text = run("compress", *arguments, "--method", "asvd-i", "--resume")
    assert status == 2
    assert "--resume goes with --out-of-core" in text
    status, text = run("compress", *arguments, "--method", "asvd-i", "--out-of-core")
    assert status == 0, text
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(expected["asvd-i"])
    assert ours.keys() == theirs.keys()


def test_a_skeleton_is_the_model_without_its_blocks(place: Path) -> None:
    skeleton, model = Skeleton(place / "model"), eckart.load_model(place / "model")
    assert {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, skeleton.model.get_buffer(name)), name
    with skeleton.resident(1) as block:
        check_equal(block, model.get_submodule("model.layers.1"))
    assert all(parameter.device.type == "meta" for parameter in skeleton.blocks.parameters())


def check_equal(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_index_says_where_everything_is(place: Path, tmp_path: Path) -> None:
    compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 (not a mapping)
    tensors_there = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors_there.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors_there.values())
