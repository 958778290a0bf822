"""One layer of a student made of one of its teacher's: norms, heads, neurons, and the matrices that write.

Knows nothing of which layers or dimensions are kept. The student is made layer by layer while both read the calibration
tokens: what a layer writes is fitted to the teacher's stream as it stands there, given what the student's layers before
it, already cut, hand on.

Shapes in names: B rows, T tokens, N tokens of all batches, D' teacher width, D student width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gori.distill.basis import Seen, norm_scale
from gori.distill.experts import How, Neurons, Score, candidates
from gori.distill.fit import Sums, forward_selection, group_scales
from gori.model import MLP, Block, Decoder
from gori.norm import RMSNorm

SPARE = 4
"""Neurons that are looked at for each one taken."""


@dataclass(frozen=True)
class Copy:
    """How matrices come over into the narrower stream; with `fold`, norms' scales inside them."""

    basis: Tensor
    """[D', D]: the student's residual stream is the teacher's times it."""
    fold: bool
    seen: Seen

    def reading(self, weight: Tensor, norm: RMSNorm) -> Tensor:
        """A matrix `[out, D']` that reads what a norm gives, as `[out, D]`."""
        return (weight * norm.weight if self.fold else weight) @ self.basis

    def norm(self, target: RMSNorm, source: RMSNorm, name: str) -> None:
        own = torch.ones_like(target.weight) if self.fold else source.weight @ self.basis
        target.weight.copy_(own * norm_scale(self.seen.moments[name], self.basis))

    def neurons(self, of: Neurons, norm: RMSNorm) -> Neurons:
        return Neurons(self.reading(of.gate, norm), self.reading(of.up, norm), self.basis.T @ of.down)


class Streams:
    """The residual streams of teacher and student before the layer that is being made, `[B, T, D]` a batch."""

    def __init__(self, student: Decoder, teacher: Decoder, calibration: Sequence[Tensor]) -> None:
        self.student, self.teacher, self._calibration = student, teacher, calibration
        self.own: list[Tensor] = [student.embed_tokens(ids) for ids in calibration]
        self._start()

    def _start(self) -> None:
        self._at = 0
        self._taught: list[Tensor] = [self.teacher.embed_tokens(ids) for ids in self._calibration]

    def taught(self, layer: int) -> list[Tensor]:
        """What enters a layer of the teacher; of the one past the last what leaves it."""
        if layer < self._at:  # a student may take layers in any order
            self._start()
        for block in list(self.teacher.layers)[self._at : layer]:
            self._taught = [block(x, self.teacher.rope_of(x), None, None, None) for x in self._taught]
        self._at = layer
        return self._taught


@dataclass(frozen=True)
class Layer:
    """Which layer is taken, and how."""

    index: int
    source: int
    following: int
    """The teacher's layer that the student's next one takes; the layers between are left out, and what they add is
    asked of this one where it is fitted."""
    score: Score
    how: How
    fit: bool


