"""A checkpoint folder to an ExecuTorch directory: one .pte that carries the checkpoint's integers, proved by reading
them back and by running the file.

Knows what XNNPACK can hold and what the directory contains; the graph, its lowering and the reader are files of their
own. Nothing is quantized here.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gori import checkpoint, quantized
from gori.artifact import Manifest, content_hash, gate, make, read_manifest
from gori.console import log, peak_rss_mib
from gori.errors import GoriError
from gori.export import parity
from gori.model import ModelConfig
from gori.quantized import EMBEDDING, HEAD, Quantization, QuantizedTensor, TensorScheme
from gori.runtime.eager import special_ids
from gori.runtime.session import open_session

if TYPE_CHECKING:
    from gori.export.executorch_graph import Weights

PTE = "model.pte"
DEFAULT_CONTEXT = 512
DEFAULT_CHUNK = 128
"""Tokens a call takes at most: the memory for activations grows with it, prefill hardly gets faster beyond (docs)."""
COPIED = (
    "config.json", "quantization.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja", "tools.json",
)  # fmt: skip
HELD: dict[str, TensorScheme] = {
    "w8a8-channel": TensorScheme(8, 0, 8),
    "w4a8-channel": TensorScheme(4, 0, 8),
    "w4a8-g32": TensorScheme(4, 32, 8),
    "w4a8-g64": TensorScheme(4, 64, 8),
    "w4a8-g128": TensorScheme(4, 128, 8),
}
"""What XNNPACK of ExecuTorch 1.5.1 computes with integers. Its partitioner takes no weight-only layer (a weight that is
dequantized must meet an input that is), and block scales for 4 bits only."""
UPSTREAM_WARNINGS = (
    ("is deprecated. Use files", DeprecationWarning),  # importlib.resources in executorch.exir
    ("`torch.jit.script_method` is deprecated", DeprecationWarning),  # torch.jit, imported by torchao
    ("This API is experimental", DeprecationWarning),  # executorch's pybindings, on import
    ("_check_is_size will be removed", FutureWarning),  # the meta kernel of llama::update_cache
    ("`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning),  # torch, while it copies a program
    ("Mutation on a buffer in the model", UserWarning),  # the KV caches, whose first content is never read
)
"""What ExecuTorch 1.5.1 says on every export: message and category, by name, so that a new one is seen."""


def export_executorch(
    source: Path,
    out: Path,
    *,
    context: int | None = None,
    chunk: int | None = None,
    prompts: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Write `out` with model.pte and a manifest, unless they are there already; returns the manifest's content.

    `context` is the tokens that the KV cache holds (default: the model's, 512 at most), `chunk` the tokens that one
    call takes (default 128, at most context - 1). `prompts` are golden token ids that are run besides random ones.
    Raises GoriError, and leaves nothing, for a scheme that XNNPACK does not hold, a linear that it did not take, an
    integer that is not in the file, and logits beyond the noise floor.
    """
    cfg = checkpoint.read_config(source)
    context, chunk = resolve_lengths(cfg, context, chunk)
    settings = {"target": "executorch", "context": context, "chunk": chunk, "prompts": [list(p) for p in prompts]}
    manifest = Manifest("export", "executorch", seed, settings, {"checkpoint": content_hash(source)})

    def build(tmp: Path) -> None:
        weights = read_weights(source)
        check_schemes(weights)
        manifest.metrics |= write_pte(weights, tmp / PTE, context, chunk, metadata(source, weights.cfg, context, chunk))
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, tmp / name)
        golden = [*parity.default_prompts(weights.cfg.vocab_size, context, chunk, seed), *map(list, prompts)]
        found = prove_parity(source, tmp / PTE, golden)
        manifest.metrics["parity"] = found.as_dict()
        manifest.gates += gates(manifest.metrics, found)
        manifest.notes = notes(weights)

    with upstream_warnings():
        make(out, manifest, build)
    return read_manifest(out)


@contextmanager
def upstream_warnings() -> Iterator[None]:
    """Leave out the warnings that no user of gori can act on."""
    with warnings.catch_warnings():
        for message, category in UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", f".*{message}", category)
        yield


def read_weights(source: Path) -> Weights:
    """Everything in a checkpoint folder, integers as they are stored."""
    graph = _load_exporter()
    cfg = checkpoint.read_config(source)
    if cfg.experts:
        raise GoriError(f"{source} is a mixture of experts: distill a dense student and export that")
    if not quantized.is_quantized(source):
        return graph.Weights(cfg, {}, checkpoint.read_tensors(source), None)
    spec, integers, floats = quantized.read(source)
    return graph.Weights(cfg, integers, floats, spec)


def _load_exporter() -> Any:
    # torchao names kernels of other machines that it cannot load; torch names torchao's enums
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from gori.export import executorch_graph
    except ImportError as e:
        raise GoriError("exporting to ExecuTorch needs its wheel: pip install 'gori[executorch]'") from e
    return executorch_graph


