"""Divergences between a teacher's and a student's distribution over a vocabulary: values and gradients in closed form.

Knows nothing of models, chunks or weights. Shapes: C tokens, V vocabulary; all tensors float32 (float64 if given).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gori.errors import GoriError, nearest


@dataclass(frozen=True)
class Outcomes:
    """A distribution of each token."""

    log_CV: Tensor
    """Log-probabilities."""
    prob_CV: Tensor
    """Probabilities."""


Term = Callable[[Outcomes, Outcomes, float], tuple[Tensor, Tensor]]
"""(student, teacher, parameter), → (divergence [C], its gradient [C, V] with respect to the student's logits)."""


def outcomes(logits_CV: Tensor) -> Outcomes:
    """Softmax with one exponential an element: the log's normaliser is read off at the largest entry, whose probability
    is at least 1/V. The logits are overwritten with their log-probabilities."""
    prob = logits_CV.softmax(-1)
    normaliser = logits_CV.amax(-1, keepdim=True) - prob.amax(-1, keepdim=True).log()
    return Outcomes(logits_CV.sub_(normaliser), prob)


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Sums of products along the vocabulary, [C, 1]."""
    return torch.linalg.vecdot(a_CV, b_CV).unsqueeze(-1)


def _through_softmax(q: Outcomes, slope_CV: Tensor) -> Tensor:
    """Gradient with respect to logits from that with respect to probabilities; the latter is overwritten."""
    return slope_CV.sub_(_dot(q.prob_CV, slope_CV)).mul_(q.prob_CV)


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Log-probabilities of share · a + (1 - share) · b."""
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))


def forward_kl(q: Outcomes, p: Outcomes, _: float = 0.0) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) (Hinton et al., arXiv 1503.02531)."""
    value = _dot(p.prob_CV, p.log_CV) - _dot(p.prob_CV, q.log_CV)
    return value.squeeze(-1), q.prob_CV - p.prob_CV


def reverse_kl(q: Outcomes, p: Outcomes, _: float = 0.0) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) (MiniLLM, arXiv 2306.08543)."""
    gap = q.log_CV - p.log_CV
    value = _dot(q.prob_CV, gap)
    return value.squeeze(-1), gap.sub_(value).mul_(q.prob_CV)


def jsd(q: Outcomes, p: Outcomes, beta: float) -> tuple[Tensor, Tensor]:
    """Generalized Jensen-Shannon divergence: beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
    m = beta teacher + (1 - beta) student (GKD, arXiv 2306.13649, eq. 1)."""
    m = _mixture(p.log_CV, q.log_CV, beta)
    of_teacher = _dot(p.prob_CV, p.log_CV) - _dot(p.prob_CV, m)
    gap = q.log_CV - m
    of_student = _dot(q.prob_CV, gap)
    slope = gap.sub_(of_student).mul_(q.prob_CV).mul_(1 - beta)
    return (beta * of_teacher + (1 - beta) * of_student).squeeze(-1), slope


def skew_kl(q: Outcomes, p: Outcomes, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || alpha teacher + (1 - alpha) student) (DistiLLM, arXiv 2402.03898, section 3.1)."""
    gap = p.log_CV - _mixture(p.log_CV, q.log_CV, alpha)
    value = _dot(p.prob_CV, gap)
    return value.squeeze(-1), _through_softmax(q, gap.exp_().mul_(alpha - 1))


def skew_reverse_kl(q: Outcomes, p: Outcomes, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(student || alpha student + (1 - alpha) teacher) (DistiLLM, arXiv 2402.03898, section 3.1)."""
    gap = q.log_CV - _mixture(q.log_CV, p.log_CV, alpha)
    value = _dot(q.prob_CV, gap)
    return value.squeeze(-1), _through_softmax(q, gap.sub_(gap.exp(), alpha=alpha))


DIVERGENCES: dict[str, Term] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
PARAMETERS = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
"""What `@` sets, and its value where it is not named: `jsd@0.3`."""
STATES = ("hidden", "cosine", "attention")
"""Terms on what happens inside the networks (gori.distill.states)."""
TERMS = (*DIVERGENCES, "ce", *STATES)


def parse(name: str) -> tuple[str, float]:
    """A term's name and its parameter: `skew_kl@0.2` → ("skew_kl", 0.2); 0.0 where it has none."""
    kind, at, value = name.partition("@")
    if kind not in TERMS:
        raise GoriError(f"loss term {kind!r} is unknown{nearest(kind, TERMS)}")
    if not at:
        return kind, PARAMETERS.get(kind, 0.0)
    if kind not in PARAMETERS:
        raise GoriError(f"loss term {name}: {kind} has no parameter; those with one are {', '.join(PARAMETERS)}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise GoriError(
            f"loss term {name}: the parameter {value!r} must be a number above 0 and below 1, as in jsd@0.3"
        )
    return kind, number


def divergences_of(names: Iterable[str]) -> list[str]:
    """Those of the terms that compare the teacher's distribution."""
    return [n for n in names if parse(n)[0] in DIVERGENCES]
