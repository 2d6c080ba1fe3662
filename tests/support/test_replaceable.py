"""What --force may take away: a checkpoint, and nothing that the command needs or that no checkpoint has."""

from __future__ import annotations

from pathlib import Path

import pytest

import eckart
from eckart.support.files import check_replaceable
from tiny import Run, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    eckart.save(tiny_model("llama"), tmp_path / "mine" / "model", tiny_tokenizer())
    (tmp_path / "mine" / "text.txt").write_text(tiny_text(300))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    return tmp_path


def everything(place: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("out", [".", "..", "mine", "mine/model", "other", "mine/model/../../mine/model", "link"])
def test_force_takes_nothing_else_away(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    (place / "link").symlink_to(place / "mine" / "model")
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here" if out == ".." else place)
    before = everything(place)
    status, printed = run(
        "compress", place / "mine" / "model", out, "--keep", "0.5", "--method", "svd", "--force", "--no-cache",
        "--calibration", place / "mine" / "text.txt", "--samples", "2", "--length", "16",
    )  # fmt: skip
    assert status == 2
    assert "which is needed" in printed or "which is no part of a checkpoint" in printed
    assert "give another place" in printed
    assert everything(place) == before


def test_a_checkpoint_is_replaced(run: Run, place: Path) -> None:
    arguments = ("--method", "svd", "--no-cache", "--calibration", place / "mine" / "text.txt", "--samples", "2")
    for keep in ("0.5", "0.6"):
        status, printed = run(
            "compress", place / "mine" / "model", place / "out", "--keep", keep, *arguments, "--force"
        )
        assert status == 0, printed


def test_names_that_are_no_files_are_passed_over(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "out", force=True, reads=["wikitext2", "owner/name", "builtin"])
    (tmp_path / "out").mkdir()
    check_replaceable(tmp_path / "out", force=True)


def test_a_folder_of_the_usual_hidden_names_is_nobodys(place: Path) -> None:
    """Only what eckart left behind is tidied away or put back."""
    for name in (".out.old", ".out.partial", ".out.lock"):
        (place / name).mkdir()
        (place / name / "mine").write_text("mine")
    before = everything(place)
    eckart.save(tiny_model("llama"), place / "out", tiny_tokenizer())
    assert {file: content for file, content in everything(place).items() if "/out/" not in file} == before