def resolve_lengths(cfg: ModelConfig, context: int | None, chunk: int | None) -> tuple[int, int]:
    """Context and chunk with their defaults; refused where the model or the cache does not allow them."""
    context = min(cfg.max_position, DEFAULT_CONTEXT) if context is None else context
    if not 2 <= context <= cfg.max_position:
        raise GoriError(f"context {context} is not in 2..{cfg.max_position}, the model's max_position_embeddings")
    chunk = min(DEFAULT_CHUNK, context - 1) if chunk is None else chunk
    if not 1 <= chunk < context:
        raise GoriError(f"chunk {chunk} is not in 1..{context - 1}, one less than the context")
    return context, chunk


def check_schemes(w: Weights) -> None:
    """Refuse integers that XNNPACK's kernels do not compute with."""
    for name, scheme in linear_schemes(w.spec).items():
        check_scheme(scheme, f"{name} (scheme {w.spec.scheme if w.spec else 'float'})")


def check_scheme(scheme: TensorScheme, name: str) -> None:
    """Refuse a scheme that XNNPACK does not hold, with those that it does."""
    if scheme not in HELD.values():
        asked = f"{scheme.bits}-bit weights, {scheme.activation_bits}-bit activations, group {scheme.group_size}"
        raise GoriError(
            f"XNNPACK does not hold {name}, {asked}: "
            f"quantize with one of {', '.join(HELD)}, or export the float checkpoint"
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


def metadata(source: Path, cfg: ModelConfig, context: int, chunk: int) -> dict[str, int | bool | list[int]]:
    """The constant methods by which ExecuTorch's runners, and gori's, know a decoder."""
    bos_id, eos_ids = special_ids(source)
    return {
        "get_vocab_size": cfg.vocab_size,
        "get_max_context_len": context,
        "get_max_seq_len": chunk,
        "get_bos_id": -1 if bos_id is None else bos_id,
        "get_eos_ids": list(eos_ids),
        "get_n_layers": cfg.layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def write_pte(
    w: Weights, path: Path, context: int, chunk: int, constants: dict[str, int | bool | list[int]]
) -> dict[str, Any]:
    """Lower, read every integer back, write; the figures for the manifest."""
    from gori.export.executorch_graph import Graph
    from gori.export.executorch_lower import lower
    from gori.export.executorch_read import check_integers

    cpu_s, wall_s = time.process_time(), time.monotonic()
    log(f"lowering {w.cfg.layers} layers for XNNPACK")
    lowered = lower(Graph(w, context).eval(), chunk, constants)
    names = linear_names(w)
    compared = check_integers(lowered.pte, EMBEDDING, names, {**w.floats, **w.integers})
    path.write_bytes(lowered.pte)
    packed = packed_bytes(w, names)
    log(f"{len(lowered.delegated)}/{len(names)} linears delegated, {compared} tensors read back exact, {packed} → "
        f"{len(lowered.pte)} bytes, {time.process_time() - cpu_s:.1f} core-seconds")  # fmt: skip
    return {
        "export_core_s": round(time.process_time() - cpu_s, 2),
        "export_wall_s": round(time.monotonic() - wall_s, 2),
        "peak_rss_mib": round(peak_rss_mib(), 1),
        "delegated_linears": len(lowered.delegated),
        "linears": len(names),
        "tensors_read_back": compared,
        "pte_bytes": len(lowered.pte),
        "packed_bytes": packed,
    }


def linear_names(w: Weights) -> list[str]:
    """The weight of every linear in the order in which the graph runs them."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [f"model.layers.{i}.{p}.weight" for i in range(w.cfg.layers) for p in parts] + [w.head_name]


def packed_bytes(w: Weights, linears: Sequence[str]) -> int:
    """Bytes of the table and every linear, integers packed and scales at 16 bits, a shared table counted twice."""
    everything: Mapping[str, Tensor | QuantizedTensor] = {**w.floats, **w.integers}
    sizes = (everything[n] for n in (EMBEDDING, *linears))
    return sum(t.packed_bytes() if isinstance(t, QuantizedTensor) else t.numel() * 4 for t in sizes)


def prove_parity(source: Path, pte: Path, prompts: Sequence[Sequence[int]]) -> parity.Parity:
    """Run the written file against the eager checkpoint; GoriError beyond the noise floor."""
    found = parity.measure_parity(open_session(pte), quantized.load(source), prompts)
    log(parity.describe(found))
    parity.require_parity(found, "ExecuTorch")
    return found


def gates(metrics: dict[str, Any], found: parity.Parity) -> list[dict[str, Any]]:
    bound = metrics["packed_bytes"] * 5 // 4 + 100_000
    return [
        gate("parity kl_mean", found.engine.kl_mean, found.kl_bound, at_least=False),
        gate("parity single tokens", found.single.engine_p05, found.single.bound, at_least=False),
        gate("parity longer prompts", found.longer.engine_p05, found.longer.bound, at_least=False),
        gate("pte_bytes", metrics["pte_bytes"], bound, at_least=False),
    ]


def notes(w: Weights) -> list[str]:
    """What a reader of the manifest must know."""
    if w.spec is None:
        return ["scheme float: a checkpoint without integers, exported in float32"]
    twice = ["the tied table is in the file twice, for look-up and as the head: XNNPACK packs its own"]
    matrices = {n: why for n, why in w.spec.float_tensors.items() if n in w.floats and w.floats[n].dim() > 1}
    return [*(twice if w.spec.shared_head else []), *(f"{n} is float: {why}" for n, why in matrices.items())]
