"""A student's first weights, taken from its teacher: chosen layers, a narrower residual stream, heads, and a dense MLP.

Knows nothing of training. The teacher is a gori decoder; a few calibration batches say what it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gori.distill.basis import Seen, Width, basis_of, norm_scale, observe
from gori.distill.depth import Depth, Dropped, evenly_spaced, least_missed, most_influential
from gori.distill.experts import How, Score, dense_neurons
from gori.errors import GoriError
from gori.model import MLP, Block, Decoder, ModelConfig
from gori.norm import RMSNorm


@dataclass(frozen=True)
class Taken:
    """What a student took."""

    report: dict[str, object]
    """For the manifest."""
    layers: list[int]
    """The teacher's layer of each of the student's."""
    basis: Tensor
    """[D', D]: the student's residual stream is the teacher's times it."""


@torch.no_grad()
def from_teacher(
    student: Decoder,
    teacher: Decoder,
    calibration: Sequence[Tensor],
    layers: Sequence[int] | None = None,
    *,
    depth: Depth = "perplexity",
    width: Width = "importance",
    score: Score = "use",
    how: How = "select",
    answers: Sequence[Tensor] = (),
) -> Taken:
    """Fill the student in place.

    calibration: token ids int64 `[B, T]`, unpadded; answers: bool `[B, T]`, those whose loss counts in `perplexity`,
    none: all. `layers`: the teacher layers to take, in place of what `depth` chooses. With width "pca" every norm's
    scale goes into the matrices that read it and the stream is turned, which changes nothing as long as no dimension is
    left out; a tied head cannot take the last norm's scale.
    """
    if width == "pca" and student.cfg.tied:
        raise GoriError("width pca needs a head of its own: set student.tied to false, or take width importance")
    seen = observe(teacher, calibration, width)
    check_shapes(student.cfg, teacher.cfg, layers)
    left_out: list[Dropped] = []
    if layers is None and depth == "perplexity":
        left_out = least_missed(teacher, student.cfg.layers, calibration, answers)
        layers = sorted(set(range(teacher.cfg.layers)) - {d.layer for d in left_out})
    elif layers is None and depth == "influence":
        layers = most_influential(student.cfg.layers, seen.influence)
    elif layers is None:
        layers = evenly_spaced(student.cfg.layers, teacher.cfg.layers)
    basis = basis_of(seen, student.cfg.hidden_size, width)
    copy = _Copy(basis, width == "pca", seen)
    student.embed_tokens.weight.copy_(_weight(teacher.embed_tokens) @ basis)  # type: ignore[union-attr,operator]
    if not student.cfg.tied:
        _weight(student.lm_head).copy_(copy.reading(_weight(teacher.head), teacher.norm))
    copy.norm(student.norm, teacher.norm, "norm")
    report: list[dict[str, object]] = []
    for target, source in zip(student.layers, layers, strict=True):
        old = teacher.layers[source]
        assert isinstance(target, Block)
        assert isinstance(old, Block)
        groups = _copy_attention(target, old, copy)
        neurons, taken = dense_neurons(old.mlp, seen.mlp_inputs[source], student.cfg.intermediate_size, score, how)
        assert isinstance(target.mlp, MLP)
        target.mlp.gate_proj.weight.copy_(copy.reading(neurons.gate, old.post_attention_layernorm))
        target.mlp.up_proj.weight.copy_(copy.reading(neurons.up, old.post_attention_layernorm))
        target.mlp.down_proj.weight.copy_(basis.T @ neurons.down)
        for name in ("input_layernorm", "post_attention_layernorm"):
            copy.norm(getattr(target, name), getattr(old, name), f"layers.{source}.{name}")
        report.append({"teacher_layer": source, "groups": groups, **taken})
    influence = [round(i, 4) for i in seen.influence]
    found = {"hidden_dimensions": student.cfg.hidden_size, "of": teacher.cfg.hidden_size, "block_influence": influence}
    if left_out:
        found["left_out"] = [
            {"layer": d.layer, "loss_without": {i: round(loss, 4) for i, loss in d.losses.items()}} for d in left_out
        ]
    return Taken({**found, "layers": report}, list(layers), basis)


@dataclass(frozen=True)
class _Copy:
    """How matrices come over into the narrower stream; with `fold`, norms' scales inside them."""

    basis: Tensor
    fold: bool
    seen: Seen

    def reading(self, weight: Tensor, norm: RMSNorm) -> Tensor:
        """A matrix `[out, D']` that reads what a norm gives, as `[out, D]`."""
        return (weight * norm.weight if self.fold else weight) @ self.basis

    def norm(self, target: RMSNorm, source: RMSNorm, name: str) -> None:
        own = torch.ones_like(target.weight) if self.fold else source.weight @ self.basis
        target.weight.copy_(own * norm_scale(self.seen.moments[name], self.basis))


def _weight(m: nn.Module) -> Tensor:
    assert isinstance(m.weight, Tensor)
    return m.weight.detach()


def check_shapes(s: ModelConfig, t: ModelConfig, layers: Sequence[int] | None) -> None:
    """GoriError where a student's shape cannot take weights of a teacher's (or a larger student's); `layers` are those
    that it would take, None: any."""
    if layers is None:
        layers = evenly_spaced(s.layers, t.layers)
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


def _copy_attention(target: Block, source: Block, copy: _Copy) -> list[int]:
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
        mine.weight.copy_(copy.reading(theirs.weight[rows], source.input_layernorm))
        if mine.bias is not None and theirs.bias is not None:
            mine.bias.copy_(theirs.bias[rows])
    a.o_proj.weight.copy_(copy.basis.T @ b.o_proj.weight[:, q_rows])
    if a.cfg.qk_norm:
        a.q_norm.weight.copy_(b.q_norm.weight)
        a.k_norm.weight.copy_(b.k_norm.weight)
    return groups.tolist()
