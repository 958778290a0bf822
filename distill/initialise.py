"""A student's first weights, taken from its teacher: chosen layers, a narrower residual stream, heads, and a dense MLP.

Knows nothing of training. The teacher is a gori decoder; a few calibration batches say what it uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gori import console
from gori.distill.basis import Width, basis_of, observe
from gori.distill.cut import Copy, Layer, Streams, take_layer
from gori.distill.depth import ROWS, Depth, Dropped, evenly_spaced, least_missed, loss_of, most_influential
from gori.distill.experts import How, Score
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig


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
    how: How = "neurons",
    fit: bool = True,
    answers: Sequence[Tensor] = (),
) -> Taken:
    """Fill the student in place.

    calibration: token ids int64 `[B, T]`, unpadded; answers: bool `[B, T]`, those whose loss counts in `perplexity`,
    none: all. `layers`: the teacher layers to take, in place of what `depth` chooses. `fit`: what attention and MLP
    write is fitted to the teacher's stream by least squares, and neurons are chosen for it (gori.distill.fit). With
    width "pca" every norm's scale goes into the matrices that read it and the stream is turned, which changes nothing
    as long as no dimension is left out; a tied head cannot take the last norm's scale.
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
    copy = Copy(basis, width == "pca", seen)
    student.embed_tokens.weight.copy_(_weight(teacher.embed_tokens) @ basis)  # type: ignore[union-attr,operator]
    if not student.cfg.tied:
        _weight(student.lm_head).copy_(copy.reading(_weight(teacher.head), teacher.norm))
    copy.norm(student.norm, teacher.norm, "norm")
    report: list[dict[str, object]] = []
    streams = Streams(student, teacher, calibration)
    with console.steps("layers", len(layers)) as bar:
        for i, (source, following) in enumerate(itertools.pairwise([*layers, teacher.cfg.layers])):
            report.append(take_layer(streams, Layer(i, source, following, score, how, fit), copy))
            bar.update(i + 1, f"layer {source}: {report[-1]['error']} of what it adds is missed")
    loss, of_teacher = (round(loss_of(m, calibration[:ROWS], answers[:ROWS]), 4) for m in (student, teacher))
    console.log(f"first weights: loss {loss:.3f} on training rows, {of_teacher:.3f} of the model that they are from")
    influence = [round(i, 4) for i in seen.influence]
    found = {
        "hidden_dimensions": student.cfg.hidden_size,
        "of": teacher.cfg.hidden_size,
        "block_influence": influence,
        "loss": {"student": loss, "teacher": of_teacher},
    }
    if left_out:
        found["left_out"] = [
            {"layer": d.layer, "loss_without": {i: round(loss, 4) for i, loss in d.losses.items()}} for d in left_out
        ]
    return Taken({**found, "layers": report}, list(layers), basis)


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
