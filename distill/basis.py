"""What calibration tokens show of a teacher, and the dimensions of its residual stream that a narrower student keeps.

Knows nothing of students' modules. A basis is a matrix `[D', D]` with orthonormal columns: the student's stream is the
teacher's times it. Shapes in names: N calibration tokens, D' teacher width, D student width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gori.model import Block, Decoder
from gori.norm import normed

Width = Literal["importance", "pca"]


@dataclass(frozen=True)
class Seen:
    """What the teacher did with the calibration tokens."""

    importance: Tensor
    """[D']: mean |normed input of the MLP| of each dimension, summed over layers (Minitron, section 2.2)."""
    influence: list[float]
    """Of each layer: 1 - mean cosine of what enters and what leaves it, block influence (ShortGPT, arXiv 2403.03853,
    eq. 1; Minitron, arXiv 2407.14679, section 2.2)."""
    moments: dict[str, Tensor]
    """Of each norm's input, scaled to a root mean square of 1: second moments `[D', D']`, or their diagonal `[D']`."""


@torch.no_grad()
def observe(teacher: Decoder, calibration: Sequence[Tensor], width: Width) -> Seen:
    """Run the calibration batches (token ids int64 `[B, T]`, unpadded) through the teacher."""
    cosines: list[list[Tensor]] = [[] for _ in teacher.layers]
    sums: dict[str, Tensor] = {}
    N = sum(ids.numel() for ids in calibration)
    importance = torch.zeros(teacher.cfg.hidden_size)

    def of_norm(name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = normed(given[0].flatten(0, 1), 0.0)[0]
            found = x.T @ x if width == "pca" else x.square().sum(0)
            sums[name] = sums[name] + found / N if name in sums else found / N

        return keep

    def of_mlp(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        importance.add_(given[0].flatten(0, 1).abs().sum(0) / N)

    def of_block(i: int) -> Any:
        return lambda _, given, out: cosines[i].append(F.cosine_similarity(given[0], out, dim=-1).flatten())

    hooks = [teacher.norm.register_forward_pre_hook(of_norm("norm"))]
    for i, block in enumerate(teacher.layers):
        assert isinstance(block, Block)
        hooks.append(block.register_forward_hook(of_block(i)))
        hooks.append(block.mlp.register_forward_pre_hook(of_mlp))
        for name in ("input_layernorm", "post_attention_layernorm"):
            hooks.append(getattr(block, name).register_forward_pre_hook(of_norm(f"layers.{i}.{name}")))
    with removed(hooks):
        for ids in calibration:
            teacher.hidden(ids)
    return Seen(importance, [1 - float(torch.cat(c).mean()) for c in cosines], sums)


@contextmanager
def removed(hooks: Sequence[Any]) -> Any:
    """Hooks that end with the block."""
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def basis_of(seen: Seen, size: int, width: Width) -> Tensor:
    """`[D', size]`. importance: the dimensions with the largest mean |normed activation| over all layers (Minitron,
    section 2.2), as unit vectors. pca: the directions with the largest mean square in the streams that the norms read
    (SliceGPT, arXiv 2401.15024, section 3.3), one basis for all layers, so that blocks need no matrix between them."""
    if width == "importance":
        kept = seen.importance.topk(size).indices.sort().values
        return F.one_hot(kept, len(seen.importance)).T.float()
    moment = torch.stack(list(seen.moments.values())).double().mean(0)
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :size].float().contiguous()


def norm_scale(moment: Tensor, basis: Tensor) -> float:
    """What a norm over the kept dimensions is to be multiplied by so that they come out as large as they did: the root
    of the mean square that they have where all dimensions have 1."""
    wide, narrow = basis.shape
    if wide == narrow:
        return 1.0
    kept = (basis.square().T @ moment) if moment.dim() == 1 else (basis * (moment @ basis)).sum(0)
    return float(kept.sum() / narrow) ** 0.5
