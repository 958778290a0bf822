"""The decoder as a graph that ExecuTorch lowers: given integers as explicit `quantized_decomposed` ops, caches as
buffers.

It computes what gori.model and gori.quantized compute, one sequence at a time, for the last token only; it knows
nothing of files or of lowering. Importing it needs ExecuTorch, whose wheel registers the operators that it calls.

Shapes in names: S new tokens of this chunk, C cache length, D model width, H query heads, K key/value heads,
V vocabulary, G groups of a weight's row.
"""

from __future__ import annotations

import executorch.extension.llm.custom_ops.custom_ops  # registers llama::custom_sdpa and update_cache
import executorch.kernels.quantized  # noqa: F401  registers quantized_decomposed::embedding_byte and embedding_4bit
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gori.export.weights import Weights
from gori.model import rope_frequencies
from gori.quantized import EMBEDDING, QuantizedTensor

decomposed = torch.ops.quantized_decomposed


def pack_embedding_int4(q_VD: Tensor) -> Tensor:
    """int8 `[V, D]` in [-8, 7] → uint8 `[V, D/2]` as `embedding_4bit` reads it: plus 8, the even index in the high
    nibble (the other way round than gori's own checkpoint)."""
    u = (q_VD + 8).to(torch.uint8)
    return u[:, 0::2] << 4 | u[:, 1::2]


class Table(nn.Module):
    """Embedding rows of integers; the scales stay float16, in which they are exact."""

    weight: Tensor
    scale: Tensor

    def __init__(self, t: QuantizedTensor) -> None:
        super().__init__()
        self.bits = t.scheme.bits
        self.register_buffer("weight", pack_embedding_int4(t.q) if self.bits == 4 else t.q)
        self.register_buffer("scale", t.scale.half().squeeze(1) if t.scale.shape[1] == 1 else t.scale.half())

    def forward(self, tokens: Tensor) -> Tensor:
        if self.bits == 4:
            return decomposed.embedding_4bit.dtype(self.weight, self.scale, None, -8, 7, tokens, dtype=torch.float32)
        return decomposed.embedding_byte.dtype(self.weight, self.scale, None, -128, 127, tokens, dtype=torch.float32)


class FloatTable(nn.Module):
    """Embedding rows of float32."""

    weight: Tensor

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VD)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Integers(nn.Module):
    """A linear layer of given integers; `project` gives it an input that is rounded, as XNNPACK's kernels do."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, t: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.group_size = t.scheme.bits, t.scheme.group_size
        # one dimension for channels, int64 zeros for channels and int8 for groups: what the partitioner takes; a slice
        # or a squeeze inside the graph is not delegated
        scale = t.scale if self.group_size else t.scale.squeeze(1)
        self.register_buffer("weight", t.q)
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int8 if self.group_size else torch.int64))
        self.register_buffer("bias", bias)

    def forward(self, rounded: Tensor) -> Tensor:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        q, scale, zero = self.weight, self.scale, self.zero
        if self.group_size:
            w = decomposed.dequantize_per_channel_group(
                q, scale, zero, low, high, torch.int8, self.group_size, torch.float32
            )
        else:
            w = decomposed.dequantize_per_channel(q, scale, zero, 0, low, high, torch.int8)
        return F.linear(rounded, w, self.bias)


def round_tokens(x: Tensor) -> Tensor:
    """The explicit form of gori.quantized.quantize_activations."""
    scale, zero = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    q = decomposed.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return decomposed.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)


class Float(nn.Module):
    """A linear layer of float32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """gori.model.RMSNorm with `x * x` for `x.pow(2)`: the same float32, and XNNPACK has a kernel for it."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


def project(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Every linear of one input. The input is rounded once for all of them: a third less nodes to lower, and XNNPACK
    converts it once."""
    rounded = round_tokens(x) if any(isinstance(m, Integers) for m in linears) else x
    return [m(rounded if isinstance(m, Integers) else x) for m in linears]


