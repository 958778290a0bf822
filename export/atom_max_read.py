"""Takes integers and scales back out of a written `checkpoint/`, in optimum-rbln's layout.

It reads that directory alone, with NumPy, and shares no code with the writing side. The seven projections are int8 with
one scale a row. Table and head are float16 there; where the source held integers, their scales lie beside as `.npy`
files, the integers follow from both, and integer times scale must give the stored float16 bit for bit.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.artifact import read_bytes, read_object
from gori.errors import GoriError
from gori.export.contents import Found

DIRECTORY, WEIGHTS, FACTS = "checkpoint", "model.safetensors", "gori.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALES = {EMBEDDING: "embed_tokens.scale.npy", HEAD: "lm_head.scale.npy"}
PARTS = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
DTYPES = {"I8": np.int8, "F16": np.float16}
"""What gori writes there."""
ROWS = 4096
"""Of a table that are looked at together: bounds the memory."""

Arrays = dict[str, NDArray[Any]]


def read(directory: Path) -> dict[str, Found]:
    """Weight → what `checkpoint/` holds. A tied head is there twice and has an entry of its own.

    Raises GoriError, naming what is wrong, for files that are damaged or not gori's.
    """
    directory = directory / DIRECTORY
    try:
        return _read(directory)
    except GoriError:
        raise
    except Exception as e:  # a damaged file fails anywhere in its parser
        raise GoriError(
            f"{directory} is not a checkpoint that can be read ({type(e).__name__}): export it again"
        ) from e


def _read(directory: Path) -> dict[str, Found]:
    config, facts = read_object(directory / "config.json"), read_object(directory / FACTS)
    if facts.get("schema_version") != 1 or not isinstance(facts.get("bits"), dict):
        raise GoriError(f"{directory / FACTS} is not gori's, version 1: export again with this version")
    others = sorted(p.name for p in directory.glob("*.safetensors") if p.name != WEIGHTS)
    if others:
        raise GoriError(f"{directory} holds {others[0]} besides {WEIGHTS} and optimum-rbln would load both: remove it")
    bits: dict[str, int] = facts["bits"]
    tensors, layers = read_safetensors(directory / WEIGHTS), int(config["num_hidden_layers"])
    # counted before a list is made: a damaged count may be any number
    if layers > len(tensors):
        raise GoriError(f"{directory} holds {len(tensors)} tensors, too few for {layers} layers: export it again")
    names = [f"model.layers.{i}.{p}.weight" for i in range(layers) for p in PARTS]
    # a tied head is a copy of the table, of the same integers and scales
    tables = {EMBEDDING: EMBEDDING, HEAD: EMBEDDING if config.get("tie_word_embeddings") is True else HEAD}
    found = {name: _linear(tensors, name, bits.get(name), directory) for name in names}
    for name, stored in tables.items():
        scales = directory / SCALES[stored]
        found[name] = _table(_take(tensors, name, directory), name, bits.get(stored), scales)
    if unknown := sorted(set(bits) - set(found)):
        raise GoriError(f"{directory / FACTS} names {unknown[0]}, which config.json has not: export it again")
    if spare := sorted(n for n, t in tensors.items() if not _is_vector(n, t)):
        raise GoriError(f"{directory / WEIGHTS} holds {spare[0]}, which no decoder has: export it again")
    return found


def _is_vector(name: str, t: NDArray[Any]) -> bool:
    return t.ndim == 1 and t.dtype == np.float16 and name.endswith(("norm.weight", ".bias"))


def _take(tensors: Arrays, name: str, directory: Path) -> NDArray[Any]:
    if name not in tensors:
        raise GoriError(f"{directory / WEIGHTS} lacks {name}: export it again")
    return tensors.pop(name)


def _check_bits(bits: Any, name: str, directory: Path) -> int:
    if bits not in (4, 8) or isinstance(bits, bool):
        raise GoriError(f"{directory / FACTS} gives {name} {bits!r} bits, gori writes 4 or 8: export it again")
    return int(bits)


def _linear(tensors: Arrays, name: str, bits: int | None, directory: Path) -> Found:
    """int8 with `weight_scale`, 4 bits unpacked; float16 where no integers were carried."""
    weight = _take(tensors, name, directory)
    if bits is None:
        if weight.dtype != np.float16 or weight.ndim != 2:
            raise GoriError(f"{directory / WEIGHTS}: {name} is {weight.dtype}, expected a float16 matrix")
        return Found(16, weight)
    limit, scale = 2 ** (_check_bits(bits, name, directory) - 1), _take(tensors, f"{name}_scale", directory)
    if weight.dtype != np.int8 or weight.ndim != 2 or scale.shape != (weight.shape[0], 1):
        shapes = f"{weight.dtype} {list(weight.shape)} with scales {list(scale.shape)}"
        raise GoriError(f"{directory / WEIGHTS}: {name} is {shapes}, expected int8 and one scale a row")
    if scale.dtype != np.float16 or not np.isfinite(scale).all():
        raise GoriError(f"{directory / WEIGHTS}: the scales of {name} are not finite float16: export it again")
    if weight.size and (weight.min() < -limit or weight.max() >= limit):
        raise GoriError(f"{directory / WEIGHTS}: {name} holds integers beyond its {bits} bits: export it again")
    return Found(bits, weight, scale.astype(np.float32))


def _table(weight: NDArray[Any], name: str, bits: int | None, file: Path) -> Found:
    """The integers whose products with the scales in `file` are the stored float16."""
    directory = file.parent
    if weight.dtype != np.float16 or weight.ndim != 2:
        raise GoriError(f"{directory / WEIGHTS}: {name} is {weight.dtype}, expected a float16 matrix")
    if bits is None:
        return Found(16, weight)
    limit = 2 ** (_check_bits(bits, name, directory) - 1)
    scale = np.load(io.BytesIO(read_bytes(file)), allow_pickle=False)
    rows, width = weight.shape
    fits = scale.ndim == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and width % scale.shape[1] == 0
    if scale.dtype != np.float16 or not fits:
        raise GoriError(f"{file} holds {scale.dtype} {list(scale.shape)}, which are no scales of {[rows, width]}")
    scale = scale.astype(np.float32)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise GoriError(f"{file} holds a scale that is not a positive number: export it again")
    integers = np.empty((rows, width), np.int8)
    for at in range(0, rows, ROWS):
        part, repeated = weight[at : at + ROWS], np.repeat(scale[at : at + ROWS], width // scale.shape[1], axis=1)
        # garbage may be infinite: the comparison below says so
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)
            q = np.clip(np.nan_to_num(np.rint(part.astype(np.float32) / repeated)), -limit, limit - 1)
            same = (q * repeated + 0.0).astype(np.float16).view(np.uint16) == part.view(np.uint16)
        if not same.all():
            row = at + int(np.argmin(same.all(axis=1)))
            raise GoriError(
                f"{directory / WEIGHTS}: row {row} of {name} is not {bits}-bit integers times the scales in {file.name}"
            )
        integers[at : at + ROWS] = q
    return Found(bits, integers, scale)


def read_safetensors(path: Path) -> Arrays:
    """Tensors of a safetensors file, int8 and float16, without copying them; every length is checked."""
    raw = read_bytes(path)
    size = int.from_bytes(raw[:8], "little") if len(raw) >= 8 else -1
    if not 2 <= size <= len(raw) - 8:
        raise GoriError(f"{path} is cut off or not a safetensors file: export it again")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    body, tensors, end = memoryview(raw)[8 + size :], Arrays(), 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        dtype = np.dtype(DTYPES[entry["dtype"]]) if entry["dtype"] in DTYPES else None
        if dtype is None:
            raise GoriError(f"{path}: {name} is {entry['dtype']}, gori writes {' and '.join(DTYPES)} there")
        count = 1
        for n in shape:
            if not isinstance(n, int) or n < 0:
                raise GoriError(f"{path}: {name} has shape {shape}: export it again")
            count *= n
        if start != end or stop - start != count * dtype.itemsize or stop > len(body):
            raise GoriError(f"{path}: the bytes of {name} are not where they should be: export it again")
        tensors[name] = np.frombuffer(body[start:stop], dtype).reshape(shape)
        end = stop
    if end != len(body):
        raise GoriError(f"{path} holds {len(body) - end} bytes too many: export it again")
    return tensors
