"""Loading and saving: the right class for a directory, and no partial one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_model, load_tokenizer, save
from eckart.models.sites import low_rank_modules
from eckart.support.files import staged_directory
from tiny import logits_of, tiny_model, tiny_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A directory that somebody would miss."""
    folder = tmp_path / "kept"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    (folder / "sub" / "weights").write_text("also mine")
    return folder


@pytest.mark.parametrize(("model_type", "head"), [("llama", "causal"), ("bert", "classifier"), ("roberta", "base")])
def test_load_model_builds_the_class_that_was_saved(model_type: str, head: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, head)
    compress(model, "svd", plan(model, 0.5))
    save(model, tmp_path / "out", tiny_tokenizer())
    loaded = load_model(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert load_tokenizer(tmp_path / "out")("w0 w1 nothing")["input_ids"] == [7, 8, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_model_in_a_type(dtype: str, tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "out")
    assert {p.dtype for p in load_model(tmp_path / "out", dtype=dtype).parameters()} == {getattr(torch, dtype)}


def test_load_model_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is none of auto, float32"):
        load_model(tmp_path, dtype="int8")
    for load, what in ((load_model, "model"), (load_tokenizer, "tokenizer of")):
        with pytest.raises(ValueError, match=f"cannot load the {what} {tmp_path}: is it a Hugging Face directory"):
            load(tmp_path)
        with pytest.raises(ValueError, match=f"cannot load the {what} {tmp_path}/no/such: no such directory"):
            load(tmp_path / "no" / "such")
    save(tiny_model("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForPoetry"]}))
    with pytest.raises(UnsupportedModelError, match="'LlamaForPoetry', which transformers lacks"):
        load_model(tmp_path / "out")


def test_save_writes_everything_it_was_given(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compress(model, "svd", plan(model, 0.5))
    out = save(model, tmp_path / "a" / "out", tiny_tokenizer(), recipe={"seed": 3}, files={"README.md": "# hé"})
    assert out == tmp_path / "a" / "out"
    assert (out / "README.md").read_text(encoding="utf-8") == "# hé"
    assert (out / "tokenizer.json").is_file()
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "eckart"
    assert section["format"] == 1
    assert section["recipe"] == {"seed": 3}
    assert section["sites"] == {
        name: {"rank": module.rank, "bias": module.bias is not None} for name, module in low_rank_modules(model).items()
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_save_keeps_the_recipe_of_a_loaded_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compress(model, "svd", plan(model, 0.5), recipe={"method": "svd", "seed": 3})
    save(model, tmp_path / "first")
    save(load_model(tmp_path / "first"), tmp_path / "second")
    section = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert section["recipe"] == {"method": "svd", "seed": 3}


def test_a_dense_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_save_never_overwrites_without_force(kept: Path) -> None:
    before = contents(kept)
    with pytest.raises(FileExistsError, match="kept exists; give another place, or --force"):
        save(tiny_model("llama"), kept)
    assert contents(kept) == before
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_save_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save(tiny_model("llama"), tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_save_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(tiny_model("llama"), tmp_path / "out")
    assert load_model(tmp_path / "out")


def test_force_replaces_all_of_it(kept: Path) -> None:
    model = tiny_model("llama")
    save(model, kept, force=True)
    assert torch.equal(logits_of(load_model(kept)), logits_of(model))
    assert not (kept / "sub").exists()
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_a_model_replaces_its_own_directory(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "out")
    model = load_model(tmp_path / "out")
    expected = logits_of(model)
    save(model, tmp_path / "out", force=True)
    assert torch.equal(logits_of(load_model(tmp_path / "out")), expected)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_midway_leaves_what_was_there(kept: Path, existing: bool) -> None:
    class FullDisk(OSError):
        pass

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").is_file()  # the weights are written by now
            raise FullDisk("no space left")

    out = kept if existing else kept.parent / "new"
    before = contents(kept)
    with pytest.raises(FullDisk):
        save(tiny_model("llama"), out, Tokenizer(), force=existing)  # type: ignore[arg-type]
    assert contents(kept) == before
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_leftovers_of_a_killed_run_do_no_harm(kept: Path) -> None:
    for name in (".out.eckart-partial", ".out.eckart-old"):
        (kept.parent / name).mkdir()
        (kept.parent / name / "junk").write_text("")
    # Killed between two renames: the older one is put back, and is not overwritten without being asked to.
    with pytest.raises(FileExistsError, match="out exists"), staged_directory(kept.parent / "out"):
        pass
    assert contents(kept.parent / "out") == {"junk": b""}
    with staged_directory(kept.parent / "out", force=True) as staging:
        assert list(staging.iterdir()) == []
        (staging / "done").write_text("")
    assert contents(kept.parent / "out") == {"done": b""}
    with staged_directory(kept.parent / "out", force=True) as staging:
        (staging / "again").write_text("")
    assert contents(kept.parent / "out") == {"again": b""}
    assert sorted(path.name for path in kept.parent.iterdir()) == ["kept", "out"]


def test_the_model_that_comes_along_has_a_name() -> None:
    model, tokenizer = load_model("builtin"), load_tokenizer("builtin")
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6
    assert len(tokenizer) == model.config.vocab_size
