"""Journal: whatever a kill leaves, the same measurement goes on and another one is refused."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.support.journal import open_journal

IDENTITY = {"model": "tiny", "seed": 0, "budgets": [0.1, 0.2]}


def fill(path: Path, keys: str = "abc") -> None:
    with open_journal(path, "test", IDENTITY) as journal:
        for number, key in enumerate(keys):
            journal.write(key, {"score": number + 0.1})


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    fill(path)
    with open_journal(path, "test", IDENTITY) as journal:
        assert len(journal) == 3
        assert journal.find("b") == {"key": "b", "score": 1.1}
        assert journal.find("d") is None
        journal.write("d", {"score": 1 / 3})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["of"] == IDENTITY
    assert [line.get("key") for line in lines] == [None, "a", "b", "c", "d"]
    assert lines[-1]["score"] == 1 / 3


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with open_journal(path, "test", IDENTITY) as journal:
        journal.write("a", {"score": 1.0})
        assert len(path.read_text().splitlines()) == 2


def test_any_cut_of_the_file_goes_on_with_the_whole_lines(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    fill(whole)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        kept = max(0, content[:size].count(b"\n") - 1)
        with open_journal(path, "test", IDENTITY) as journal:
            assert len(journal) == kept
            for number, key in enumerate("abc"):
                if journal.find(key) is None:
                    journal.write(key, {"score": number + 0.1})
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("kind", "identity", "message"),
    [
        ("test", {**IDENTITY, "seed": 1}, "seed was 0 and is 1"),
        ("test", {**IDENTITY, "more": "x"}, 'more was null and is "x"'),
        ("other", IDENTITY, "is a journal of 'test', this is 'other'"),
    ],
)
def test_the_journal_of_another_measurement_is_refused(
    tmp_path: Path, kind: str, identity: dict[str, object], message: str
) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message), open_journal(path, kind, identity):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["notes of mine", "notes of mine\n", '{"a": 1}\n', "[]\n{}\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no journal"), open_journal(path, "test", IDENTITY):
        pass
    assert path.read_text() == content


def test_a_damaged_line_and_another_format_are_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged"), open_journal(path, "test", IDENTITY):
        pass
    path.write_text(lines[0].replace('"format": 1', '"format": 2') + "\n")
    with pytest.raises(ValueError, match="format 2"), open_journal(path, "test", IDENTITY):
        pass


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="say what makes"), open_journal(tmp_path / "journal.jsonl", "test", None):
        pass
    with open_journal(None, "test", None) as journal:
        journal.write("a", {"score": 1.0})
        assert journal.find("a") == {"key": "a", "score": 1.0}
        with pytest.raises(ValueError, match="'a' already"):
            journal.write("a", {"score": 2.0})
        with pytest.raises(ValueError, match="JSON"):
            journal.write("b", {"score": math.nan})
        assert journal.find("b") is None


@given(bit=st.integers(0, 8 * 10_000))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_changes_no_record(bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, records = tmp_path_factory.mktemp("journal") / "journal.jsonl", {"a": {"score": 1.25}, "b": {"score": 2.5}}
    with open_journal(file, "search", {"model": "m"}) as journal:
        for key, record in records.items():
            journal.write(key, record)
    data = bytearray(file.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    told = ""
    try:
        with open_journal(file, "search", {"model": "m"}) as journal:
            read = {key: journal.find(key) for key in records}
    except ValueError as error:
        read, told = {}, str(error)
    assert not told or str(file) in told
    for key, record in read.items():
        assert record is None or record["score"] == records[key]["score"]  # or it is measured again


def test_a_full_disk_is_named_and_the_journal_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    with open_journal(file, "search", {"model": "m"}) as journal:
        journal.write("a", {"score": 1.0})
        flush, journal._file.flush = journal._file.flush, full_disk  # type: ignore[union-attr,method-assign]
        with pytest.raises(OSError, match=r"cannot write .*journal\.jsonl .*No space left.*make room"):
            journal.write("b", {"score": 2.0})
        journal._file.flush = flush  # type: ignore[union-attr,method-assign]
    with file.open("rb+") as stream:  # the second line came as far as its middle
        stream.truncate(file.stat().st_size - 9)
    with open_journal(file, "search", {"model": "m"}) as journal:
        assert journal.find("a") == {"key": "a", "score": 1.0}
        assert journal.find("b") is None


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"

    def other() -> None:
        with open_journal(file, "search", {"model": "m"}):
            pass

    with (
        open_journal(file, "search", {"model": "m"}),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ValueError, match=r"another run is making .*journal\.jsonl"),
    ):
        pool.submit(other).result()
