"""The decoder as a graph of plain aten operations, for ExecuTorch's backends that know none of its custom ones.

It computes what export/executorch_graph.py computes, with attention, masks and cache updates spelled out and integers
behind `torchao.dequantize_affine`, the operation by which Core ML's and Vulkan's partitioners know a quantized weight.
Knows nothing of lowering.

Shapes in names: S new tokens, C cache length, K key/value heads, G query heads that share one, d head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  registers torchao's affine operations
from torch import Tensor, nn

from gori.export.executorch_graph import Float, FloatTable, Graph, Layer, Norm, Table
from gori.export.weights import Weights
from gori.model import rope_frequencies
from gori.quantized import EMBEDDING, QuantizedTensor

affine: Any = torch.ops.torchao


@dataclass(frozen=True)
class Dialect:
    """How one backend wants the graph."""

    rounded: bool = False
    """Whether inputs of w*a8 linears are rounded per token in the graph."""
    zeros: bool = False
    """Whether a weight needs a tensor of zero points, which are all zero."""
    affine_table: bool = True
    """Whether the table is dequantized by the same operation as a linear, else by `embedding_4bit`."""
    custom_attention: bool = False
    """Whether `llama::custom_sdpa` and `llama::update_cache` are taken."""
    scaled_norm: bool = False
    """Whether the norm divides by the largest |x| first, for a backend that computes it in float16."""


DIALECTS = {
    # coremltools turns float32 into float16 itself; it puts a read of a state into float32 whatever the graph says
    "coreml": Dialect(scaled_norm=True),
    "qnn": Dialect(scaled_norm=True),  # float16 as Core ML; never compared with anything
    "vulkan": Dialect(rounded=True, zeros=True, affine_table=False, custom_attention=True),
}
"""Backend → how its partitioner wants the graph."""


class Affine(nn.Module):
    """Integers that are multiplied with their scales in the graph; a linear, or a table."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, t: QuantizedTensor, bias: Tensor | None, dialect: Dialect) -> None:
        super().__init__()
        self.scheme, self.dialect = t.scheme, dialect
        self.block = [1, t.q.shape[1] // t.scale.shape[1]]
        self.register_buffer("weight", t.q)
        self.register_buffer("scale", t.scale)
        self.register_buffer("bias", bias)
        if dialect.zeros:
            self.register_buffer("zero", torch.zeros(t.scale.shape, dtype=torch.int8))

    def values(self) -> Tensor:
        low, high = -(2 ** (self.scheme.bits - 1)), 2 ** (self.scheme.bits - 1) - 1
        zero = self.zero if self.dialect.zeros else None
        return affine.dequantize_affine(
            self.weight, self.block, self.scale, zero, torch.int8, low, high, output_dtype=torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.dialect.rounded and self.scheme.activation_bits == 8
        return F.linear(round_tokens(x) if rounded else x, self.values(), self.bias)

    def look_up(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.values())


class AffineTable(nn.Module):
    """Rows of an Affine that a head may share."""

    def __init__(self, rows: Affine) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows.look_up(tokens)


def round_tokens(x: Tensor) -> Tensor:
    """gori.quantized.quantize_activations in torchao's operations."""
    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = affine.choose_qparams_affine(
        x, "ASYMMETRIC", block, torch.int8, -128, 127, torch.finfo(torch.float32).eps, torch.float32, torch.int8
    )
    q = affine.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    return affine.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127, output_dtype=torch.float32)


class ScaledNorm(Norm):
    """Norm that does not overflow in float16, where a square does at 256: the same value by another way."""

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True) + 2.0**-14
        y, eps = x / largest, math.sqrt(self.eps) / largest
        return self.weight * (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps * eps))


