"""What every exporter carries: a checkpoint folder's shape, integers and floats under Hugging Face names.

Knows which tensors a decoder has and which schemes a target holds; nothing of any format. Nothing is quantized here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gori import checkpoint, quantized
from gori.errors import GoriError
from gori.export import contents
from gori.export.contents import Found
from gori.model import ModelConfig
from gori.quantize.schemes import EMBEDDINGS, SCHEMES
from gori.quantized import EMBEDDING, HEAD, Quantization, QuantizedTensor, TensorScheme
from gori.targets import Target

DEFAULT_CONTEXT = 512
DEFAULT_CHUNK = 128
"""Tokens a call takes at most: the memory for activations grows with it, prefill hardly gets faster beyond (docs)."""


@dataclass(frozen=True)
class Options:
    """What an export is asked for, lengths resolved."""

    source: Path
    """The checkpoint folder: its tokenizer and template travel with the file."""
    context: int
    """Tokens that the KV cache holds."""
    chunk: int
    """Tokens that one call takes at most."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    backend: str | None = None
    """A variant of the target's engine; None: its default."""
    system: str = ""
    """What stands before every utterance."""
    runner: Path | None = None
    """A gori-call by which keys and values of what stands before every utterance are saved in the artifact."""


@dataclass(frozen=True)
class Weights:
    """What a checkpoint folder holds, under Hugging Face names."""

    cfg: ModelConfig
    integers: dict[str, QuantizedTensor]
    floats: dict[str, Tensor]
    """float32, contiguous."""
    spec: Quantization | None
    """None for a float checkpoint."""

    @property
    def head_name(self) -> str:
        """The tensor that makes logits: its own, or the embedding's that it shares."""
        return HEAD if HEAD in self.integers or HEAD in self.floats else EMBEDDING

    def bias(self, weight: str) -> Tensor | None:
        """The bias beside a weight."""
        return self.floats.get(f"{weight.removesuffix('.weight')}.bias")


def read_weights(source: Path) -> Weights:
    """Everything in a checkpoint folder, integers as they are stored, floats as float32."""
    cfg = checkpoint.read_config(source)
    if cfg.experts:
        raise GoriError(f"{source} is a mixture of experts: distill a dense student and export that")
    if quantized.is_quantized(source):
        spec, integers, floats = quantized.read(source)
    else:
        spec, integers, floats = None, {}, checkpoint.read_tensors(source)
    floats = {k: v.float().contiguous() for k, v in floats.items() if "rotary_emb" not in k}
    if cfg.tied and spec is None:
        floats.pop(HEAD, None)
    check_complete(cfg, {**floats, **integers}, source)
    if broken := [n for n, t in floats.items() if not t.isfinite().all()]:
        raise GoriError(f"{source}: {broken[0]} holds NaN or infinity: train it again with a lower learning rate")
    return Weights(cfg, integers, floats, spec)


def check_complete(cfg: ModelConfig, tensors: Mapping[str, Any], source: Path) -> None:
    """Refuse a folder that lacks a tensor of its decoder."""
    wanted = [EMBEDDING, *linear_names(cfg, EMBEDDING)[:-1], "model.norm.weight"]
    if not cfg.tied:
        wanted.append(HEAD)
    if missing := [n for n in wanted if n not in tensors]:
        raise GoriError(f"{source} lacks {len(missing)} tensors, {missing[0]} among them: copy the checkpoint again")


def linear_names(cfg: ModelConfig, head: str) -> list[str]:
    """The weight of every linear in the order in which a decoder runs them; `head` is the last."""
    return contents.linear_names(cfg.layers, head)


def wanted(w: Weights, *, copied_head: bool = False, float_bits: int = 32) -> dict[str, Found]:
    """What a file must hold: the table and every linear. A head that shares the table has an entry of its own only
    where the format stores it twice (`copied_head`); float weights are float32, or float16 in a format of 16 bits."""
    names = [EMBEDDING, *linear_names(w.cfg, w.head_name)]
    found = {n: as_found(w.integers[n] if n in w.integers else w.floats[n], float_bits) for n in names}
    if copied_head and w.head_name == EMBEDDING:
        found[HEAD] = found[EMBEDDING]
    return found