def linear(w: Weights, name: str) -> nn.Module:
    """The linear layer of a weight's name."""
    bias = w.bias(name)
    return Integers(w.integers[name], bias) if name in w.integers else Float(w.floats[name], bias)


def rotate(x_1SHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """gori.model.rotate with the sign of the half-turn in the sines: the same products, one node less a head."""
    cos_1S1d, signed_sin_1S1d = rope
    a, b = x_1SHd.chunk(2, dim=-1)
    return x_1SHd * cos_1S1d + torch.cat((b, a), dim=-1) * signed_sin_1S1d


class Layer(nn.Module):
    """One block with its own key and value cache, `[1, C, K, d]`."""

    keys: Tensor
    values: Tensor
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, w: Weights, index: int, context: int) -> None:
        super().__init__()
        cfg, stem = w.cfg, f"model.layers.{index}."
        self.cfg = cfg
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, part, linear(w, f"{stem}self_attn.{part}.weight"))
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, part, linear(w, f"{stem}mlp.{part}.weight"))
        norms = ("input_layernorm", "post_attention_layernorm")
        for part in norms + (("self_attn.q_norm", "self_attn.k_norm") if cfg.qk_norm else ()):
            setattr(self, part.split(".")[-1], Norm(w.floats[f"{stem}{part}.weight"], cfg.norm_eps))
        self.register_buffer("keys", torch.zeros(1, context, cfg.kv_heads, cfg.head_dim))
        self.register_buffer("values", torch.zeros(1, context, cfg.kv_heads, cfg.head_dim))

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor], start: int) -> Tensor:
        cfg, S = self.cfg, x.shape[1]
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.view(1, S, -1, cfg.head_dim) for t in (q, k, v))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        torch.ops.llama.update_cache(k, self.keys, start)
        torch.ops.llama.update_cache(v, self.values, start)
        y = torch.ops.llama.custom_sdpa(q, self.keys, self.values, start, None, 0.0, True, cfg.head_dim**-0.5)
        return project(y.view(1, S, cfg.heads * cfg.head_dim), self.o_proj)[0]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], start: int) -> Tensor:
        x = x + self.attend(self.input_layernorm(x), rope, start)
        gate, up = project(self.post_attention_layernorm(x), self.gate_proj, self.up_proj)
        return x + project(F.silu(gate) * up, self.down_proj)[0]


ROWS = 4
"""Tokens of one call whose logits a caller may ask for: one, and three that were guessed and are to be checked."""


class Graph(nn.Module):
    """`forward(tokens [1, S] int64, input_pos [R] int64) → logits [R, V]` of the last R ≤ S tokens. `input_pos[0]` is
    the first token's position, what else stands in it is not read: its length alone says how many rows are wanted."""

    rope_freq: Tensor

    def __init__(self, w: Weights, context: int) -> None:
        super().__init__()
        self.context = context
        self.table = Table(w.integers[EMBEDDING]) if EMBEDDING in w.integers else FloatTable(w.floats[EMBEDDING])
        self.layers = nn.ModuleList(Layer(w, i, context) for i in range(w.cfg.layers))
        self.norm = Norm(w.floats["model.norm.weight"], w.cfg.norm_eps)
        self.head = linear(w, w.head_name)
        self.register_buffer("rope_freq", rope_frequencies(w.cfg))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.context)
        rope = self.rope(start + torch.arange(tokens.shape[1]))
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, rope, start)
        # by index, not as a slice: torch.export would want to know that R ≤ S
        wanted_R = torch.arange(input_pos.shape[0]) + (tokens.shape[1] - input_pos.shape[0])
        return project(self.norm(x.index_select(1, wanted_R)[0]), self.head)[0]

    def rope(self, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[1, S, 1, d]`, computed at run time: as a table they would be the file's largest
        constant in a small model."""
        half = positions_S.view(1, -1, 1, 1).float() * self.rope_freq
        cos, sin = half.cos(), half.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
