"""Weight files: an index stays in its folder, a damaged file is named, and digests tell what has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eckart
from eckart.models.checkpoint import CheckpointError
from eckart.models.loading import load_model, save, weights_on_disk
from eckart.models.shards import Skeleton
from eckart.models.weight_files import DIGESTS, INDEX, read_header, read_index, verify, weight_files
from models.layouts import laid_out
from tiny import Run, logits_of, tiny_model, tiny_tokenizer

READERS: dict[str, Callable[[Path], Any]] = {"in core": load_model, "out of core": Skeleton}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A dense model in several files, with their index."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return tmp_path / "model"


def edit_index(folder: Path, change: Callable[[dict[str, str]], object], index: str = INDEX) -> None:
    content = json.loads((folder / index).read_text())
    change(content["weight_map"])
    (folder / index).write_text(json.dumps(content))


def lead_to(folder: Path, place: str) -> str:
    """Let the index name a shard by `place`; gives the shard's name."""
    shard = weight_files(folder)[0].name
    edit_index(folder, lambda files: files.update({k: place for k, v in files.items() if v == shard}))
    return shard


def test_weights_on_disk_are_the_files_that_are_loaded(sharded: Path) -> None:
    named = set(read_index(sharded / INDEX))
    for name in ("consolidated.safetensors", "pytorch_model.bin", "training_args.bin"):
        (sharded / name).write_bytes(bytes(7))
    assert {file.name for file in weights_on_disk(sharded)} == named
    for name in (INDEX, *named):
        (sharded / name).unlink()
    assert weights_on_disk(sharded) == (sharded / "pytorch_model.bin",)
    (sharded / "pytorch_model.bin").unlink()
    assert weights_on_disk(sharded) == weights_on_disk("owner/name") == ()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["up", "absolute", "through", "windows"])
def test_an_index_that_leads_out_of_its_folder(sharded: Path, kind: str, reader: str) -> None:
    shard = weight_files(sharded)[0]
    elsewhere = shutil.copy(shard, sharded.parent / "elsewhere.safetensors")
    (sharded / "sub").mkdir()
    places = {
        "up": "../elsewhere.safetensors",
        "absolute": str(elsewhere),
        "through": "sub/../../elsewhere.safetensors",
        "windows": "..\\elsewhere.safetensors",
    }
    lead_to(sharded, places[kind])
    with pytest.raises(CheckpointError, match="which is not a file of its folder") as caught:
        READERS[reader](sharded)
    assert str(caught.value).startswith(f"{sharded / INDEX} names {places[kind]!r}")


def test_an_index_of_the_old_format_that_leads_out(sharded: Path) -> None:
    torch.save(tiny_model("llama").state_dict(), sharded.parent / "elsewhere.bin")
    content = json.loads((sharded / INDEX).read_text())
    for file in sharded.glob("model*"):
        file.unlink()
    files = dict.fromkeys(content["weight_map"], "../elsewhere.bin")
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({**content, "weight_map": files}))
    with pytest.raises(CheckpointError, match=r"names '../elsewhere.bin', which is not a file of its folder"):
        load_model(sharded)


