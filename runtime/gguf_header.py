"""The head of a GGUF file: its metadata and where its tensors lie. Reads the bytes itself and trusts none of them.

llama.cpp ends the process over some damaged files, so gori looks before it hands one over. Source of the layout: the
GGUF specification, version 3, little-endian. Standard library alone; the tensors' bytes are the reader's
(gori.export.gguf_read).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gori.errors import GoriError

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT = 32
LONGEST_KEY = 65535
"""Bytes; the specification's limit."""
MOST_DIMENSIONS = 4
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 6: (32, 22), 8: (32, 34), 30: (1, 2)}
"""ggml's type → values and bytes of a block, for F32, F16, Q4_0, Q5_0, Q8_0 and BF16: what gori writes or could be
asked to run. Other types are left to llama.cpp."""
F32, Q4_0, Q5_0, Q8_0 = 0, 2, 6, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorPlace:
    """One entry of the directory of tensors."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as NumPy has it."""
    kind: int
    """ggml's number of the type."""
    offset: int
    """From the start of the file."""

    @property
    def size_bytes(self) -> int | None:
        """None for a type that BLOCKS does not list."""
        values, size = BLOCKS.get(self.kind, (0, 0))
        count = 1
        for n in self.shape:
            count *= n
        return count // values * size if values else None


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    file_bytes: int

    def architecture(self) -> str:
        """The key that llama.cpp chooses its network by."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        return self._of(key, str, "a text")

    def integer(self, key: str, default: int | None = None) -> int:
        """`default` where the key is absent; without one it must be there."""
        return default if default is not None and key not in self.metadata else self._of(key, int, "an integer")

    def integers(self, key: str) -> list[int]:
        found = self._of(key, list, "a list of integers")
        if not all(isinstance(i, int) for i in found):
            raise GoriError(f"{key} of the GGUF is not a list of integers: export it again")
        return found

    def _of(self, key: str, kind: type, what: str) -> Any:
        found = self.metadata.get(key)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise GoriError(f"the GGUF's {key} is {'missing' if found is None else f'not {what}'}: export it again")
        return found


class _Reader:
    """Counted reads; `left` bounds every count that the file claims."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.left, self.at = file, size, 0

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise ValueError(f"{n} bytes are wanted at {self.at} and {self.left} are left")
        self.left, self.at = self.left - n, self.at + n
        return self._file.read(n)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, smallest: int) -> int:
        """A count of things that take at least `smallest` bytes each."""
        n = self.number("Q")
        if n * smallest > self.left:
            raise ValueError(f"{n} entries are claimed at {self.at} and {self.left} bytes are left")
        return n

    def string(self) -> str:
        return self.take(self.count(1)).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner = self.number("I")
        if inner == STRING:
            return [self.string() for _ in range(self.count(8))]
        size = struct.calcsize(f"<{SCALARS[inner]}")
        n = self.count(size)
        return list(struct.unpack(f"<{n}{SCALARS[inner]}", self.take(n * size)))


def read_header(path: Path) -> Header:
    """Metadata and tensors of a GGUF.

    Raises GoriError for what is none, is cut off, or names tensors that overlap or lie outside of the file.
    """
    try:
        with path.open("rb") as file:
            return _parse(_Reader(file, path.stat().st_size), path)
    except OSError as e:
        raise GoriError(f"{path} cannot be read ({e.strerror}): export it again") from e
    except (ValueError, KeyError, OverflowError, MemoryError, struct.error) as e:  # KeyError: a type of value unknown
        raise GoriError(f"{path} is not a GGUF that can be read ({e}): export it again") from e


def _parse(r: _Reader, path: Path) -> Header:
    size = r.left
    if r.take(4) != MAGIC:
        raise GoriError(f"{path} is not a GGUF: its first bytes are not {MAGIC.decode()}; export it again")
    if (version := r.number("I")) not in VERSIONS:
        raise GoriError(f"{path} is GGUF version {version}, gori reads {VERSIONS}: export it again")
    tensors, pairs = r.count(24), r.count(12)
    metadata = {}
    for _ in range(pairs):
        key = r.string()
        if key in metadata or len(key) > LONGEST_KEY:
            raise ValueError(f"the key {key[:60]!r} stands there twice or is too long")
        metadata[key] = r.value(r.number("I"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    places = [_place(r) for _ in range(tensors)]
    start = -(-r.at // alignment) * alignment
    return Header(metadata, _checked([start_at(p, start) for p in places], alignment, size), size)


def _place(r: _Reader) -> TensorPlace:
    name, dimensions = r.string(), r.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"{name[:60]!r} has {dimensions} dimensions")
    shape = tuple(r.number("Q") for _ in range(dimensions))[::-1]
    return TensorPlace(name, shape, r.number("I"), r.number("Q"))


def start_at(place: TensorPlace, start: int) -> TensorPlace:
    """The same place, counted from the start of the file."""
    return TensorPlace(place.name, place.shape, place.kind, place.offset + start)


def _checked(places: list[TensorPlace], alignment: int, size: int) -> dict[str, TensorPlace]:
    end = 0
    for p in sorted(places, key=lambda p: p.offset):
        bytes_ = p.size_bytes
        values = BLOCKS.get(p.kind, (1, 0))[0]
        if p.offset % alignment or min(p.shape) < 1 or p.shape[-1] % values:
            raise ValueError(f"{p.name[:60]!r} of shape {list(p.shape)} lies at {p.offset}")
        if p.offset < end or p.offset + (bytes_ or 0) > size:
            raise ValueError(f"{p.name[:60]!r} lies at {p.offset}, outside of the file or on another tensor")
        end = p.offset + (bytes_ or 0)
    found = {p.name: p for p in places}
    if len(found) != len(places):
        raise ValueError("two tensors have one name")
    return found
