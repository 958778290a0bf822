"""One shard of a cache: rows of token ids, what of them is to be predicted, and a teacher's few entries at each such
token, in named arrays (gori.tables). Knows nothing of teachers.

    vocab               one number
    ids, row_at         every row's token ids one after the other (u2 or u4), and where each row begins
    loss                bit i: whether token i is to be predicted
    entries             of each such token, how many entries follow (u1)
    entry               their ids, 2 bytes each (a vocabulary up to 65,536) or 3, little-endian
    weight              of each entry, the upper 3 bytes of a float32, little-endian
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori import tables
from gori.artifact import read_bytes
from gori.data import Example
from gori.errors import GoriError
from gori.soft import Soft, join

BLOCK = 1 << 16
"""Bytes that have one checksum, so that damage is told with its place."""


def pack(examples: Sequence[Example], vocab_size: int) -> bytes:
    """A shard's bytes. Every example has `soft`, its weights float32 whose last 8 bits are zero."""
    ids, weights = join([e.soft for e in examples if e.soft is not None])
    kept = weights > 0
    small = kept.sum(1)
    assert small.max(initial=0) < 256
    assert vocab_size <= 1 << 24
    width = 2 if vocab_size <= 1 << 16 else 3
    entry = ids[kept].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
    weight = weights[kept].astype("<f4").view(np.uint8).reshape(-1, 4)
    assert not weight[:, 0].any()
    arrays: dict[str, NDArray[Any]] = {
        "vocab": np.array([vocab_size], np.uint32),
        "ids": np.concatenate([e.ids for e in examples]).astype(np.uint16 if width == 2 else np.uint32),
        "row_at": np.cumsum([0, *(len(e.ids) for e in examples)]).astype(np.uint32),
        "loss": np.packbits(np.concatenate([e.loss for e in examples])),
        "entries": small.astype(np.uint8),
        "entry": entry,
        "weight": weight[:, 1:],
    }
    return tables.dump(arrays)


class Shard(Sequence[Example]):
    """A shard's rows, each made of the arrays when it is asked for."""

    def __init__(self, path: Path) -> None:
        a = tables.load(path)
        self._ids, self._row_at = a["ids"], a["row_at"].astype(np.int64)
        self._loss = np.unpackbits(a["loss"], count=len(self._ids)).astype(bool)
        self._answer_at = np.concatenate(([0], np.cumsum(self._loss)))[self._row_at]
        self._entries = a["entries"]
        self._entry_at = np.concatenate(([0], np.cumsum(self._entries, dtype=np.int64)))
        total = int(self._entry_at[-1])
        width = 2 if a["vocab"][0] <= 1 << 16 else 3
        entry = np.pad(a["entry"].reshape(total, width), ((0, 0), (0, 4 - width)))
        weight = np.pad(a["weight"].reshape(total, 3), ((0, 0), (1, 0)))
        self._entry = entry.view("<u4").reshape(-1).astype(np.int32)
        self._weight = weight.view("<f4").reshape(-1).astype(np.float32)

    def __len__(self) -> int:
        return len(self._row_at) - 1

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        rows, answers = slice(*self._row_at[i : i + 2]), slice(*self._answer_at[i : i + 2])
        counts, start, end = self._entries[answers], *self._entry_at[self._answer_at[i : i + 2]]
        place = np.arange(counts.max(initial=1))[None] < counts[:, None]
        ids, weights = np.zeros(place.shape, np.int32), np.zeros(place.shape, np.float32)
        ids[place], weights[place] = self._entry[start:end], self._weight[start:end]
        return Example(self._ids[rows].tolist(), self._loss[rows].tolist(), Soft(ids, weights))


def seal(data: bytes) -> dict[str, Any]:
    """What tells a shard's damage: its SHA-256, its length and a CRC-32 of each block."""
    crc = [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "crc32": crc}


def check(path: Path, sealed: dict[str, Any]) -> None:
    """Refuse a shard that is not what was sealed, with the place where it differs."""
    data = read_bytes(path)
    if len(data) != sealed["bytes"]:
        raise GoriError(f"{path} has {len(data)} bytes of {sealed['bytes']}: copy the cache again or make it anew")
    if hashlib.sha256(data).hexdigest() == sealed["sha256"]:
        return
    found = seal(data)["crc32"]
    block = next((i for i, (a, b) in enumerate(zip(found, sealed["crc32"], strict=False)) if a != b), 0)
    end = min((block + 1) * BLOCK, len(data))
    raise GoriError(f"{path} was changed in bytes {block * BLOCK}..{end - 1}: copy the cache again or make it anew")
