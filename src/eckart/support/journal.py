"""Journal: results of a long measurement so far, a line on disk each, so that a killed one resumes where it was."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from eckart.support.files import claimed, full_disk_named

# Number of the layout below; part of the header, so that a journal of another layout is refused.
FORMAT = 1

# Key of a line's checksum. A line of an older eckart has none, and is believed.
CHECKSUM = "crc32"

Record = dict[str, Any]


class Journal:
    """Records by key, in memory and, where there is a file, a JSON line each, flushed at once.

    The file's first line is a header: what is measured, all that it depends on, and a digest of both. A record is
    whole once its line ends; a line that a kill cut short is dropped when the file is opened again.
    """

    def __init__(self, file: TextIO | None, records: dict[str, Record]) -> None:
        self._file = file
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: str) -> Record | None:
        """The record under `key`, or None."""
        return self._records.get(key)

    def write(self, key: str, record: Record) -> None:
        """Keep a record under a key that is new.

        Raises:
            ValueError: the key is there already, or a value is no JSON (a number that is not finite is none).
        """
        if key in self._records:
            raise ValueError(f"the journal has {key!r} already")
        whole = json.loads(json.dumps({"key": key, **record}, allow_nan=False))
        self._records[key] = whole
        if self._file is not None:
            with full_disk_named(Path(self._file.name)):
                self._file.write(json.dumps({**whole, CHECKSUM: _checksum(whole)}) + "\n")
                self._file.flush()


@contextmanager
def open_journal(path: Path | None, kind: str, identity: Mapping[str, Any] | None) -> Iterator[Journal]:
    """The journal at `path`, with what it holds already; a new one where there is none; one in memory for None.

    Args:
        kind: what is measured, "surgical search".
        identity: everything that makes the records what they are: model, method, data, seeds, settings. Plain data;
            what JSON cannot hold is written as its `str`.

    Raises:
        ValueError: a path without an identity; a file that is no journal, or is one of another measurement (the message
            has what differs); or another process writes it. The file is not changed.
    """
    if path is None:
        yield Journal(None, {})
        return
    if not identity:
        raise ValueError(f"journal {path}: say what makes the measurement (model, method, data, seeds) too")
    header = _header(kind, identity)
    with claimed(path):
        records = _read(path, header) if path.exists() else None
        if records is None:
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        with path.open("a", encoding="utf-8") as file:
            yield Journal(file, records or {})


def _header(kind: str, identity: Mapping[str, Any]) -> Record:
    plain = json.loads(json.dumps(identity, sort_keys=True, default=str))
    digest = hashlib.sha256(json.dumps([kind, plain], sort_keys=True).encode()).hexdigest()
    return {"journal": kind, "format": FORMAT, "digest": digest, "of": plain}


def _read(path: Path, header: Record) -> dict[str, Record] | None:
    """The records of a file with this header, whose torn last line is cut off; None for a file torn in the header."""
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if not newline:
        if json.dumps(header).encode().startswith(torn):
            return None  # killed while the header was written, or before
        raise ValueError(f"{path} is no journal; give another file")
    first, *lines = whole.decode("utf-8", errors="replace").split("\n")
    _check_header(path, _parse(first), header)
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 2):
        record = _parse(line)
        kept = None if record is None else record.pop(CHECKSUM, None)
        if record is None or not isinstance(record.get("key"), str) or (kept is not None and kept != _checksum(record)):
            raise ValueError(f"{path}: line {number} is damaged ({line[:60]!r}); remove that line or the file")
        records[record["key"]] = record
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(whole) + 1)
    return records


def _checksum(record: Record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _parse(line: str) -> Record | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _check_header(path: Path, stored: Record | None, header: Record) -> None:
    if stored is None or "journal" not in stored or not isinstance(stored.get("of"), dict):
        raise ValueError(f"{path} is no journal; give another file")
    if all(stored.get(key) == header[key] for key in ("journal", "format", "of")):
        return
    advice = "give another file, or remove this one to start anew"
    if stored["journal"] != header["journal"]:
        raise ValueError(f"{path} is a journal of {stored['journal']!r}, this is {header['journal']!r}; {advice}")
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a journal of format {stored.get('format')!r}, this eckart writes {FORMAT}; {advice}"
        )
    there, here = stored["of"], header["of"]
    differs = [
        f"{key} was {_short(there.get(key))} and is {_short(here.get(key))}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    raise ValueError(f"{path} is of another {header['journal']}: {'; '.join(differs[:4])}; {advice}")


def _short(value: Any) -> str:
    """As much of a value as a message takes."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