class PortableLayer(Layer):
    """Layer with its attention in aten: `place` is (positions [S], mask [G*S, C])."""

    def attend_plainly(self, x: Tensor, rope: tuple[Tensor, Tensor], place: tuple[Tensor, Tensor]) -> Tensor:
        cfg, S, (positions, mask) = self.cfg, x.shape[1], place
        K, G, d = cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_dim
        q, k, v = (m(x).view(1, S, -1, d) for m in (self.q_proj, self.k_proj, self.v_proj))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = turn(q, rope), turn(k, rope)
        self.keys[positions] = k[0]
        self.values[positions] = v[0]
        q = q.view(1, S, K, G, d).permute(0, 2, 3, 1, 4).reshape(1, K, G * S, d)
        keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (self.keys, self.values))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = y.view(1, K, G, S, d).permute(0, 3, 1, 2, 4).reshape(1, S, cfg.heads * d)
        return self.o_proj(y)

    def run(self, x: Tensor, rope: tuple[Tensor, Tensor], place: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attend_plainly(self.input_layernorm(x), rope, place)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def turn(x_1SHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """gori.model.rotate with sines signed."""
    a, b = x_1SHd.chunk(2, dim=-1)
    return x_1SHd * rope[0] + torch.cat((b, a), dim=-1) * rope[1]


class PortableGraph(Graph):
    """Graph in a backend's dialect: `forward(tokens [1, S], input_pos [1]) → logits [1, V]` of the last token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, w: Weights, context: int, dialect: Dialect) -> None:
        super().__init__(w, context)
        self.dialect, self.cfg = dialect, w.cfg
        self.layers = nn.ModuleList(PortableLayer(w, i, context) for i in range(w.cfg.layers))
        self._translate(w)
        angles = torch.arange(context).float().unsqueeze(1) * rope_frequencies(w.cfg)
        cos, sin = angles.cos(), angles.sin()
        # rows of a table: as float16 an angle of 500 would be off by a quarter
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1))
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1))
        del self.rope_freq

    def _translate(self, w: Weights) -> None:
        """Put this dialect's modules in the place of XNNPACK's."""
        norms = [n for n, m in self.named_modules() if isinstance(m, Norm)] if self.dialect.scaled_norm else []
        for name in norms:
            old = self.get_submodule(name)
            self.set_submodule(name, ScaledNorm(old.weight, old.eps))  # type: ignore[arg-type]
        for i, layer in enumerate(self.layers):
            for part in [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]:
                setattr(layer, part.split(".")[1], self._linear(w, f"model.layers.{i}.{part}.weight"))
            if not self.dialect.custom_attention:  # coremltools scatters along a first dimension alone
                layer.keys, layer.values = layer.keys[0], layer.values[0]  # type: ignore[index]
        if EMBEDDING not in w.integers:
            self.table = FloatTable(w.floats[EMBEDDING])
        elif self.dialect.affine_table:
            self.table = AffineTable(Affine(w.integers[EMBEDDING], None, self.dialect))
        else:
            self.table = Table(w.integers[EMBEDDING])
        self.shared = w.head_name == EMBEDDING and isinstance(self.table, AffineTable)
        # under two names a table would be in the file again, outside the delegate
        self.head = nn.Identity() if self.shared else self._linear(w, w.head_name)

    def _linear(self, w: Weights, name: str) -> nn.Module:
        bias = w.bias(name)
        if name in w.integers:
            return Affine(w.integers[name], bias, self.dialect)
        return Float(w.floats[name], bias)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        positions = input_pos + torch.arange(tokens.shape[1])
        rope = tuple(t[positions].view(1, -1, 1, self.cfg.head_dim) for t in (self.cos, self.sin))
        x = self.table(tokens)
        if self.dialect.custom_attention:
            start = input_pos[0].item()
            torch._check(start >= 0)
            torch._check(start < self.context)
            for layer in self.layers:
                x = layer(x, rope, start)
        else:
            seen = torch.arange(self.context).unsqueeze(0) <= positions.unsqueeze(1)
            place = (positions, seen.repeat(self.cfg.heads // self.cfg.kv_heads, 1))
            for layer in self.layers:
                x = layer.run(x, rope, place)  # type: ignore[operator]
        head = self.table.rows if self.shared else self.head
        return head(self.norm(x[:, -1, :]))  # type: ignore[operator]
