"""Bytes that one decode step cannot do without reading: what the machine's read bandwidth is compared with.

Counted from config.json and quantization.json beside the model's file: integers and scales of every linear, the head
included, packed as the checkpoint holds them; one row of the embedding table; keys and values of the tokens so far, in
float32, as gori's sessions keep them. The same for every engine, so it is a lower bound for each: copies with padding,
repeated scales, activations, norms, biases and caches that are read to their end come on top. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gori.artifact import read_object
from gori.errors import GoriError

CONFIG, SCHEMA = "config.json", "quantization.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOAT_BYTES = 4
SCALE_BYTES = 2


@dataclass(frozen=True)
class StepBytes:
    """What is read in a step, in bytes."""

    linears: int
    """Of all layers and the head."""
    embedding_row: int
    cache_per_token: int

    def at(self, tokens: float) -> int:
        """Of a step that sees so many tokens, its own among them."""
        return round(self.linears + self.embedding_row + self.cache_per_token * tokens)


def step_bytes(path: Path) -> StepBytes | str:
    """Of an artifact's directory or of the file in it; where it cannot be told, why."""
    directory = path if path.is_dir() else path.parent
    if not (directory / CONFIG).exists():
        return f"no {CONFIG} lies beside it"
    config = read_object(directory / CONFIG)
    if experts := next((k for k in ("num_experts", "num_local_experts") if config.get(k)), None):
        return f"it is a mixture of {config[experts]} experts, and a step reads those that it is routed to"
    schemes = read_object(directory / SCHEMA)["tensors"] if (directory / SCHEMA).exists() else {}
    try:
        return _count(config, schemes)
    except (KeyError, TypeError) as e:
        raise GoriError(f"{directory / CONFIG} or {SCHEMA} lacks {e}: export the model again") from e


def _count(config: dict[str, Any], schemes: dict[str, dict[str, Any]]) -> StepBytes:
    table = _packed(schemes.get(EMBEDDING), 1, config["hidden_size"])
    head = schemes.get(HEAD, schemes.get(EMBEDDING))
    linears = sum(_packed(schemes.get(n), *shape) for n, shape in linear_shapes(config).items())
    head_bytes = _packed(head, config["vocab_size"], config["hidden_size"])
    _, kv_width = _widths(config)
    return StepBytes(linears + head_bytes, table, 2 * config["num_hidden_layers"] * kv_width * FLOAT_BYTES)


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Every linear of the layers by its checkpoint's name: outputs, inputs."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    wide, narrow = _widths(config)
    shapes = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.{n}.weight": shape for i in layers for n, shape in shapes.items()}


def _widths(config: dict[str, Any]) -> tuple[int, int]:
    """Of all queries of a token, and of its keys."""
    heads = config["num_attention_heads"]
    wide = config.get("head_dim") or config["hidden_size"] // heads
    return heads * wide, (config.get("num_key_value_heads") or heads) * wide


def _packed(scheme: dict[str, Any] | None, out: int, width: int) -> int:
    """Bytes of a weight `[out, width]`; float32 without a scheme."""
    if scheme is None:
        return out * width * FLOAT_BYTES
    groups = width // scheme["group_size"] if scheme["group_size"] else 1
    return out * (width * scheme["bits"] // 8 + SCALE_BYTES * groups)
