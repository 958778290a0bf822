"""A student's first weights, taken from its teacher: chosen layers, dimensions and heads, and a dense MLP made of the
most-used experts with scales fitted by least squares.

Knows nothing of training. The teacher is a gori decoder; a few calibration batches say what it uses.

Shapes in names: N calibration tokens, D width, I MLP width, E experts, G key/value groups, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gori.errors import GoriError
from gori.model import MLP, Block, Decoder, MoE
from gori.norm import RMSNorm


@dataclass(frozen=True)
class Neurons:
    """The MLP neurons of one teacher layer that a student takes, and what it scales their outputs by."""

    gate: Tensor
    """[I, D]"""
    up: Tensor
    """[I, D]"""
    down: Tensor
    """[D, I], scaled"""


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of `total` layers, first and last among them: 3 of 5 → [0, 2, 4]."""
    if count > total:
        raise GoriError(f"a student of {count} layers cannot be initialised from a teacher of {total}: use init random")
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


@torch.no_grad()
def from_teacher(
    student: Decoder, teacher: Decoder, calibration: Sequence[Tensor], layers: Sequence[int] | None = None
) -> dict[str, object]:
    """Fill the student in place; returns what was taken from where, for the manifest.

    calibration: token ids int64 `[B, T]`, unpadded. `layers`: the teacher layers to take, default evenly spaced.
    """
    layers = list(layers) if layers else evenly_spaced(student.cfg.layers, teacher.cfg.layers)
    _check(student, teacher, layers)
    inputs = _record(teacher, calibration)
    dims = _dimensions(teacher, inputs, student.cfg.hidden_size)
    report: list[dict[str, object]] = []
    student.embed_tokens.weight.copy_(_weight(teacher.embed_tokens)[:, dims])  # type: ignore[union-attr,operator]
    if not student.cfg.tied:
        _weight(student.lm_head).copy_(_weight(teacher.head)[:, dims])
    _copy_norm(student.norm, teacher.norm, dims)
    for target, source in zip(student.layers, layers, strict=True):
        old = teacher.layers[source]
        assert isinstance(target, Block)
        assert isinstance(old, Block)
        _copy_norm(target.input_layernorm, old.input_layernorm, dims)
        _copy_norm(target.post_attention_layernorm, old.post_attention_layernorm, dims)
        groups = _copy_attention(target, old, dims)
        neurons, taken = _neurons(old, inputs[source], student.cfg.intermediate_size)
        assert isinstance(target.mlp, MLP)
        target.mlp.gate_proj.weight.copy_(neurons.gate[:, dims])
        target.mlp.up_proj.weight.copy_(neurons.up[:, dims])
        target.mlp.down_proj.weight.copy_(neurons.down[dims])
        report.append({"teacher_layer": source, "groups": groups, **taken})
    return {"hidden_dimensions": len(dims), "of": teacher.cfg.hidden_size, "layers": report}


def _weight(m: nn.Module) -> Tensor:
    assert isinstance(m.weight, Tensor)
    return m.weight.detach()


def _check(student: Decoder, teacher: Decoder, layers: Sequence[int]) -> None:
    s, t = student.cfg, teacher.cfg
    if len(layers) != s.layers or not all(0 <= i < t.layers for i in layers):
        raise GoriError(f"layers {list(layers)} are not {s.layers} of the teacher's 0..{t.layers - 1}")
    wide = t.intermediate_size * max(1, t.experts)
    pairs = (
        ("hidden_size", s.hidden_size, t.hidden_size),
        ("intermediate_size", s.intermediate_size, wide),
        ("kv_heads", s.kv_heads, t.kv_heads),
        ("heads per kv head", s.heads // s.kv_heads, t.heads // t.kv_heads),
    )
    for name, mine, theirs in pairs:
        if mine > theirs:
            raise GoriError(f"the student's {name} {mine} exceeds the teacher's {theirs}: shrink it or use init random")
    if t.kind == "qwen2" and s.kind != "qwen2":
        raise GoriError(
            f"the teacher's attention has biases and a {s.kind} student none: use kind qwen2 or init random"
        )
    for name in ("head_dim", "vocab_size", "qk_norm", "rope_theta", "rope_scaling"):
        mine, theirs = getattr(s, name), getattr(t, name)
        if mine != theirs:
            raise GoriError(
                f"the student's {name} {mine} is not the teacher's {theirs}: make them equal or use init random"
            )


def _record(teacher: Decoder, calibration: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's MLP inputs `[N, D]` over the calibration batches."""
    seen: list[list[Tensor]] = [[] for _ in teacher.layers]
    hooks = []
    for parts, block in zip(seen, teacher.layers, strict=True):
        assert isinstance(block, Block)

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], parts: list[Tensor] = parts) -> None:
            parts.append(inputs[0].detach().flatten(0, 1))

        hooks.append(block.mlp.register_forward_pre_hook(keep))
    try:
        for ids in calibration:
            teacher.hidden(ids)
    finally:
        for h in hooks:
            h.remove()
    return [torch.cat(parts) for parts in seen]


def _dimensions(teacher: Decoder, inputs: list[Tensor], width: int) -> Tensor:
    """Indices of the `width` model dimensions with the largest mean |normed activation| (Minitron, 2407.14679)."""
    importance = torch.stack([x.abs().mean(0) for x in inputs]).sum(0)
    return importance.topk(width).indices.sort().values


