"""Files: rows of a table, and plain text, each read with a bound on its size."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

Row = Mapping[str, Any]

# Bytes of text (of a file, unpacked) read at most, unless the variable below says otherwise: to tokenize so much takes
# a minute or two, and no paper's corpus is a quarter of it. An archive of a few kB can hold gigabytes.
LIMIT = 64 * 2**20
LIMIT_VARIABLE = "ECKART_TEXT_LIMIT"
# {suffix: the reader of datasets}. A file with another suffix is plain text.
TABLES = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# A half of a surrogate pair without the other: half a character, which no tokenizer reads and some readers drop.
HALF_CHARACTER = re.compile(
    rb"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)


class TextTooLong(ValueError):
    """A file or a corpus is longer than the bound."""


def text_limit() -> int:
    """Bytes of text read at most: LIMIT, or what the environment variable ECKART_TEXT_LIMIT says in MiB; 0 is no bound.

    Raises:
        ValueError: the variable is not a whole number.
    """
    value = os.environ.get(LIMIT_VARIABLE, "")
    if not value:
        return LIMIT
    if not value.isdigit():
        raise ValueError(f"{LIMIT_VARIABLE}={value!r} is no whole number of MiB")
    return int(value) * 2**20 or 2**63


def check_length(name: object, length: int) -> None:
    """Raises TextTooLong where `length` bytes (or characters) are more than the bound."""
    limit = text_limit()
    if length > limit:
        raise TextTooLong(
            f"{name} holds more than {limit / 2**20:.0f} MiB of text; give a part of it, "
            f"or raise the bound: {LIMIT_VARIABLE} is a number of MiB, 0 is no bound"
        )


def table_kind(path: Path) -> str | None:
    """Which reader of `datasets` the file's suffixes ask for; None is plain text."""
    return next((TABLES[suffix] for suffix in path.suffixes if suffix in TABLES), None)


def unpack(path: Path, most: int = -1) -> bytes:
    """The bytes of a file of UTF-8 text, plain or .gz, up to so many; -1 is all of them.

    Raises:
        ValueError: it is not UTF-8, or damaged.
    """
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            data = file.read(most)
        codecs.getincrementaldecoder("utf-8")().decode(data, final=most < 0 or len(data) < most)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not readable as UTF-8 text: {error}") from error
    return data


def lines_of(data: bytes) -> list[str]:
    """The lines of a text, whatever ends them, without a byte order mark."""
    return list(io.StringIO(data.decode("utf-8-sig"), newline=None))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or .gz, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, or longer than the bound.
    """
    return lines_of(_read_bytes(path))


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """("FILE: row 3", row) of a table: JSON lines, a JSON array, CSV, TSV or parquet, read by `datasets`.

    Every field of CSV and TSV is text, as it stands there; an empty one is None, as is a field that a JSON row lacks.

    Raises:
        ValueError: the file is damaged, is no table, or is longer than the bound; names the file, if known the line.
    """
    kind = table_kind(path)
    assert kind is not None
    rows = [] if kind != "parquet" and not _check(path, kind) else _read_table(path, kind)
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]


def _check(path: Path, kind: str) -> bool:
    """Whether the file holds anything; refuses one that is too long, not UTF-8, or has halves of characters."""
    data = _read_bytes(path)
    half = HALF_CHARACTER.search(data) if kind == "json" else None
    if half is not None:
        line = data.count(b"\n", 0, half.start()) + 1
        raise ValueError(f"{path}: line {line} holds half a character ({half[1].decode()}, a lone surrogate); mend it")
    return bool(data.strip())


def _read_bytes(path: Path) -> bytes:
    """The unpacked bytes of a file of UTF-8 text, no more than the bound."""
    data = unpack(path, text_limit() + 1 if text_limit() < 2**63 else -1)
    check_length(path, len(data))
    return data


def _read_table(path: Path, kind: str) -> list[Row]:
    import datasets  # slow to import, and needed only here

    options: dict[str, Any] = {}
    if kind == "csv":
        # As it stands there: pandas takes "NA" and "None" for missing values, and "007" for 7.
        options = {"sep": "\t" if ".tsv" in path.suffixes else ",", "keep_default_na": False, "na_values": [""]}
    elif kind == "json":
        options = {"chunksize": LIMIT}  # all in one piece: a field may first occur in the last row

    def load(**more: Any) -> Iterable[Row]:
        return cast(
            Iterable[Row],
            datasets.load_dataset(
                kind, data_files=glob.escape(str(path)), split="train", streaming=True, **options, **more
            ),
        )

    try:
        with _silent():
            if kind == "csv":
                names = list(next(iter(load()), {}))
                if any(name.startswith("__index_level_") for name in names):
                    raise ValueError("its rows have more fields than its first line has names")
                if not names:
                    return []
                return list(load(features=datasets.Features(dict.fromkeys(names, datasets.Value("string")))))
            return list(_bounded(path, load()))
    except TextTooLong:
        raise
    except StopIteration:
        return []
    except Exception as error:
        if kind == "json" and not _read_bytes(path).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
            _check_json_lines(path)
        raise ValueError(f"{path} is not readable as {path.suffixes[0][1:]}: {error}") from error


def _bounded(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, as long as their text is within the bound."""
    length = 0
    for row in rows:
        length += sum(len(value) for value in row.values() if isinstance(value, str))
        check_length(path, length)
        yield row


def _check_json_lines(path: Path) -> None:
    """Raises ValueError that names the first line that is no JSON object."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} holds no row of fields but a {type(row).__name__}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """`datasets` logs an error before it raises it; the raised one is enough."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
