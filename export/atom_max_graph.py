"""The decoder once more as static graphs, in the form in which optimum-rbln hands it to Rebellions' compiler.

Prefill takes one padded chunk of one sequence, decode one token of each of B; caches are inputs that are written in
place, attention is a `rbln_custom_ops` call. Weights are inputs too, so a saved graph holds none: it runs with what the
checkpoint directory holds. Knows nothing of files except how a graph is saved.

Shapes in names: B sequences, S tokens of a chunk, D model width, H query heads, K key/value heads, d head width, V
vocabulary, N cache blocks, P positions of a block.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from gori.export import atom_max_ops as ops
from gori.export.atom_max_plan import PARTITION, Plan
from gori.model import ModelConfig, rope_frequencies

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SCALE = "_scale"
"""`<proj>.weight` int8 with `<proj>.weight_scale` float32 `[out, 1]`."""
COS, SIN = "rope.cos", "rope.sin"
"""Tables `[context, d]` that are inputs like weights."""


def rope_tables(cfg: ModelConfig, context: int) -> dict[str, Tensor]:
    """float32 `[context, d]` cosines and sines in the half-split layout of Hugging Face."""
    angles = torch.arange(context).float().unsqueeze(1) * rope_frequencies(cfg)
    angles = torch.cat((angles, angles), dim=-1)
    return {COS: angles.cos(), SIN: angles.sin()}


def new_caches(cfg: ModelConfig, plan: Plan, sequences: int) -> list[Tensor]:
    """Two tensors a layer, keys then values, float32 `[N, K, P, d]`."""
    blocks = sequences * (plan.context // plan.block_size)
    shape = (blocks, cfg.kv_heads, plan.block_size, cfg.head_dim)
    return [torch.zeros(shape) for _ in range(2 * cfg.layers)]


def block_table(plan: Plan, sequence: int) -> Tensor:
    """The blocks of a sequence, int16."""
    count = plan.context // plan.block_size
    return torch.arange(sequence * count, (sequence + 1) * count, dtype=torch.int16)


class Graph(nn.Module):
    """One phase; `weights` maps Hugging Face names (and COS, SIN) to tensors, in the order of the names."""

    scale: Tensor

    def __init__(self, cfg: ModelConfig, plan: Plan, phase: str) -> None:
        super().__init__()
        self.cfg, self.plan, self.phase = cfg, plan, phase
        self.register_buffer("scale", torch.tensor(cfg.head_dim**-0.5))

    def linear(self, x: Tensor, weights: dict[str, Tensor], stem: str) -> Tensor:
        weight = weights[f"{stem}.weight"]
        if (scale := weights.get(f"{stem}.weight{SCALE}")) is not None:
            weight = weight * scale
        return F.linear(x, weight, weights.get(f"{stem}.bias"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg.norm_eps))

    def attend(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        seq_B1: Tensor,
        tables: Tensor,
        caches: list[Tensor],
        weights: dict[str, Tensor],
        stem: str,
    ) -> Tensor:
        cfg, (B, S, _) = self.cfg, x_BSD.shape
        q, k, v = (
            self.linear(x_BSD, weights, f"{stem}.{p}_proj").view(B, S, -1, cfg.head_dim).transpose(1, 2) for p in "qkv"
        )
        if cfg.qk_norm:
            q, k = self.norm(q, weights[f"{stem}.q_norm.weight"]), self.norm(k, weights[f"{stem}.k_norm.weight"])
        q, k = rotate(q, rope), rotate(k, rope)
        flash = self.plan.attention == "flash_attn"
        call = getattr(torch.ops.rbln_custom_ops, f"paged_{'flash_' if flash else ''}causal_attn_{self.phase}")
        y = call(
            q=q.reshape(B, cfg.kv_heads, cfg.heads // cfg.kv_heads, S, cfg.head_dim),
            k=k.unsqueeze(2),
            v=v.unsqueeze(2),
            kcache=caches[0].unsqueeze(2),
            vcache=caches[1].unsqueeze(2),
            seq=seq_B1,
            scale=self.scale,
            block_table=tables,
            block_size=self.plan.block_size,
            **({"partition": PARTITION} if flash else {}),
            **({"is_bidirectional": False} if self.phase == "prefill" else {}),
        )
        y_BSA = y.view(B, cfg.heads, S, cfg.head_dim).transpose(1, 2).reshape(B, S, -1)
        return self.linear(y_BSA, weights, f"{stem}.o_proj")

    def compute(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        tables: Tensor,
        last: Tensor | None,
        caches: list[Tensor],
        weights: dict[str, Tensor],
    ) -> Tensor:
        flat = positions_BS.flatten()
        rope = tuple(
            weights[name].index_select(0, flat).view(*positions_BS.shape, -1).unsqueeze(1) for name in (COS, SIN)
        )
        x = F.embedding(ids_BS, weights[EMBEDDING])
        for i in range(self.cfg.layers):
            stem = f"model.layers.{i}"
            h = self.norm(x, weights[f"{stem}.input_layernorm.weight"])
            pair = caches[2 * i : 2 * i + 2]
            x = x + self.attend(h, rope, positions_BS[:, :1], tables, pair, weights, f"{stem}.self_attn")  # type: ignore[arg-type]
            h = self.norm(x, weights[f"{stem}.post_attention_layernorm.weight"])
            gate, up = (self.linear(h, weights, f"{stem}.mlp.{p}_proj") for p in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, weights, f"{stem}.mlp.down_proj")
        x = self.norm(x, weights[NORM])
        if last is not None:
            x = x.index_select(1, last.to(torch.int32).reshape(1))
        return F.linear(x, weights[HEAD])


class Prefill(Graph):
    """Logits `[1, 1, V]` of the token at `query_position` of one padded chunk."""

    def forward(
        self,
        input_ids: Tensor,
        cache_position: Tensor,
        block_tables: Tensor,
        query_position: Tensor,
        past_key_values: list[Tensor],
        weights: dict[str, Tensor],
    ) -> Tensor:
        """int64 and int32 `[1, S]`, int16 `[blocks]`, int16 `[]`, caches, weights."""
        return self.compute(input_ids, cache_position, block_tables, query_position, past_key_values, weights)


class Decode(Graph):
    """Logits `[B, 1, V]` of one token of each sequence."""

    def forward(
        self,
        input_ids: Tensor,
        cache_position: Tensor,
        block_tables: Tensor,
        past_key_values: list[Tensor],
        weights: dict[str, Tensor],
    ) -> Tensor:
        """int64 and int32 `[B, 1]`, int16 `[B, blocks]`, caches, weights."""
        return self.compute(input_ids, cache_position, block_tables, None, past_key_values, weights)


def rotate(x_BHSd: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotary embedding, half-split."""
    cos, sin = rope
    a, b = x_BHSd.chunk(2, dim=-1)
    return x_BHSd * cos + torch.cat((-b, a), dim=-1) * sin


