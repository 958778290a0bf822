"""Takes integers and scales back out of a written .gguf.

It reads the file alone, by bytes, and shares nothing with the writing side but the format. Where a scale covers more
than a block of 32, the file says so in `gori.group_sizes`, and the repeats are checked to be one. NumPy alone.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.errors import GoriError
from gori.export.contents import Found
from gori.runtime.gguf_header import F32, Q4_0, Q5_0, Q8_0, Header, TensorPlace, read_header

GGUF = "model.gguf"
BLOCK, SCALE_BYTES = 32, 2
BITS = {Q4_0: 4, Q5_0: 5, Q8_0: 8}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""llama.cpp's names of a layer's linears → Hugging Face's."""
TABLE, OUTPUT = "token_embd.weight", "output.weight"
HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def read(directory: Path) -> dict[str, Found]:
    """Weight → what model.gguf holds. A tied head is in the file once, as the table.

    Raises GoriError for a file that is damaged or not a decoder that gori writes.
    """
    path = directory / GGUF
    header = read_header(path)
    if (kind := header.architecture()) not in ARCHITECTURES:
        raise GoriError(f"{path} is a {kind}, gori reads {', '.join(ARCHITECTURES)}: export it again")
    sizes = group_sizes(header)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {hf: _found(data, header, name, sizes) for name, hf in weight_names(header).items()}


def weight_names(header: Header) -> dict[str, str]:
    """llama.cpp's name → Hugging Face's, of the table, every linear and a head of its own."""
    layers = header.integer(f"{header.architecture()}.block_count")
    if not 1 <= layers <= len(header.tensors):
        raise GoriError(f"the GGUF names {layers} layers and holds {len(header.tensors)} tensors: export it again")
    names = {TABLE: "model.embed_tokens.weight"}
    for i in range(layers):
        names |= {f"blk.{i}.{own}.weight": f"model.layers.{i}.{hf}.weight" for own, hf in PARTS.items()}
    if OUTPUT in header.tensors:
        names[OUTPUT] = "lm_head.weight"
    if missing := [n for n in names if n not in header.tensors]:
        raise GoriError(f"the GGUF lacks {len(missing)} of {len(names)} weights, {missing[0]} among them: export again")
    return names


def group_sizes(header: Header) -> dict[str, int]:
    """Tensor → inputs that share a scale (0: a row), where that is not a block."""
    try:
        found = json.loads(header.text("gori.group_sizes"))
    except ValueError as e:
        raise GoriError(f"the GGUF's gori.group_sizes is not JSON ({e}): export it again") from e
    if not isinstance(found, dict) or not all(type(v) is int and v >= 0 and v % BLOCK == 0 for v in found.values()):
        raise GoriError("the GGUF's gori.group_sizes are not multiples of 32 by tensor: export it again")
    return found


def _found(data: mmap.mmap, header: Header, name: str, sizes: dict[str, int]) -> Found:
    place = header.tensors[name]
    if len(place.shape) != 2 or place.kind not in (F32, *BITS):
        raise GoriError(
            f"{name} of the GGUF is of ggml's type {place.kind}, shape {list(place.shape)}: export it again"
        )
    order = _order(header, place)
    if place.kind == F32:
        return Found(32, np.frombuffer(data, "<f4", _count(place), place.offset).reshape(place.shape)[order].copy())
    weight, scale = _blocks(data, place)
    return Found(BITS[place.kind], weight[order], _grouped(scale[order], place, sizes.get(name, BLOCK)))


def _count(place: TensorPlace) -> int:
    return place.shape[0] * place.shape[1]


def _blocks(data: mmap.mmap, place: TensorPlace) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 `[out, in]` and float32 scales `[out, in / 32]`."""
    out, width = place.shape
    size = SCALE_BYTES + BLOCK * BITS[place.kind] // 8
    raw = np.frombuffer(data, np.uint8, _count(place) // BLOCK * size, place.offset).reshape(-1, size)
    scale = np.ascontiguousarray(raw[:, :SCALE_BYTES]).view("<f2").astype(np.float32).reshape(out, -1)
    body = raw[:, SCALE_BYTES:]
    if place.kind == Q8_0:
        weight = body.copy().view(np.int8)
    else:
        high, nibbles = body[:, : -BLOCK // 2], body[:, -BLOCK // 2 :]
        weight = np.concatenate((nibbles & 15, nibbles >> 4), axis=1).astype(np.int8)
        if place.kind == Q5_0:
            weight |= (np.unpackbits(high, axis=1, bitorder="little") << 4).view(np.int8)
        weight -= np.int8(2 ** (BITS[place.kind] - 1))
    return weight.reshape(out, width), scale


def _grouped(scale: NDArray[np.float32], place: TensorPlace, size: int) -> NDArray[np.float32]:
    """One scale for each group in place of one for each block."""
    out, width = place.shape
    size = size or width
    if width % size:
        raise GoriError(f"groups of {size} do not make up {place.name}'s {width} inputs: export it again")
    blocks = scale.reshape(out, width // size, size // BLOCK)
    if not (blocks == blocks[..., :1]).all():
        raise GoriError(f"blocks of {place.name} that share a scale hold different ones: export it again")
    return np.ascontiguousarray(blocks[..., 0])


def _order(header: Header, place: TensorPlace) -> Any:
    """Which row of the file is each of Hugging Face's: llama's queries and keys stand pair by pair."""
    key = HEADS.get(place.name.split(".")[-2])
    if header.architecture() != "llama" or key is None:
        return slice(None)
    rows, heads = place.shape[0], header.integer(f"llama.{key}")
    if heads < 1 or rows % (2 * heads):
        raise GoriError(f"{place.name} has {rows} rows, which are not {heads} heads of pairs: export it again")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).ravel()
