"""Distillation losses over a vocabulary, computed chunk by chunk so that no [tokens, vocabulary] tensor is ever whole.

The gradient with respect to the student's hidden states and head is formed in the forward pass, from closed forms, and
only those two are kept; nothing is recomputed. Knows nothing of models: hidden states and head matrices come in.

Shapes: N tokens, C tokens of a chunk, D student width, V vocabulary. Logits and gradients: float32 (float64 if given).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gori.errors import GoriError, nearest

CHUNK_BYTES = 32 << 20
"""Size of one [C, V] float32 tensor; a handful of them live at once."""

Term = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student, teacher log-probabilities), both [C, V] → (loss [C], d loss / d student logits [C, V])."""


def forward_kl(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) (Hinton et al., arXiv 1503.02531)."""
    weight = p.exp()
    return (weight * (p - q)).sum(-1), q.exp() - weight


def reverse_kl(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) (MiniLLM, arXiv 2306.08543)."""
    weight, gap = q.exp(), q - p
    loss = (weight * gap).sum(-1)
    return loss, weight * (gap - loss.unsqueeze(-1))


def jsd(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence, the generalized one of GKD at beta = 1/2 (arXiv 2306.13649, eq. 1)."""
    m = torch.logaddexp(q, p) - math.log(2)
    weight = q.exp()
    loss = 0.5 * ((p.exp() * (p - m)).sum(-1) + (weight * (q - m)).sum(-1))
    slope = 0.5 * (q - m)
    return loss, weight * (slope - (weight * slope).sum(-1, keepdim=True))


DIVERGENCES: dict[str, Term] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
TERMS = (*DIVERGENCES, "ce")


def check_terms(weights: Mapping[str, float]) -> None:
    """Refuse unknown terms and a sum of nothing."""
    for name, w in weights.items():
        if name not in TERMS:
            raise GoriError(f"loss term {name!r} is unknown{nearest(name, TERMS)}")
        if w < 0:
            raise GoriError(f"loss term {name} has weight {w}: weights are not negative")
    if not any(weights.values()):
        raise GoriError(f"every loss term has weight 0: give one of {', '.join(TERMS)} a weight")


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        targets_N: Tensor,
        weights: Mapping[str, float],
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        N = len(hidden_ND)
        grad_hidden, grad_head = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        sums = torch.zeros(len(weights), dtype=hidden_ND.dtype, device=hidden_ND.device)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            logits = hidden_ND[rows] @ head_VD.T
            teacher = None
            if teacher_hidden is not None and teacher_head is not None:
                teacher = teacher_hidden[rows] @ teacher_head.T
            part, grad = _chunk(logits, teacher, targets_N[rows], weights, temperature)
            sums += part
            grad = grad.div_(N).to(hidden_ND.dtype)
            grad_hidden[rows] = grad @ head_VD
            grad_head.addmm_(grad.T, hidden_ND[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        terms = sums / N
        total = (terms * torch.tensor(list(weights.values()), dtype=terms.dtype, device=terms.device)).sum()
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None, None, None, None, None


def _chunk(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, weights: Mapping[str, float], temperature: float
) -> tuple[Tensor, Tensor]:
    """Each term's sum over the chunk, and the weighted gradient [C, V] with respect to the student's logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    grad, sums = torch.zeros_like(logits), []
    p = q = logits[:0]
    if teacher is not None:
        p = (teacher.to(wide) / temperature).log_softmax(-1)
        q = (logits / temperature).log_softmax(-1)
    for name, w in weights.items():
        if name == "ce":
            log_q = logits.log_softmax(-1)
            sums.append(-log_q.gather(1, targets.unsqueeze(1)).sum())
            slope = log_q.exp_()
            slope.scatter_add_(1, targets.unsqueeze(1), torch.full_like(slope[:, :1], -1.0))
            grad.add_(slope, alpha=w)
        else:
            loss, slope = DIVERGENCES[name](q, p)
            sums.append(loss.sum() * temperature**2)
            grad.add_(slope, alpha=w * temperature)
    return torch.stack(sums), grad


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    weights: Mapping[str, float],
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of loss terms, averaged over tokens, and each term's value.

    hidden `[N, D]` and head `[V, D]` are the student's (gradients flow to both); teacher_hidden `[N, D']` and
    teacher_head `[V, D']` may be None where only "ce" has a weight. targets int64 `[N]`. A divergence is scaled by
    temperature², so that its gradient does not shrink (arXiv 1503.02531, section 2). Terms of weight 0 are left out.
    """
    check_terms(weights)
    used = {k: float(w) for k, w in weights.items() if w}
    if teacher_hidden is None and set(used) != {"ce"}:
        raise GoriError(f"loss terms {', '.join(k for k in used if k != 'ce')} need a teacher")
    if teacher_head is not None and teacher_head.shape[0] != head.shape[0]:
        raise GoriError(
            f"teacher's vocabulary {teacher_head.shape[0]} is not the student's {head.shape[0]}: use one tokenizer"
        )
    chunk = chunk or max(1, CHUNK_BYTES // (4 * head.shape[0]))
    total, terms = _Distill.apply(hidden, head, teacher_hidden, teacher_head, targets, used, temperature, chunk)
    return total, dict(zip(used, terms.tolist(), strict=True))