def as_found(t: QuantizedTensor | Tensor, float_bits: int = 32) -> Found:
    """A checkpoint's tensor in the form that readers give."""
    if isinstance(t, QuantizedTensor):
        return Found(t.scheme.bits, array(t.q), array(t.scale))
    return Found(float_bits, array(t.half() if float_bits == 16 else t))


def array(t: Tensor) -> NDArray[Any]:
    """A contiguous NumPy view."""
    return np.ascontiguousarray(t.detach().numpy())


def packed_bytes(held: Mapping[str, Found]) -> int:
    """Bytes of weights: integers packed, scales at 16 bits, floats as they are."""
    return sum(
        f.weight.nbytes if f.scale is None else f.weight.size * f.bits // 8 + 2 * f.scale.size for f in held.values()
    )


def linear_schemes(spec: Quantization | None) -> dict[str, TensorScheme]:
    """The scheme of every quantized linear, that of a shared head with its own activations."""
    if spec is None:
        return {}
    schemes = {n: s for n, s in spec.tensors.items() if n != EMBEDDING}
    if spec.shared_head:
        table = spec.tensors[EMBEDDING]
        schemes[HEAD] = TensorScheme(table.bits, table.group_size, spec.head_activation_bits)
    return schemes


def check_schemes(spec: Quantization | None, target: Target) -> None:
    """Refuse integers that a target's format does not hold, with the schemes that it does."""
    for name, scheme in linear_schemes(spec).items():
        check_scheme(scheme, f"{name} (scheme {spec.scheme if spec else 'float'})", target)
    if spec and EMBEDDING in spec.tensors:
        table = replace(spec.tensors[EMBEDDING], activation_bits=16)
        if table not in [EMBEDDINGS[n] for n in target.tables]:
            raise GoriError(
                f"{target.engine} does not hold the embedding table's {table.bits}-bit rows in "
                f"{_groups(table)}: quantize with --embedding {', '.join(target.tables)}"
            )


def check_scheme(scheme: TensorScheme, name: str, target: Target) -> None:
    """Refuse a linear's scheme that a target does not hold."""
    if scheme not in [SCHEMES[n] for n in target.linears]:
        raise GoriError(
            f"{target.engine} does not hold {name}, {scheme.bits}-bit weights in {_groups(scheme)}, "
            f"{scheme.activation_bits}-bit activations: "
            f"quantize with one of {', '.join(target.linears)}, or export the float checkpoint"
        )


def _groups(scheme: TensorScheme) -> str:
    return f"groups of {scheme.group_size}" if scheme.group_size else "whole channels"


def resolve_lengths(cfg: ModelConfig, context: int | None, chunk: int | None) -> tuple[int, int]:
    """Context and chunk with their defaults; refused where the model or the cache does not allow them."""
    context = min(cfg.max_position, DEFAULT_CONTEXT) if context is None else context
    if not 2 <= context <= cfg.max_position:
        raise GoriError(f"context {context} is not in 2..{cfg.max_position}, the model's max_position_embeddings")
    chunk = min(DEFAULT_CHUNK, context - 1) if chunk is None else chunk
    if not 1 <= chunk < context:
        raise GoriError(f"chunk {chunk} is not in 1..{context - 1}, one less than the context")
    return context, chunk


def notes(w: Weights, held: Mapping[str, Found]) -> list[str]:
    """What a reader of the manifest must know."""
    if w.spec is None:
        return ["scheme float: a checkpoint without integers"]
    twice = ["the tied table is in the file twice, for look-up and as the head"]
    matrices = {n: why for n, why in w.spec.float_tensors.items() if n in w.floats and w.floats[n].dim() > 1}
    copied = HEAD in held and w.head_name == EMBEDDING
    return [*(twice if copied else []), *(f"{n} is float: {why}" for n, why in matrices.items())]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int) -> None:
    """Refuse golden prompts that no engine could read."""
    for number, ids in enumerate(prompts, start=1):
        if not 1 <= len(ids) <= context:
            raise GoriError(f"prompt {number} has {len(ids)} tokens, allowed are 1 to the context's {context}")
        if wrong := [t for t in ids if not 0 <= t < vocab_size]:
            raise GoriError(f"prompt {number} holds token id {wrong[0]}, the vocabulary is 0..{vocab_size - 1}")
