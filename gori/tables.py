"""Named arrays in one file that a C program maps and reads in place, without a parser and without a copy.

    8 bytes "GORITAB1" · u32 entries · u32 0
    an entry: name (24 bytes, NUL-padded) · u32 type (1 u8, 2 u16, 4 u32, 8 u64) · u32 0 · u64 offset · u64 elements
    the arrays, each at a multiple of 16

Everything is little-endian. It knows nothing of what the arrays are; runtime/cpp/tables.h is the other reader.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.artifact import read_bytes
from gori.errors import GoriError

MAGIC = b"GORITAB1"
HEAD, ENTRY = struct.Struct("<8sII"), struct.Struct("<24sIIQQ")
TYPES = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
ALIGNMENT = 16

Arrays = Mapping[str, NDArray[Any]]


def dump(arrays: Arrays) -> bytes:
    """The file's bytes. An array is written in one dimension, as the unsigned type that it has."""
    offset = _aligned(HEAD.size + ENTRY.size * len(arrays))
    entries, body = [], []
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        assert flat.dtype.kind == "u", name
        assert len(name.encode()) < 24, name
        raw = flat.astype(TYPES[flat.itemsize]).tobytes()
        entries.append(ENTRY.pack(name.encode(), flat.itemsize, 0, offset, flat.size))
        body.append(raw + b"\0" * (_aligned(len(raw)) - len(raw)))
        offset += len(body[-1])
    head = HEAD.pack(MAGIC, len(arrays), 0) + b"".join(entries)
    return head + b"\0" * (_aligned(len(head)) - len(head)) + b"".join(body)


def load(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file; GoriError for what is none."""
    raw = read_bytes(path)
    try:
        magic, count, _ = HEAD.unpack_from(raw)
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}")
        out = {}
        for i in range(count):
            name, kind, _, offset, size = ENTRY.unpack_from(raw, HEAD.size + i * ENTRY.size)
            out[name.rstrip(b"\0").decode()] = np.frombuffer(raw, TYPES[kind], size, offset)
    except (struct.error, ValueError, KeyError) as e:
        raise GoriError(f"{path} is no file of gori's tables ({e}): export the artifact again") from e
    return out


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def strings(texts: Sequence[str | bytes], name: str) -> dict[str, NDArray[Any]]:
    """Two arrays for a list of texts: their bytes, and where each begins (one more offset than texts)."""
    raw = [t.encode() if isinstance(t, str) else t for t in texts]
    offsets = np.cumsum([0, *map(len, raw)]).astype(np.uint32)
    return {name: np.frombuffer(b"".join(raw), np.uint8), f"{name}_at": offsets}


def bytes_of(arrays: Arrays, name: str) -> list[bytes]:
    """The inverse of `strings`."""
    raw, at = arrays[name].tobytes(), arrays[f"{name}_at"].tolist()
    return [raw[a:b] for a, b in pairwise(at)]