def export_graph(
    cfg: ModelConfig, plan: Plan, weights: dict[str, Tensor], sequences: int, decode: int | None
) -> ExportedProgram:
    """The prefill graph, or with `decode` the decode graph of that many sequences, over caches of `sequences`.

    The program holds no weights, and no paths of this machine.
    """
    ops.register()
    caches = new_caches(cfg, plan, sequences)
    count = plan.context // plan.block_size
    if decode is None:
        graph: Graph = Prefill(cfg, plan, "prefill")
        ids, positions = torch.zeros(1, plan.chunk, dtype=torch.int64), torch.arange(plan.chunk, dtype=torch.int32)
        tensors = (ids, positions.unsqueeze(0), block_table(plan, 0), torch.tensor(0, dtype=torch.int16))
    else:
        graph = Decode(cfg, plan, "decode")
        ids, positions = torch.zeros(decode, 1, dtype=torch.int64), torch.zeros(decode, 1, dtype=torch.int32)
        tensors = (ids, positions, torch.zeros(decode, count, dtype=torch.int16))
    program = torch.export.export(graph.eval(), (*tensors, caches, dict(sorted(weights.items()))), strict=False)
    for node in program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack"):
            node.meta.pop(key, None)
    # the example inputs are the weights themselves
    program.example_inputs = None
    return program


def save_graph(program: ExportedProgram, path: Path) -> None:
    """Write a .pt2 file."""
    with quiet():
        torch.export.save(program, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch.export says of files without example inputs, and the tracebacks that it logs of damaged
    ones before it raises."""
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch.export.pt2_archive._package")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