@pytest.mark.parametrize("reader", READERS)
def test_links_may_lead_where_they_will(sharded: Path, reader: str) -> None:
    """As the hub's cache has them: the files are elsewhere, and the folder has links."""
    (sharded.parent / "blobs").mkdir()
    for number, file in enumerate(weight_files(sharded)):
        blob = sharded.parent / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert READERS[reader](sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_index(sharded: Path, text: str, reader: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged"):
        READERS[reader](sharded)
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged"):
        read_index(sharded / INDEX)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    changed = {
        "cut": content[:-100],
        "cut in the header": content[:40],
        "empty": b"",
        "another format": b"<html>Not found</html>" * 20,
        "header of 2**60 bytes": (2**60).to_bytes(8, "little") + content[8:],
    }
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(changed[how])


HOW = ["cut", "cut in the header", "empty", "another format", "header of 2**60 bytes", "deleted"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_named(sharded: Path, how: str, reader: str) -> None:
    file = weight_files(sharded)[1]
    damage(file, how)
    with pytest.raises(CheckpointError) as caught:
        READERS[reader](sharded)
    assert str(caught.value).startswith(f"{file} is damaged or missing (")


@pytest.mark.parametrize("how", HOW[:-2])
def test_a_damaged_file_of_the_old_format_is_named(tmp_path: Path, how: str) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    header = read_header(file)["model.norm.weight"]
    assert (header.shape, header.type, header.is_float) == ((32,), "float32", True)
    damage(file, how)
    with pytest.raises(ValueError, match=rf"{file} is damaged or missing"):
        load_model(tmp_path)


def test_the_old_format_runs_no_code(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save({"a": Planted(tmp_path / "planted")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged or missing"):
        load_model(tmp_path)
    assert not (tmp_path / "planted").exists()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


# Digests


@pytest.fixture(params=["plain", "joint pivoted"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(laid_out("llama", request.param), tmp_path / "out", tiny_tokenizer(), files={"README.md": "# a card"})


def test_a_checkpoint_is_as_it_was_written(checkpoint: Path) -> None:
    files = {file.name for file in checkpoint.iterdir()} - {DIGESTS, "README.md"}
    assert verify(checkpoint) == len(files)
    assert json.loads((checkpoint / DIGESTS).read_text())["sha256"].keys() == files
    (checkpoint / "README.md").write_text("# a better card")
    (checkpoint / "notes.txt").write_text("added")
    assert verify(checkpoint) == len(files)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_bit_is_seen(checkpoint: Path, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-9] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"by its {DIGESTS}: {name} has changed\. Save or download it again"):
        verify(checkpoint)


def test_a_valid_order_that_was_not_written_is_seen(tmp_path: Path) -> None:
    out = save(laid_out("llama", "pivoted"), tmp_path / "out")
    before = logits_of(load_model(out))
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".order"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for look in (verify, load_model):
        with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
            look(out)
    (out / DIGESTS).unlink()
    assert not torch.equal(logits_of(load_model(out)), before), "it loads, and computes something else"


def test_a_valid_lender_that_was_not_written_is_seen(tmp_path: Path) -> None:
    out = save(laid_out("llama", "joint plain"), tmp_path / "out")
    before = logits_of(load_model(out))
    config = json.loads((out / "config.json").read_text())
    sites = config["quantization_config"]["sites"]
    borrowers = [name for name, spec in sites.items() if name.endswith("layers.0.self_attn.k_proj")]
    sites[borrowers[0]]["right_of"] = "model.layers.1.self_attn.q_proj"
    (out / "config.json").write_text(json.dumps(config))
    for look in (verify, load_model):
        with pytest.raises(CheckpointError, match=r"config.json has changed"):
            look(out)
    (out / DIGESTS).unlink()
    assert not torch.equal(logits_of(load_model(out)), before), "it loads, and computes something else"


def test_a_missing_file_is_seen_and_all_are_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json has changed; tokenizer.json is missing"):
        verify(checkpoint)


@pytest.mark.parametrize("text", ["", "{}", '{"sha256": {"../a": "b"}}', '{"sha256": {"a": 3}}', '{"sha256": 3}'])
def test_damaged_digests(checkpoint: Path, text: str) -> None:
    (checkpoint / DIGESTS).write_text(text)
    with pytest.raises(CheckpointError, match=f"{DIGESTS} is damaged"):
        verify(checkpoint)


def test_what_others_wrote_has_none(sharded: Path) -> None:
    assert verify(sharded) == 0


def test_out_of_core_checks_what_it_reads(tmp_path: Path) -> None:
    out = save(tiny_model("llama"), tmp_path / "out", tiny_tokenizer())
    (out / "tokenizer.json").unlink()
    assert Skeleton(out), "it reads no tokenizer"
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
        Skeleton(out)


def test_inspect_verifies(run: Run, checkpoint: Path, sharded: Path) -> None:
    status, printed = run("inspect", checkpoint, "--verify")
    assert status == 0
    assert "files are as they were written" in printed
    status, printed = run("inspect", sharded, "--verify")
    assert status == 0
    assert f"no {DIGESTS} to check the files by" in printed
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    for more in ((), ("--verify",)):
        status, printed = run("inspect", checkpoint, *more)
        assert status == 2
        assert "config.json has changed" in printed


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["left.weight", "right.weight", "bias"])
def test_factors_that_are_not_finite_are_refused(checkpoint: Path, part: str, value: float) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f"mlp.down_proj.{part}"))
    tensors[name].view(-1)[3] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^the checkpoint: {name} has numbers that are not finite"):
        eckart.load_model(checkpoint)


def test_a_changed_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    """A value of the configuration that is valid and not the one that was written changes every number."""
    eckart.save(tiny_model("llama"), tmp_path / "out", tiny_tokenizer())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    with pytest.raises(CheckpointError, match=r"config\.json has changed.*if you changed it yourself, remove digests"):
        eckart.load_model(tmp_path / "out")
    (tmp_path / "out" / "digests.json").unlink()
    assert eckart.load_model(tmp_path / "out").config.rms_norm_eps == 1.0