def _copy_norm(target: RMSNorm, source: RMSNorm, dims: Tensor) -> None:
    """RMSNorm over fewer dimensions keeps its scale because the mean square of the kept ones stands for all."""
    target.weight.copy_(source.weight[dims])


def _copy_attention(target: Block, source: Block, dims: Tensor) -> list[int]:
    """Take the key/value groups, and in each the query heads, whose value-to-output paths weigh most."""
    a, b = target.self_attn, source.self_attn
    d, per = b.cfg.head_dim, b.cfg.heads // b.cfg.kv_heads
    out_GQDd = b.o_proj.weight.view(-1, b.cfg.kv_heads, per, d).permute(1, 2, 0, 3)
    weight_GQ = out_GQDd.square().sum((-2, -1)) * b.v_proj.weight.view(b.cfg.kv_heads, 1, -1).square().sum(-1)
    groups = weight_GQ.sum(1).topk(a.cfg.kv_heads).indices.sort().values
    keep = a.cfg.heads // a.cfg.kv_heads
    heads = torch.cat([g * per + weight_GQ[g].topk(keep).indices.sort().values for g in groups])
    q_rows = (heads.unsqueeze(1) * d + torch.arange(d)).flatten()
    kv_rows = (groups.unsqueeze(1) * d + torch.arange(d)).flatten()
    for mine, theirs, rows in (
        (a.q_proj, b.q_proj, q_rows),
        (a.k_proj, b.k_proj, kv_rows),
        (a.v_proj, b.v_proj, kv_rows),
    ):
        mine.weight.copy_(theirs.weight[rows][:, dims])
        if mine.bias is not None and theirs.bias is not None:
            mine.bias.copy_(theirs.bias[rows])
    a.o_proj.weight.copy_(b.o_proj.weight[:, q_rows][dims])
    if a.cfg.qk_norm:
        a.q_norm.weight.copy_(b.q_norm.weight)
        a.k_norm.weight.copy_(b.k_norm.weight)
    return groups.tolist()


def _neurons(source: Block, x_ND: Tensor, width: int) -> tuple[Neurons, dict[str, object]]:
    if isinstance(source.mlp, MLP):
        gate, up, down = (_weight(m) for m in (source.mlp.gate_proj, source.mlp.up_proj, source.mlp.down_proj))
        keep = _strongest(x_ND, gate, up, down, width)
        return Neurons(gate[keep], up[keep], down[:, keep]), {"neurons": width, "of": len(gate)}
    return _from_experts(source.mlp, x_ND, width)


def _strongest(x_ND: Tensor, gate: Tensor, up: Tensor, down: Tensor, width: int) -> Tensor:
    """Indices of the neurons with the largest mean |activation| times the norm of what they write."""
    act = F.silu(x_ND @ gate.T) * (x_ND @ up.T)
    return (act.abs().mean(0) * down.norm(dim=0)).topk(width).indices.sort().values


def _from_experts(moe: MoE, x_ND: Tensor, width: int) -> tuple[Neurons, dict[str, object]]:
    """The experts with the most routing weight, whole, the last one cut to its strongest neurons; every expert's output
    is scaled by the factor that brings the dense sum nearest to the mixture's output (least squares over tokens)."""
    use_E = _use(moe, x_ND)
    I = moe.cfg.intermediate_size  # noqa: E741
    chosen = use_E.topk(-(-width // I)).indices.tolist()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for e in chosen:
        gate, up = moe.experts.gate_up[e].chunk(2)
        down = moe.experts.down[e]
        room = min(I, width - sum(len(p[0]) for p in parts))
        keep = _strongest(x_ND, gate, up, down, room)
        parts.append((gate[keep], up[keep], down[:, keep]))
    outputs = [(F.silu(x_ND @ g.T) * (x_ND @ u.T)) @ d.T for g, u, d in parts]
    scales = _least_squares(outputs, moe(x_ND.unsqueeze(0))[0])
    neurons = Neurons(
        torch.cat([g for g, _, _ in parts]),
        torch.cat([u for _, u, _ in parts]),
        torch.cat([d * s for (_, _, d), s in zip(parts, scales, strict=True)], dim=1),
    )
    taken = {
        "experts": chosen,
        "share_of_routing": round(float(use_E[chosen].sum()), 4),
        "scales": [round(float(s), 4) for s in scales],
    }
    return neurons, taken


def _use(moe: MoE, x_ND: Tensor) -> Tensor:
    """Each expert's share of all routing weight, `[E]`."""
    probs = F.linear(x_ND, moe.gate.weight).softmax(-1)
    weight, expert = probs.topk(moe.cfg.experts_per_token, dim=-1)
    if moe.cfg.norm_topk:
        weight = weight / weight.sum(-1, keepdim=True)
    use = torch.zeros(moe.cfg.experts, dtype=weight.dtype).index_add(0, expert.flatten(), weight.flatten())
    return use / use.sum()


def _least_squares(outputs: list[Tensor], wanted: Tensor) -> Tensor:
    """Scales s minimising |sum_e s_e outputs_e - wanted|², in float64 with a little ridge."""
    A = torch.stack([o.flatten() for o in outputs], dim=1).double()
    gram = A.T @ A
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(outputs), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, A.T @ wanted.flatten().double()).float()
