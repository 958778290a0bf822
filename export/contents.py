"""What a written file holds, as its reader found it, and whether that is what was to be carried. NumPy alone.

Every format's reader gives `{Hugging Face name: Found}`; the comparison, the hash by which two files of one student
are seen to hold the same integers, and what several readers need (the names of a decoder's linears, nibbles) are here
for all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.artifact import read_object
from gori.errors import GoriError

Array = NDArray[Any]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Found:
    """A weight: integers with scales, or floats."""

    bits: int
    """4 or 8; 32 for float32, 16 for float16."""
    weight: NDArray[Any]
    """int8, float32 or float16, `[out, in]`."""
    scale: NDArray[np.float32] | None = None
    """float32 `[out, groups]`; None for a float weight."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 where a row has one."""
        groups = 1 if self.scale is None else self.scale.shape[1]
        return 0 if groups == 1 else self.weight.shape[1] // groups

    def digest(self) -> str:
        """Hex SHA-256 over bits, shape, integers (int8, row by row) and scales (little-endian float32)."""
        head = json.dumps([self.bits, *self.weight.shape, self.group_size])
        digest = hashlib.sha256(head.encode())
        digest.update(np.ascontiguousarray(self.weight).tobytes())
        if self.scale is not None:
            digest.update(np.ascontiguousarray(self.scale, dtype="<f4").tobytes())
        return digest.hexdigest()


def difference(found: Found, want: Found) -> str:
    """What differs, in words; empty if nothing does."""
    if found.bits != want.bits or found.weight.shape != want.weight.shape:
        got, asked = list(found.weight.shape), list(want.weight.shape)
        return f"{found.bits} bits {got}, expected {want.bits} bits {asked}"
    if not np.array_equal(found.weight, want.weight):
        return f"{int((found.weight != want.weight).sum())} of {want.weight.size} values differ"
    if want.scale is not None and (found.scale is None or not np.array_equal(found.scale, want.scale)):
        return "scales differ"
    return ""


def compare(found: Mapping[str, Found], want: Mapping[str, Found], file: str) -> int:
    """Every tensor of a file against those that it was to carry; the number compared.

    Raises GoriError that names the first that differ, are missing or are too many.
    """
    if missing := sorted(set(want) - set(found)):
        raise GoriError(
            f"{file} lacks {len(missing)} of {len(want)} tensors, {missing[0]} among them: nothing was kept"
        )
    if spare := sorted(set(found) - set(want)):
        raise GoriError(f"{file} holds {len(spare)} tensors that the checkpoint has not, {spare[0]} among them")
    wrong = [f"{name} ({why})" for name in want if (why := difference(found[name], want[name]))]
    if wrong:
        raise GoriError(
            f"{len(wrong)} of {len(want)} tensors in {file} are not the checkpoint's: {', '.join(wrong[:3])}"
        )
    return len(want)


def digests(contents: Mapping[str, Found]) -> dict[str, str]:
    """Weight → hash of its integers and scales; float weights are left out, formats keep them at different widths."""
    return {name: f.digest() for name, f in sorted(contents.items()) if f.scale is not None}


def linear_names(layers: int, head: str) -> list[str]:
    """The weight of every linear in the order in which a decoder runs them; `head` is the last."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [f"model.layers.{i}.{p}.weight" for i in range(layers) for p in parts] + [head]


def linears_of(directory: Path) -> list[str]:
    """The linears of the decoder that config.json describes, in running order; the head is the last."""
    return linear_names(int(read_object(directory / "config.json")["num_hidden_layers"]), HEAD)


def named(file: Path, table: Found, linears: Sequence[Found]) -> dict[str, Found]:
    """A decoder's weights by name, where a file tells them apart by their running order alone. A head that is the table
    has no entry of its own. Raises GoriError if they are not as many as config.json beside the file asks for."""
    names = linears_of(file.parent)
    if len(linears) != len(names):
        raise GoriError(
            f"{file} holds {len(linears)} linear layers, config.json asks for {len(names)}: export it again"
        )
    found = {EMBEDDING: table, **dict(zip(names, linears, strict=True))}
    if found[HEAD] is table:
        del found[HEAD]
    return found


def unpack_int4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Two's-complement nibbles, low first, to int8 in one dimension."""
    both = np.empty((packed.size, 2), np.int8)
    both[:, 0] = (packed.reshape(-1) << 4).view(np.int8)
    both[:, 1] = packed.reshape(-1).view(np.int8)
    both >>= 4
    return both.reshape(-1)
