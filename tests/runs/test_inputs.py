"""Inputs of a run: results of other files at the same places are not taken for its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eckart
from eckart.runs import inputs as module
from eckart.runs.experiment import run
from eckart.runs.how import How
from eckart.runs.inputs import INPUTS, changes_in, read_inputs
from eckart.runs.recipe import Recipe, parse_recipe
from eckart.runs.reproduction import run_study
from eckart.runs.study import Study
from tiny import tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    eckart.save(tiny_model("llama"), folder / "model", tiny_tokenizer())
    (folder / "data" / "ptb").mkdir(parents=True)
    for name, seed in (("calibration.txt", 0), ("text.txt", 1), ("data/ptb/ptb.test.txt", 2)):
        (folder / name).write_text(tiny_text(400, seed=seed))
    return folder


def keys(place: Path) -> dict[str, object]:
    return {
        "model": str(place / "model"),
        "method": "svd",
        "keep": 0.5,
        "calibration": {"corpus": str(place / "calibration.txt"), "samples": 4, "length": 16},
        "evaluate": [
            {"task": f"perplexity:{place / 'text.txt'}", "length": 16},
            {"task": "perplexity:ptb", "length": 16},
        ],
    }


def recipe_of(place: Path) -> Recipe:
    return parse_recipe(keys(place))


def scale_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    (place / "model" / "digests.json").unlink(missing_ok=True)


def keep_the_times(place: Path) -> None:
    """Another text of the same length, with the older one's time of change."""
    file = place / "text.txt"
    before = file.stat()
    file.write_text("w1 " + file.read_text()[3:] if file.read_text()[:3] == "w2 " else "w2 " + file.read_text()[3:])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (scale_weights, r"the model .*model: model\.safetensors is changed"),
    "tokenizer": (
        lambda place: (place / "model" / "tokenizer_config.json").write_text("{}"),
        r"tokenizer_config\.json is changed",
    ),
    "text": (lambda place: (place / "text.txt").write_text(tiny_text(400, seed=9)), r"text\.txt: text\.txt is changed"),
    "times": (keep_the_times, r"text\.txt is changed"),
    "calibration": (
        lambda place: (place / "calibration.txt").write_text(tiny_text(400, seed=9)),
        r"calibration\.txt is changed",
    ),
    "data": (
        lambda place: (place / "data" / "ptb" / "ptb.test.txt").write_text(tiny_text(400, seed=9)),
        r"the data of ptb: ptb\.test\.txt is changed",
    ),
    "another file": (
        lambda place: (place / "data" / "ptb" / "a.test.txt").write_text(tiny_text(400, seed=9)),
        r"the data of ptb: a\.test\.txt is new",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_files_at_the_same_places_are_named(place: Path, tmp_path: Path, what: str) -> None:
    recipe, out, how = recipe_of(place), tmp_path / "out", How(data=place / "data")
    change, told = CHANGES[what]
    first = run(recipe, out, how)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != "environment.json"}
    assert run(recipe, out, how) == first
    change(place)
    with pytest.raises(FileExistsError, match=rf"results of other files .*{told}.*--force"):
        run(recipe, out, how)
    assert all(file.read_bytes() == data for file, data in before.items()), "nothing is lost"
    if what == "weights":
        again, fresh = run(recipe, out, how, force=True), run(recipe, tmp_path / "fresh", how)
        assert [each.compressed.value for each in again if each.compressed] == [
            each.compressed.value for each in fresh if each.compressed
        ]
        assert again[0].dense != first[0].dense
        assert run(recipe, out, how) == again


def test_a_text_that_nothing_reads_is_no_input(place: Path) -> None:
    """Of a recipe that keeps everything, the calibration text, whose default would be the hub's."""
    data = {"model": str(place / "model"), "keep": 1, "evaluate": [f"perplexity:{place / 'text.txt'}"]}
    assert read_inputs(parse_recipe(data), None).keys() == {f"the model {place / 'model'}", str(place / "text.txt")}
    reads = {**data, "calibration": "ptb", "evaluate": [*data["evaluate"], "similarity:c4"]}  # type: ignore[misc]
    assert read_inputs(parse_recipe(reads), None).keys() >= {"the data of ptb", "the data of c4"}


def test_weights_are_the_files_that_are_loaded(place: Path) -> None:
    """A .bin counts where what lies beside it is no model."""
    folder = place / "model"
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    before = read_inputs(recipe_of(place), None)
    (folder / "pytorch_model.bin").write_bytes(b"1")
    one = read_inputs(recipe_of(place), None)
    (folder / "pytorch_model.bin").write_bytes(b"2")
    assert changes_in(one, before) == [f"the model {folder}: pytorch_model.bin is new"]
    assert changes_in(read_inputs(recipe_of(place), None), one) == [f"the model {folder}: pytorch_model.bin is changed"]


def test_copies_and_new_sources_are_no_change(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out, how = recipe_of(place), tmp_path / "out", How(data=place / "data")
    first = run(recipe, out, how)
    shutil.copytree(place / "model", place / "copy")
    shutil.rmtree(place / "model")
    (place / "copy").rename(place / "model")
    assert run(recipe, out, how) == first
    (out / INPUTS).unlink()  # of an older eckart
    assert run(recipe, out, how) == first
    assert (out / INPUTS).is_file()


def test_a_file_is_read_once_in_a_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    digest_of = module.digest_of
    monkeypatch.setattr(module, "digest_of", lambda file: (read.append(file), digest_of(file))[1])
    for _ in range(2):
        read_inputs(recipe_of(place), place / "data")
    assert len(read) == len(set(read)) > 3


def test_a_study_does_not_share_dense_results_of_another_model(place: Path, tmp_path: Path) -> None:
    base = {key: value for key, value in keys(place).items() if key not in ("method", "keep")}
    base["evaluate"] = base["evaluate"][:1]  # type: ignore[index]
    column = base["evaluate"][0]["task"]  # type: ignore[index]
    runs = [{"method": "svd", "keep": 0.5}, {"method": "svd", "keep": 0.7}]

    def study(count: int) -> Study:
        return Study.model_validate({"title": "t", "base": base, "columns": [column], "runs": runs[:count]})

    run_study(study(1), tmp_path / "out", How())
    scale_weights(place)
    (other,) = [name for name in ("svd-keep-0.5",) if (tmp_path / "out" / "runs" / name).is_dir()]
    shutil.rmtree(tmp_path / "out" / "runs" / other)
    dense, *_ = run_study(study(2), tmp_path / "out", How())
    fresh, *_ = run_study(study(2), tmp_path / "fresh", How())
    assert torch.tensor(dense.ours[0]) == torch.tensor(fresh.ours[0])
