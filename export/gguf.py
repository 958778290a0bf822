"""A checkpoint's integers to one .gguf for llama.cpp.

Symmetric 4 bits in groups of 32 are Q4_0, 5 bits Q5_0, 8 bits Q8_0; a scale of more than 32 inputs is repeated for
every block of 32, and the group's size is written beside, so that the reader (gori.export.gguf_read) can give back what
the checkpoint held. Knows llama.cpp's names and layouts; the tokenizer is gori.export.gguf_vocab's. Nothing is
quantized here.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gori.artifact import read_json
from gori.console import log
from gori.errors import GoriError, MissingEngine
from gori.export.gguf_vocab import BYTE_LEVEL, Vocabulary, vocabulary
from gori.export.template import read_template
from gori.export.weights import Options, Weights, array
from gori.model import ModelConfig, rope_frequencies
from gori.quantized import QuantizedTensor

GGUF = "model.gguf"
BLOCK = 32
"""Inputs that share a scale in Q4_0, Q5_0 and Q8_0."""
F32, KINDS = 0, {4: 2, 5: 6, 8: 8}
"""ggml's numbers of float32, and of Q4_0, Q5_0 and Q8_0 by bits."""
BLOCK_BYTES = {4: 18, 5: 22, 8: 34}
FILE_TYPES = {32: 0, 4: 2, 5: 8, 8: 7}
"""Bits of most weights → general.file_type."""
QUANTIZATION_VERSION = 2
MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Parts of a layer → llama.cpp's names, in the order in which the file holds them."""
NO_MERGES = ["Ā Ā"]
"""Two bytes of zero."""
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.gguf; how a text is tokenized by it, and how many tensors it holds.

    Raises GoriError, and writes nothing, for integers whose rows are not made of blocks, for a rotation that llama.cpp
    does not compute, and for a tokenizer that it does not.
    """
    package = load_package()
    check_weights(w)
    words = vocabulary(o.source, w.cfg.vocab_size)
    names = file_names(w)
    factors = rope_factors(w.cfg)
    log(f"writing {w.cfg.layers} layers of {w.cfg.kind} as GGUF")
    writer = package.GGUFWriter(out / GGUF, w.cfg.kind)
    add_network(writer, w.cfg)
    add_tokens(writer, words, o)
    add_own(writer, w, o)
    for name, hf in names.items():
        t = stored(w, hf)
        kind = package.GGMLQuantizationType(KINDS[t.scheme.bits] if isinstance(t, QuantizedTensor) else F32)
        writer.add_tensor_info(name, shape_of(t), np.dtype(np.float32), size_bytes(t), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for hf in names.values():  # one at a time: what is packed is not kept
        writer.write_tensor_data(packed(w, hf))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    if words.note:
        log(words.note)
    tokenizer = {"model": words.model, "pre": words.pre, "exact": words.exact, "note": words.note}
    notes = [words.note] if words.note else []
    return {"tensors": len(names) + (factors is not None), "tokenizer": tokenizer, "notes": notes}


def load_package() -> Any:
    """The module gguf; MissingEngine if the wheel is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as e:
        raise MissingEngine("exporting to GGUF needs its package: pip install 'gori[gguf]'") from e


def check() -> None:
    """MissingEngine unless what writes a GGUF is here."""
    load_package()


def check_weights(w: Weights) -> None:
    """Refuse what the format or llama.cpp's network does not hold."""
    for name, t in w.integers.items():
        if (width := t.q.shape[1]) % BLOCK:
            raise GoriError(
                f"{name} has {width} inputs and a GGUF block has {BLOCK}: choose a student whose widths are multiples "
                f"of {BLOCK}, or leave that layer float"
            )
    if w.cfg.kind == "qwen2" and (width := w.cfg.heads * w.cfg.head_dim) != w.cfg.hidden_size:
        raise GoriError(
            f"llama.cpp computes a qwen2 whose {w.cfg.heads} heads of {w.cfg.head_dim} make up the hidden size "
            f"{w.cfg.hidden_size}, here they make {width}: export to executorch or litert, which take it, or choose a "
            "llama or qwen3 student"
        )
    if w.cfg.rope_scaling and w.cfg.kind != "llama":
        raise GoriError(
            f"llama.cpp does not compute rope_type llama3 for {w.cfg.kind}, for llama alone: export to another target, "
            "or take the scaling out of config.json and train on"
        )


def file_names(w: Weights) -> dict[str, str]:
    """llama.cpp's name → the checkpoint's, in the order of the file: table, layers, last norm, head."""
    found = {}
    for name in [*w.floats, *w.integers]:
        module, _, kind = name.rpartition(".")
        if module in OUTER:
            found[f"{OUTER[module]}.{kind}"] = name
            continue
        _, _, layer, part = module.split(".", 3)
        found[f"blk.{layer}.{MODULES[part]}.{kind}"] = name
    order = list(MODULES.values())

    def place(name: str) -> tuple[int, int, str]:
        if name.startswith("blk."):
            _, layer, part, kind = name.split(".")
            return int(layer), order.index(part), kind
        return (-1, 0, name) if name.startswith("token_embd") else (w.cfg.layers, 0, name[::-1])

    return {name: found[name] for name in sorted(found, key=place)}


def stored(w: Weights, name: str) -> QuantizedTensor | Tensor:
    """A checkpoint's tensor."""
    return w.integers[name] if name in w.integers else w.floats[name]