def take_layer(streams: Streams, layer: Layer, copy: Copy) -> dict[str, object]:
    """Fill a layer of the student in place and lead its stream through; returns what was taken, for the manifest."""
    target, old = streams.student.layers[layer.index], streams.teacher.layers[layer.source]
    assert isinstance(target, Block)
    assert isinstance(old, Block)
    for name in ("input_layernorm", "post_attention_layernorm"):
        copy.norm(getattr(target, name), getattr(old, name), f"layers.{layer.source}.{name}")
    entering = streams.taught(layer.source)
    middle = _written(old, entering, _heads(old, entering, streams.teacher))
    cfg = target.self_attn.cfg
    heads = _weighty_heads(old, cfg.kv_heads, cfg.heads // cfg.kv_heads)
    groups = _copy_attention(target, old, heads, copy)
    found = _heads(target, streams.own, streams.student)
    if layer.fit:
        _fit_attention(target, found, streams.own, [m @ copy.basis for m in middle])
    streams.own = _written(target, streams.own, found)
    taken = _take_mlp(target, old, middle, streams, layer, copy)
    return {"teacher_layer": layer.source, "groups": groups, "heads": heads, **taken}


def _weighty_heads(old: Block, groups: int, per: int) -> list[list[int]]:
    """The key/value groups, and in each the query heads, whose value-to-output paths weigh most.

    Not those from which least squares comes nearest to the stream, as neurons are chosen: a head that copies is silent
    at most tokens, and a student without it never learns as well (docs/distillation.md).
    """
    b = old.self_attn
    d, every = b.cfg.head_dim, b.cfg.heads // b.cfg.kv_heads
    out_GQDd = b.o_proj.weight.view(-1, b.cfg.kv_heads, every, d).permute(1, 2, 0, 3)
    weight_GQ = out_GQDd.square().sum((-2, -1)) * b.v_proj.weight.view(b.cfg.kv_heads, 1, -1).square().sum(-1)
    kept = weight_GQ.sum(1).topk(groups).indices.sort().values.tolist()
    return [[g * every + q for q in sorted(weight_GQ[g].topk(per).indices.tolist())] for g in kept]


def _copy_attention(target: Block, source: Block, heads: Sequence[Sequence[int]], copy: Copy) -> list[int]:
    """Take query heads, those of each key/value group together; returns the groups."""
    a, b = target.self_attn, source.self_attn
    d, every = b.cfg.head_dim, b.cfg.heads // b.cfg.kv_heads
    groups = [group[0] // every for group in heads]
    q_rows = _rows([h for group in heads for h in group], d)
    kv_rows = _rows(groups, d)
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
    return groups


def _rows(heads: Sequence[int], d: int) -> Tensor:
    return (torch.tensor(heads).unsqueeze(1) * d + torch.arange(d)).flatten()


def _heads(block: Block, entering: Sequence[Tensor], model: Decoder) -> list[Tensor]:
    """What a block's heads find in the streams that enter it, `[B, T, H * head_dim]` a batch."""
    return [block.self_attn(block.input_layernorm(x), model.rope_of(x), None, None) for x in entering]


def _written(block: Block, entering: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """The streams after attention."""
    return [x + block.self_attn.o_proj(y) for x, y in zip(entering, found, strict=True)]


def _fit_attention(
    target: Block, found: Sequence[Tensor], entering: Sequence[Tensor], wanted: Sequence[Tensor]
) -> None:
    """Change o_proj so that the stream after it is nearest to the wanted one."""
    o = target.self_attn.o_proj
    sums = Sums(o.in_features, o.out_features)
    for y, reached, w in zip(found, _written(target, entering, found), wanted, strict=True):
        sums.add(y.flatten(0, 1), (w - reached).flatten(0, 1))
    o.weight += sums.correction().to(o.weight.dtype)


def _take_mlp(
    target: Block, old: Block, middle: Sequence[Tensor], streams: Streams, layer: Layer, copy: Copy
) -> dict[str, object]:
    mlp, norm = target.mlp, old.post_attention_layernorm
    assert isinstance(mlp, MLP)
    normed = [norm(m) for m in middle]
    own = [target.post_attention_layernorm(x) for x in streams.own]
    if layer.fit and layer.following > layer.source:
        wanted = [y @ copy.basis for y in streams.taught(layer.following)]
    elif layer.fit:
        wanted = [(m + old.mlp(x)) @ copy.basis for m, x in zip(middle, normed, strict=True)]
    else:  # what the teacher's layer adds, whatever went before
        wanted = [x + old.mlp(y) @ copy.basis for x, y in zip(streams.own, normed, strict=True)]

    width = mlp.gate_proj.out_features
    found = candidates(
        old.mlp, torch.cat([x.flatten(0, 1) for x in normed]), width, layer.score, layer.how,
        spare=SPARE if layer.fit else 1,
    )  # fmt: skip
    neurons = copy.neurons(found.neurons, norm)
    sums = Sums(len(neurons.gate), copy.basis.shape[1])
    for h, x, w in zip(own, streams.own, wanted, strict=True):
        sums.add(neurons.activation(h.flatten(0, 1)), (w - x).flatten(0, 1))
    if len(neurons.gate) > width:
        rows = forward_selection(sums, width)
        found, neurons, sums = found.taken(rows), neurons.taken(rows), sums.taken(rows)
    report = dict(found.report)
    if isinstance(old.mlp, MLP):
        report["neurons"] = width
    else:
        scales = group_scales(sums, neurons.down, found.group)
        neurons = neurons._replace(down=neurons.down * scales[found.group])
        report["scales"] = [round(float(s), 4) for s in scales]
    for m, weight in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), neurons, strict=True):
        m.weight.copy_(weight)
    if layer.fit:
        sums.cross_ID.zero_()
        for h, x, w in zip(own, streams.own, wanted, strict=True):
            sums.add_products(neurons.activation(h.flatten(0, 1)), (w - (x + mlp(h))).flatten(0, 1))
        mlp.down_proj.weight += sums.correction().to(mlp.down_proj.weight.dtype)
    before = streams.own
    streams.own = [x + mlp(h) for x, h in zip(streams.own, own, strict=True)]
    return report | {"error": round(_missed(streams.own, wanted, before), 4)}


def _missed(got: Sequence[Tensor], wanted: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Squared distance of what was reached to what is wanted, over that of what there was before."""

    def square(of: Sequence[Tensor]) -> float:
        return sum(float((a - b).double().square().sum()) for a, b in zip(of, wanted, strict=True))

    return square(got) / max(square(before), 1e-30)
