"""Files: whole or not at all, and what was there before a failure is there after it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from eckart.support.files import ABANDONED, check_free, check_room, claimed, staged_directory, whole_file, write_whole


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "text.json"
    assert write_whole(file, "first") == file
    assert file.read_text() == "first"
    write_whole(file, "second")
    assert [path.name for path in file.parent.iterdir()] == ["text.json"]
    assert file.read_text() == "second"


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = write_whole(tmp_path / "kept", "mine")

    def fail(place: Path) -> None:
        place.write_text("half of")
        assert file.read_text() == "mine"
        raise RuntimeError

    with pytest.raises(RuntimeError), whole_file(file) as partial:
        fail(partial)
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_a_killed_process_left_is_removed_once_it_is_a_day_old(tmp_path: Path) -> None:
    old, new, others = (tmp_path / name for name in ("kept.1.partial", "kept.2.partial", "kept.more.3.partial"))
    for left in (old, new, others):
        left.write_text("half of")
    for left in (old, others):
        os.utime(left, (time.time() - 1.1 * ABANDONED,) * 2)
    write_whole(tmp_path / "kept", "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", new.name}


def test_a_text_that_cannot_be_encoded_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = write_whole(tmp_path / "kept", "mine")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "mine")]


def test_a_directory_is_staged(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(place: Path) -> None:
        (place / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError), staged_directory(out) as staging:
        fail(staging)
    assert not list(tmp_path.iterdir())
    with staged_directory(out) as staging:
        (staging / "done").write_text("")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["done"]


def test_what_is_put_in_place_can_be_read_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with staged_directory(tmp_path / "out") as staging:
        (staging / "weights").write_text("")
        (staging / "weights").chmod(0o600)
    assert (tmp_path / "out" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    check_free(tmp_path / "nothing")
    file = write_whole(tmp_path / "folder" / "file", "mine")
    for place in (file, file.parent):
        with pytest.raises(FileExistsError, match=str(place)):
            check_free(place)
    check_free(file.parent, force=True)
    with pytest.raises(FileExistsError, match="is a file"):
        check_free(file, force=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """And not the lock next to it, of which nobody has heard."""
    file = write_whole(tmp_path / "file", "mine")
    with pytest.raises(OSError, match="cannot be written") as raised, claimed(file / "out"):
        pass
    assert raised.value.filename == str(file / "out")
    assert "lock" not in str(raised.value)


def test_a_disk_without_room_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    check_room(tmp_path, 1, "a byte")
    with pytest.raises(OSError, match="hidden states take 1,000,000,000,000,000,000"):
        check_room(tmp_path, 10**18, "hidden states")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
@pytest.mark.parametrize("writer", ["file", "directory"])
def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path, error: Exception, writer: str) -> None:
    write_whole(tmp_path / "out" / "file", "older")
    with (
        pytest.raises(OSError, match=r"cannot write .*out.*No space left.* [\d,]+ bytes free.*make room"),
        whole_file(tmp_path / "out" / "file") if writer == "file" else staged_directory(tmp_path / "out", force=True),
    ):
        raise error
    assert (tmp_path / "out" / "file").read_text() == "older"
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "file"]


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "file"):
        (tmp_path / "nowhere").read_text()