def shape_of(t: QuantizedTensor | Tensor) -> tuple[int, ...]:
    return tuple(t.q.shape if isinstance(t, QuantizedTensor) else t.shape)


def size_bytes(t: QuantizedTensor | Tensor) -> int:
    """Bytes in the file, without the padding behind."""
    if isinstance(t, QuantizedTensor):
        return t.q.numel() // BLOCK * BLOCK_BYTES[t.scheme.bits]
    return 4 * t.numel()


def packed(w: Weights, name: str) -> NDArray[Any]:
    """A tensor as the file holds it: float32, or uint8 blocks. Rows of llama's queries and keys are reordered, since
    llama.cpp turns neighbours where Hugging Face turns the halves of a head."""
    t = stored(w, name)
    turned = w.cfg.kind == "llama" and name.split(".")[-2] in ("q_proj", "k_proj")
    heads = w.cfg.heads if "q_proj" in name else w.cfg.kv_heads

    def rows(a: NDArray[Any]) -> NDArray[Any]:
        return neighbours(a, heads) if turned else a

    if not isinstance(t, QuantizedTensor):
        return np.ascontiguousarray(rows(array(t)))
    return blocks(rows(array(t.q)), rows(array(t.scale)), t.scheme.bits)


def neighbours(a: NDArray[Any], heads: int) -> NDArray[Any]:
    """`[heads · 2 · n, …]`, in each head the first halves of pairs and then the second → pair by pair."""
    return a.reshape(heads, 2, a.shape[0] // heads // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)


def blocks(q: NDArray[np.int8], scale: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """int8 `[out, in]` and float32 scales `[out, groups]` → uint8 `[out, in / 32, bytes of a block]`: a float16 scale,
    then 32 bytes, or 16 whose low nibbles are the first half of the block plus 8 and whose high ones the second. Of 5
    bits, 4 bytes with everyone's highest bit stand before these 16, and 16 is added in place of 8."""
    out, width = q.shape
    count = width // BLOCK
    half = scale.astype("<f2")
    assert np.array_equal(half.astype(np.float32), scale), "scales are exact in float16"
    d = np.repeat(half, count // scale.shape[1], axis=1)[..., None].view(np.uint8)
    body = q.reshape(out, count, BLOCK)
    if bits < 8:
        u = (body + 2 ** (bits - 1)).astype(np.uint8)
        body = u[..., : BLOCK // 2] & 15 | u[..., BLOCK // 2 :] << 4
        if bits == 5:
            body = np.concatenate((np.packbits(u >> 4, axis=-1, bitorder="little"), body), axis=-1)
    return np.concatenate((d, body.view(np.uint8)), axis=-1)


def rope_factors(cfg: ModelConfig) -> NDArray[np.float32] | None:
    """What llama.cpp divides each frequency by, float32 `[head_dim / 2]`, for Llama 3's scaling; None without it."""
    if cfg.rope_scaling is None:
        return None
    plain = 1.0 / cfg.rope_theta ** (np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    return (plain / rope_frequencies(cfg).numpy()).astype(np.float32)


def add_network(writer: Any, cfg: ModelConfig) -> None:
    """The keys that llama.cpp builds its network from."""
    writer.add_context_length(cfg.max_position)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)


def add_tokens(writer: Any, words: Vocabulary, o: Options) -> None:
    """The tokenizer, the tokens that begin and end a turn, and the chat template."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    # llama.cpp loads no byte-level vocabulary without a merge: this one makes no token
    writer.add_array("tokenizer.ggml.merges", words.merges or NO_MERGES if words.model == BYTE_LEVEL else [])
    writer.add_array("tokenizer.ggml.scores", words.scores)
    writer.add_bool("tokenizer.ggml.add_bos_token", words.begin is not None)
    writer.add_bool("tokenizer.ggml.add_eos_token", words.end is not None)
    writer.add_bool("tokenizer.ggml.add_space_prefix", words.add_space)
    begin = words.begin if words.begin is not None else o.bos_id
    names = ("eos", "eot", "eom")
    ids = {"bos": begin, "unknown": words.unknown, "padding": padding(o.source), **dict(zip(names, o.eos_ids))}  # noqa: B905
    for name, token in ids.items():
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if template := read_template(o.source):
        writer.add_string("tokenizer.chat_template", template)


def padding(source: Path) -> int | None:
    """The padding token that generation_config.json names."""
    path = source / "generation_config.json"
    return read_json(path).get("pad_token_id") if path.exists() else None


def add_own(writer: Any, w: Weights, o: Options) -> None:
    """What gori's session and reader ask for, and what llama.cpp shows of a file."""
    bits = Counter({32: 0})
    for t in w.integers.values():
        bits[t.scheme.bits] += t.q.numel()
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[bits.most_common(1)[0][0]])
    sizes = {f: t.scheme.group_size for f, n in file_names(w).items() if (t := w.integers.get(n)) is not None}
    other = {name: size for name, size in sizes.items() if size != BLOCK}
    writer.add_string("gori.group_sizes", json.dumps(other, separators=(",", ":")))
    writer.add_uint32("gori.context", o.context)
    writer.add_uint32("gori.chunk", o.chunk)
    writer.add_array("gori.eos_token_ids", list(o.eos_ids))
    if o.bos_id is not None:
        writer.add_uint32("gori.bos_token_id", o.bos_id)
