"""The one decoder: GQA, RoPE, optional qk-norm and biases, a SwiGLU that is dense or a mixture of experts.

It knows nothing of files, losses or quantization: gori.checkpoint reads and writes its weights, and quantize replaces
its `Linear` and `Embedding` modules. Parameter names are those of Hugging Face's Llama, Qwen2, Qwen3 and Qwen3-MoE.

Shapes in names: B batch, T new tokens, S cached tokens, D model width, H query heads, K key/value heads, V vocabulary,
W positions that are wanted, M that the experts' balance counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gori.dropout import Dropout
from gori.errors import GoriError
from gori.inner import Kept
from gori.moe import MoE
from gori.norm import RMSNorm
from gori.precision import for_products

Kind = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (Llama 3.1, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. `kind` decides biases (qwen2) and qk-norm (qwen3, qwen3_moe)."""

    kind: Kind
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    """MLP width of a dense layer; for qwen3_moe of one expert."""
    experts: int = 0
    """Experts a layer; 0 is a dense model."""
    experts_per_token: int = 0
    norm_topk: bool = True
    """Whether the chosen experts' weights are scaled to sum to one."""
    max_position: int = 512
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    """Whether the head is the embedding table."""
    init_std: float = 0.02
    extra: dict[str, object] = field(default_factory=dict, compare=False)
    """Fields of the source config.json that the decoder does not use and that a saved copy keeps."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise GoriError(
                f"{self.kv_heads} key/value heads do not divide {self.heads} query heads: "
                f"choose one of {[k for k in range(1, self.heads + 1) if self.heads % k == 0]}"
            )
        if self.head_dim % 2:
            raise GoriError(f"head_dim {self.head_dim} is odd and RoPE turns pairs: choose an even one")
        if (self.kind == "qwen3_moe") != (self.experts > 0):
            raise GoriError(f"kind {self.kind} with {self.experts} experts: a mixture of experts is kind qwen3_moe")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise GoriError(f"experts_per_token {self.experts_per_token} must lie in 1..{self.experts}")

    @property
    def qk_norm(self) -> bool:
        return self.kind in ("qwen3", "qwen3_moe")


def rope_frequencies(cfg: ModelConfig) -> Tensor:
    """Inverse frequencies [head_dim / 2], float32, with Llama 3's scaling where the config asks for it."""
    inv = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, dtype=torch.int64).float() / cfg.head_dim)
    r = cfg.rope_scaling
    if r is None:
        return inv
    wavelength = 2 * math.pi / inv
    low, high = r.original_max_position / r.low_freq_factor, r.original_max_position / r.high_freq_factor
    smooth = (r.original_max_position / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
    blended = (1 - smooth) * inv / r.factor + smooth * inv
    scaled = torch.where(wavelength > low, inv / r.factor, inv)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def rotate(x_BTHd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face (RoFormer, arXiv 2104.09864)."""
    a, b = x_BTHd.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return x_BTHd * cos_BTd.unsqueeze(-2) + turned * sin_BTd.unsqueeze(-2)


class KVCache:
    """Keys and values of every layer, `[B, K, max_len, head_dim]`, and how many positions are filled; dtype and device
    are those of the first that come."""

    def __init__(self, cfg: ModelConfig, batch: int, max_len: int) -> None:
        self._shape = (cfg.layers, batch, cfg.kv_heads, max_len, cfg.head_dim)
        self.k = self.v = torch.empty(0)
        self.length = 0
        self.max_len = max_len

    def append(self, layer: int, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer; return all of them up to now, `[B, K, S+T, head_dim]`."""
        end = self.length + k_BKTd.shape[2]
        if end > self.max_len:
            raise GoriError(f"{end} tokens do not fit the KV cache of {self.max_len}: shorten the prompt or enlarge it")
        if not self.k.numel():
            self.k, self.v = k_BKTd.new_zeros(self._shape), v_BKTd.new_zeros(self._shape)
        self.k[layer, :, :, self.length : end] = k_BKTd
        self.v[layer, :, :, self.length : end] = v_BKTd
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        bias = cfg.kind == "qwen2"
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.heads * cfg.head_dim, bias=bias)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.kv_heads * cfg.head_dim, bias=bias)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.kv_heads * cfg.head_dim, bias=bias)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.hidden_size, bias=False)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)

    def qkv(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[B, T, H, d]`, rotated keys and values `[B, T, K, d]`."""
        B, T, d = x_BTD.shape[0], x_BTD.shape[1], self.cfg.head_dim
        q = self.q_proj(x_BTD).view(B, T, self.cfg.heads, d)
        k = self.k_proj(x_BTD).view(B, T, self.cfg.kv_heads, d)
        v = self.v_proj(x_BTD).view(B, T, self.cfg.kv_heads, d)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rope
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        kept: Kept | None = None,
    ) -> Tensor:
        """What the heads found, `[B, T, H * head_dim]`; the block applies `o_proj`, where it is wanted."""
        qkv = self.qkv(x_BTD, rope)
        if kept is not None:
            kept.attends(self.layer, qkv)
        q, k, v = (t.transpose(1, 2) for t in qkv)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.cfg.heads != self.cfg.kv_heads
        )
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int, dropout: Dropout) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp: MLP | MoE = MoE(cfg) if cfg.experts else MLP(cfg)
        self.dropout = dropout
        self.recompute = False
        """In training: keep a block's input alone and compute the rest again for the gradient (arXiv 1604.06174)."""

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        counted_M: Tensor | None,
        wanted_W: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """`[B, T, D]`, or of the positions `wanted_W` in B*T (int64) alone `[1, W, D]`. `counted_M` as in MoE: of
        `wanted_W`, where that is given."""
        given = (x_BTD, rope, mask, cache, counted_M, wanted_W, kept)
        if self.recompute and self.training:
            done = checkpoint(self._compute, *given, use_reentrant=False, context_fn=self.dropout.twice)
            assert isinstance(done, Tensor)
            return done
        return self._compute(*given)

    def _compute(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None,
        counted_M: Tensor | None, wanted_W: Tensor | None, kept: Kept | None,
    ) -> Tensor:  # fmt: skip
        y_BTA = self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache, kept)
        if wanted_W is not None:
            x_BTD, y_BTA = (t.flatten(0, 1).index_select(0, wanted_W).unsqueeze(0) for t in (x_BTD, y_BTA))
        x_BTD = x_BTD + self.dropout(self.self_attn.o_proj(y_BTA))
        h_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + self.dropout(self.mlp(h_BTD, counted_M) if isinstance(self.mlp, MoE) else self.mlp(h_BTD))


class Decoder(nn.Module):
    """Token ids → hidden states → logits. `lm_head` is absent when the head is the embedding table."""

    rope_freq: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens: nn.Module = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.dropout = Dropout()
        self.layers = nn.ModuleList(Block(cfg, i, self.dropout) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        if not cfg.tied:
            self.lm_head: nn.Module = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.register_buffer("rope_freq", rope_frequencies(cfg), persistent=False)
        self.over_ranks: Callable[[Tensor], Tensor] | None = None
        """Where a batch is divided over processes: a differentiable sum over all of them."""

    def initialise(self, generator: torch.Generator) -> Decoder:
        """Fill every matrix from N(0, init_std), those that write to the residual stream scaled by 1/sqrt(2 layers)."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
            std = self.cfg.init_std / (math.sqrt(2 * self.cfg.layers) if residual else 1.0)
            nn.init.normal_(p, 0.0, std, generator=generator)
        return self

    def rope(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions_BT.unsqueeze(-1).float() * self.rope_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def rope_of(self, x_BTD: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """`rope` of a stream's positions, the first of which is `start`, in its dtype."""
        cos, sin = self.rope(torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device).unsqueeze(0))
        return cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)

    def hidden(
        self,
        ids_BT: Tensor,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
        wanted_BT: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Normed last hidden states `[B, T, D]`. Padding may only stand at the right; `valid_BT` (bool) marks the rest
        and matters to the experts' balance alone. With a cache, its length is the first position.

        With `wanted_BT` (bool) only those positions, `[wanted, D]`: the last block's MLP is computed for no others, and
        the experts' balance counts those of them that are valid. `kept` gets what it asks for.
        """
        start, T = (cache.length if cache else 0), ids_BT.shape[1]
        mask = None
        if start:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=ids_BT.device).tril(start)
        x_BTD = for_products(self.embed_tokens(ids_BT))
        rope = self.rope_of(x_BTD, start)
        last = len(self.layers) - 1
        wanted_W = None if wanted_BT is None else places(wanted_BT)
        counted_M = counted_last_M = None
        if valid_BT is not None and self.training and self.cfg.experts:
            counted_M = counted_last_M = places(valid_BT)
            if wanted_W is not None:
                counted_last_M = places(valid_BT.flatten()[wanted_W])
        for i, block in enumerate(self.layers):
            if kept is not None:
                kept.enters(i, x_BTD)
            if i == last:
                x_BTD = block(x_BTD, rope, mask, cache, counted_last_M, wanted_W, kept)
            else:
                x_BTD = block(x_BTD, rope, mask, cache, counted_M, None, kept)
        if cache is not None:
            cache.length += T
        return self.norm(x_BTD if wanted_BT is None else x_BTD[0])

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def head(self) -> nn.Module:
        """The module whose `.weight [V, D]` makes logits: `lm_head`, or the tied embedding."""
        return self.embed_tokens if self.cfg.tied else self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`."""
        if self.cfg.tied:
            as_head = getattr(self.embed_tokens, "as_head", None)
            return as_head(hidden) if as_head else F.linear(hidden, self.embed_tokens.weight)  # type: ignore[arg-type]
        return self.lm_head(hidden)

    def forward(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits `[B, T, V]` of token ids `[B, T]` (int64)."""
        return self.logits(self.hidden(ids_BT, cache))

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def balance(self) -> tuple[Tensor, Tensor] | None:
        """Of the last forward pass in training mode: Switch's auxiliary loss (arXiv 2101.03961, eq. 4, over all top-k
        choices; 1.0 is perfect balance), the mean over mixtures, and the share of its layer's assignments that each
        expert got `[mixtures, E]`. None without mixtures. Ranks meet here once for all layers."""
        routed = [m.routed_2E for m in self.moe_layers() if m.routed_2E is not None]
        if not routed:
            return None
        routed_L2E = torch.stack(routed)
        if self.over_ranks is not None:
            routed_L2E = self.over_ranks(routed_L2E)
        losses, loads = [], []
        for load_E, probs_E in zip(routed_L2E[:, 0].detach(), routed_L2E[:, 1], strict=True):
            share_E = load_E / load_E.sum()
            tokens = load_E.sum() / self.cfg.experts_per_token
            losses.append(self.cfg.experts * (share_E * (probs_E / tokens)).sum())
            loads.append(share_E)
        return torch.stack(losses).mean(), torch.stack(loads)


def places(true_BT: Tensor) -> Tensor:
    """Where a mask is true, flattened: int64. Found once a pass, since a GPU has to be waited for."""
    return true_BT.flatten().nonzero().squeeze(1)


def parameter_count(model: nn.Module) -> int:
    """Parameters, each shared tensor counted once."""
    return sum(p.numel() for p in model.parameters())
