"""A reader of FlatBuffers that trusts no offset: whatever the bytes say, it ends with a value or a FormatError.

Knows the wire format (tables, vectors, strings), not any schema: fields are asked for by their number. NumPy alone, so
that a .tflite and a .litertlm can be checked where no engine and no flatbuffers package is installed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_TABLES = 1_000_000
"""Of one vector: a damaged length must not keep a reader busy for hours."""


class FormatError(ValueError):
    """Bytes that are no flatbuffer, or not of the expected kind."""


@dataclass(frozen=True)
class Table:
    """A table at `at` of `data`."""

    data: memoryview
    at: int

    def _field(self, number: int) -> int:
        """Where a field's value stands; 0 if the table lacks it."""
        vtable = self.at - _number(self.data, "<i", self.at)
        slot = 4 + 2 * number
        if slot + 2 > _number(self.data, "<H", vtable):
            return 0
        offset = _number(self.data, "<H", vtable + slot)
        return self.at + offset if offset else 0

    def number(self, field: int, kind: str = "<i", default: int = 0) -> int:
        """A scalar; `kind` as in struct."""
        at = self._field(field)
        return _number(self.data, kind, at) if at else default

    def table(self, field: int) -> Table:
        """A table that must be there."""
        found = self.find(field)
        if found is None:
            raise FormatError(f"field {field} is missing")
        return found

    def find(self, field: int) -> Table | None:
        """A table, None if the field is absent."""
        at = self._field(field)
        return Table(self.data, _follow(self.data, at)) if at else None

    def vector(self, field: int, dtype: str) -> NDArray[Any]:
        """Numbers of a little-endian NumPy type, in place; empty if the field is absent."""
        at = self._field(field)
        if not at:
            return np.zeros(0, dtype)
        start, count = self._vector(at, np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, dtype, count, start)

    def string(self, field: int) -> str:
        """UTF-8 text; empty if the field is absent."""
        return self.vector(field, "u1").tobytes().decode()

    def tables(self, field: int) -> list[Table]:
        """The tables of a vector; empty if the field is absent."""
        at = self._field(field)
        if not at:
            return []
        start, count = self._vector(at, 4)
        if count > MOST_TABLES:
            raise FormatError(f"a vector of {count} tables")
        return [Table(self.data, _follow(self.data, start + 4 * i)) for i in range(count)]

    def _vector(self, at: int, width: int) -> tuple[int, int]:
        start = _follow(self.data, at)
        count = _number(self.data, "<I", start)
        if start + 4 + count * width > len(self.data):
            raise FormatError(f"a vector of {count} elements ends behind the file")
        return start + 4, count


def mapped(path: Path) -> memoryview:
    """A file's bytes, read when they are looked at; ValueError for an empty one, OSError for none."""
    with open(path, "rb") as f:
        return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))


def root(data: memoryview, identifier: bytes = b"") -> Table:
    """The root table; with `identifier` the file must bear it."""
    if identifier and bytes(data[4:8]) != identifier:
        raise FormatError(f"its bytes 4 to 8 are {bytes(data[4:8])!r}, expected {identifier!r}")
    return Table(data, _follow(data, 0))


def metadata(model: Table, name: str) -> bytes | None:
    """Content of a named metadata buffer of a TFLite model (fields as in tflite's schema)."""
    buffers = model.tables(4)
    return next((at(buffers, m.number(1, "<I")).vector(0, "u1").tobytes() for m in _named(model, name)), None)


def _named(model: Table, name: str) -> Iterator[Table]:
    return (m for m in model.tables(6) if m.string(0) == name)


def at(items: list[Table], index: int) -> Table:
    """An element; FormatError for an index outside the list."""
    if not 0 <= index < len(items):
        raise FormatError(f"index {index} of {len(items)} elements")
    return items[index]


def _number(data: memoryview, kind: str, at: int) -> int:
    if not 0 <= at <= len(data) - struct.calcsize(kind):
        raise FormatError(f"an offset points to byte {at} of {len(data)}")
    return struct.unpack_from(kind, data, at)[0]


def _follow(data: memoryview, at: int) -> int:
    return at + _number(data, "<I", at)
