"""Loss terms on what happens inside the networks: residual streams and attention relations of chosen pairs of layers.

Knows nothing of vocabularies. A pair (s, t) compares what enters the student's layer s with what enters the teacher's
layer t. Shapes: B rows, T tokens, D student width, D' teacher width, H heads, R relation heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gori.errors import GoriError
from gori.inner import Kept

Pairs = Sequence[tuple[int, int]]


def default_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Each layer of the student but the first, whose input is the embedding, and the teacher's as deep in it."""
    if student_layers == 1:
        return [(0, 0)]
    return [(i, round(i * (teacher_layers - 1) / (student_layers - 1))) for i in range(1, student_layers)]


def check_pairs(pairs: Pairs, student_layers: int, teacher_layers: int) -> None:
    for s, t in pairs:
        if not (0 <= s < student_layers and 0 <= t < teacher_layers):
            raise GoriError(
                f"layer pair [{s}, {t}]: the student has layers 0..{student_layers - 1}, "
                f"the teacher 0..{teacher_layers - 1}"
            )


def hidden_terms(student_BTD: Tensor, taught_BTD: Tensor, wanted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(squared error over the teacher's squared norm, 1 - cosine), each the mean over the wanted tokens."""
    s, t = student_BTD[wanted_BT].float(), taught_BTD[wanted_BT].float()
    error = ((s - t).square().sum(-1) / t.square().sum(-1)).mean()
    return error, (1 - F.cosine_similarity(s, t, dim=-1)).mean()


def relation(x_BTHd: Tensor, heads: int, valid_BT: Tensor) -> Tensor:
    """Log of how each token's vector attends to those before it, `[B, R, T, T]`: softmax of scaled products in
    `heads` relation heads cut from all heads' outputs together (MiniLMv2, arXiv 2012.15828, section 3.1)."""
    B, T = x_BTHd.shape[:2]
    x = x_BTHd.float().reshape(B, T, heads, -1).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
    seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & valid_BT[:, None, None]
    own = torch.eye(T, dtype=torch.bool, device=x.device)  # a padded token has itself, so that no row is empty
    return scores.masked_fill(~(seen | own), -1e30).log_softmax(-1)


def relation_loss(student: Sequence[Tensor], taught: Sequence[Tensor], valid_BT: Tensor, wanted_BT: Tensor) -> Tensor:
    """KL of the teacher's relations of queries, of keys and of values to the student's, the mean of the three over
    heads and the wanted tokens (MiniLMv2, eq. 4, with causal relations). Each `[B, T, H, d]`; heads may differ."""
    total = valid_BT.new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(student, taught, strict=True):
        heads = math.gcd(mine.shape[2], theirs.shape[2])
        q, p = relation(mine, heads, valid_BT), relation(theirs, heads, valid_BT)
        total = total + (p.exp() * (p - q)).sum(-1).transpose(1, 2)[wanted_BT].mean()
    return total / len(student)


def state_terms(
    student: Kept,
    teacher: Kept,
    valid_BT: Tensor,
    wanted_BT: Tensor,
    kinds: Sequence[str],
    pairs: Pairs,
    projection: Tensor | None,
) -> dict[str, Tensor]:
    """Value of each of `kinds` (hidden, cosine, attention), with gradients to the student.

    Compared at the wanted tokens (those that predict an answer), as every other term is, so that parts of a batch weigh
    alike. hidden and cosine are means over the pairs; projection `[D', D]`, fixed, brings the teacher's stream to the
    student's width (None: equal widths). attention compares the last pair alone, as MiniLM does, and needs its
    `attended`.
    """
    found: dict[str, Tensor] = {}
    if "hidden" in kinds or "cosine" in kinds:
        taught = [teacher.entering[t] for _, t in pairs]
        taught = taught if projection is None else [t @ projection.to(t.dtype) for t in taught]
        both = [hidden_terms(student.entering[s], t, wanted_BT) for (s, _), t in zip(pairs, taught, strict=True)]
        means = {"hidden": torch.stack([e for e, _ in both]).mean(), "cosine": torch.stack([c for _, c in both]).mean()}
        found |= {k: means[k] for k in kinds if k in means}
    if "attention" in kinds:
        s, t = pairs[-1]
        found["attention"] = relation_loss(student.attended[s], teacher.attended[t], valid_BT, wanted_BT)
    return found
