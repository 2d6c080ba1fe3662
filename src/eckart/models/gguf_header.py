"""The header of a GGUF file: its metadata, and which tensor lies where, read within the file's bounds.

GGUF is llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Nothing but the header is read,
and every length in it is checked, so that a damaged file is one error; the package gguf takes minutes for a large
vocabulary, and grows without end where a length is wrong.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.models.families import UnsupportedModelError
from eckart.models.weight_files import CheckpointError

SUFFIX = ".gguf"
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
# {number of a metadata type: how struct spells it}; strings and arrays are read apart.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Dimensions that a tensor has at most.
DIMENSIONS = 4
# One file of several, as llama.cpp names them.
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's shape, as torch orders it, the number of its type in ggml, and the byte that it begins at."""

    shape: tuple[int, ...]
    type: int
    begin: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: {key: value}; of an array, how many entries it has, as a tuple of that one number.
        tensors: {its name in llama.cpp: where it is}.
        size: bytes of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's kind, which also begins the keys of its metadata."""
        return str(self.metadata.get("general.architecture"))


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that a model's name stands for: the file itself, or the only one in a folder without other weights.

    Raises:
        ValueError: no file of this name.
        UnsupportedModelError: a folder with several; or the file is one part of several.
    """
    place = Path(path)
    if place.suffix.lower() == SUFFIX and not place.is_dir():
        if not place.is_file():
            raise ValueError(f"there is no file {place}; if it is on the hub, `hf download` it and give its place here")
        return _whole(place)
    if not place.is_dir() or any(file.suffix in (".safetensors", ".bin") for file in place.iterdir()):
        return None
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1 and not PART.search(files[0].name):
        names = ", ".join(file.name for file in files[:5])
        raise UnsupportedModelError(f"{place} holds {len(files)} GGUF files ({names}): give the path of one of them")
    return _whole(files[0]) if files else None


def _whole(file: Path) -> Path:
    part = PART.search(file.name)
    if part and int(part[2]) > 1:
        raise UnsupportedModelError(
            f"{file} is one of {int(part[2])} parts of a model: join them with llama.cpp's "
            "`llama-gguf-split --merge`, and give the whole file"
        )
    return file


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        CheckpointError: it is no GGUF file, of a version that is not known, or damaged.

    Cost: one walk over the header, which holds the vocabulary: half a second for 262,144 words.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(file, data).header()
    except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged_gguf(file, str(error)) from error


def damaged_gguf(file: Path, why: str) -> CheckpointError:
    """The error of a GGUF file that cannot be read."""
    return CheckpointError(f"{file} is no GGUF file, or damaged ({why}). Download or convert it again")


class _Reader:
    """A place in a file that goes on with what is read."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.place = file, data, 0

    def header(self) -> GgufHeader:
        if self.data[:4] != MAGIC:
            raise damaged_gguf(self.file, f"it begins with {self.data[:4]!r} and not with {MAGIC!r}")
        self.place = 4
        version, tensor_count, key_count = self.numbers("IQQ")
        if version not in VERSIONS:
            raise damaged_gguf(self.file, f"its version is {version}; versions 2 and 3 are read, little-endian")
        metadata = {self.string(): self.value(*self.numbers("I")) for _ in range(key_count)}
        tensors = dict(self.tensor() for _ in range(tensor_count))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or len(tensors) < tensor_count:
            raise damaged_gguf(self.file, f"an alignment of {alignment!r}, or two tensors of one name")
        begin = -(-self.place // alignment) * alignment
        placed = {name: GgufTensor(each.shape, each.type, begin + each.begin) for name, each in tensors.items()}
        return GgufHeader(self.file, metadata, placed, len(self.data))

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self.data, self.place)
        self.skip(struct.calcsize(f"<{kinds}"))
        return values

    def skip(self, length: int) -> None:
        self.place += length
        if self.place > len(self.data):
            raise ValueError("it ends within its header")

    def string(self) -> str:
        (length,) = self.numbers("Q")
        begin = self.place
        self.skip(length)
        return self.data[begin : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        element, count = self.numbers("IQ")
        if element in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[element]}"))
        elif element == STRING:
            for _ in range(count):
                self.skip(*self.numbers("Q"))
        else:
            raise ValueError(f"an array of the unknown type {element}")
        return (count,)

    def tensor(self) -> tuple[str, GgufTensor]:
        name = self.string()
        (dimensions,) = self.numbers("I")
        if not 1 <= dimensions <= DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = self.numbers(f"{dimensions}Q")
        kind, begin = self.numbers("IQ")
        return name, GgufTensor(tuple(reversed(shape)), kind, begin)
