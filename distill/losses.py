"""Distillation losses over a vocabulary, chunk by chunk (gori.chunked).

Knows nothing of models: hidden states and head matrices come in.

Shapes: N tokens, C tokens of a chunk, D student width, V vocabulary, k entries. Logits and their gradients: float32
(float64 if given).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from gori.chunked import Known, Work, chunk_rows, chunked, product, product_buffer
from gori.distill.divergences import DIVERGENCES, STATES, TERMS, Outcomes, divergences_of, outcomes, parse
from gori.errors import GoriError
from gori.precision import for_products, product_dtype, wide

Weighted = tuple[tuple[str, float, float], ...]
"""(divergence or ce, its parameter, its weight) of each term."""


def check_terms(weights: Mapping[str, float]) -> None:
    """Refuse unknown terms and a sum of nothing."""
    for name, w in weights.items():
        parse(name)
        if not 0 <= w < math.inf:
            raise GoriError(f"loss term {name} has weight {w}: a weight is a number from 0 on")
    if not any(weights.values()):
        raise GoriError(f"every loss term has weight 0: give one of {', '.join(TERMS)} a weight")
    if not any(w for name, w in weights.items() if parse(name)[0] not in STATES):
        raise GoriError(f"losses of {', '.join(weights)} teach no answer: give ce or a divergence a weight beside them")


def check_sparse(weights: Mapping[str, float]) -> None:
    """Refuse divergences that need every probability of the teacher, where a few entries are known."""
    if unknown := [k for k in divergences_of(k for k, w in weights.items() if w) if k != "forward_kl"]:
        raise GoriError(
            f"loss term {unknown[0]} needs the whole distribution: of a cached teacher take forward_kl or ce"
        )


@cache
def _overwriting(used: Weighted, temperature: float, of_teacher: str) -> Work:
    """What works on a block: (logits, targets, what is known of the teacher) → each term's sum, and the logits become
    the gradient of the weighted terms. Made once for each choice, so that it is compiled once."""

    def work(logits: Tensor, targets: Tensor, *taught: Tensor) -> Tensor:
        q = outcomes(logits if temperature == 1 else logits / temperature)
        plain = q if temperature == 1 else outcomes(logits)
        p = None
        if of_teacher == "logits":
            p = outcomes(taught[0] if temperature == 1 else taught[0].div_(temperature))
        sums, grad = [], None
        for kind, parameter, weight in used:
            if kind == "ce":
                loss, slope = _cross_entropy(plain, targets)
            else:
                compared = SPARSE[of_teacher](q, *taught) if p is None else DIVERGENCES[kind](q, p, parameter)
                loss, slope, weight = compared[0] * temperature**2, compared[1], weight * temperature
            sums.append(loss.sum())
            grad = slope.mul_(weight) if grad is None else grad.add_(slope, alpha=weight)
        assert grad is not None
        logits.copy_(grad)
        return torch.stack(sums)

    return work


def _cross_entropy(q: Outcomes, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    at = targets_C.unsqueeze(1)
    slope = q.prob_CV.scatter_add(1, at, torch.full_like(q.prob_CV[:, :1], -1.0))
    return -q.log_CV.gather(1, at).squeeze(1), slope


def _sampled(q: Outcomes, ids_Ck: Tensor, given_Ck: Tensor) -> tuple[Tensor, Tensor]:
    """-sum_i w_i log q_i, and its gradient (sum w) q - w."""
    slope = (q.prob_CV * given_Ck.sum(-1, keepdim=True)).scatter_add_(1, ids_Ck, -given_Ck)
    return -(given_Ck * q.log_CV.gather(1, ids_Ck)).sum(-1), slope


def _with_tail(q: Outcomes, ids_Ck: Tensor, given_Ck: Tensor) -> tuple[Tensor, Tensor]:
    """KL over k + 1 outcomes: the entries, and all others as one. Their gradient is q - w at an entry and
    q (1 - w_tail / q_tail) elsewhere."""
    filled = given_Ck > 0
    ids = torch.where(filled, ids_Ck, ids_Ck[:, :1])  # the rest of a short row: its first entry once more
    held = torch.where(filled[:, :1], torch.zeros_like(given_Ck), q.prob_CV.gather(1, ids))
    others = q.prob_CV.scatter(1, ids, held)
    q_tail, w_tail = others.sum(-1, keepdim=True), (1 - given_Ck.sum(-1, keepdim=True)).clamp_(min=0)
    tiny = torch.finfo(others.dtype).tiny
    loss = torch.special.xlogy(given_Ck, given_Ck) - given_Ck * q.log_CV.gather(1, ids)
    of_tail = torch.special.xlogy(w_tail, w_tail) - w_tail * q_tail.clamp(min=tiny).log()
    slope = q.prob_CV - others.mul_(w_tail / q_tail.clamp(min=tiny))
    return loss.sum(-1) + of_tail.squeeze(1), slope.scatter_add_(1, ids, -given_Ck)


SPARSE = {"sample": _sampled, "topk": _with_tail}
"""How entries of a cached teacher are compared, by how they were chosen."""


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    weights: Mapping[str, float],
    temperature: float = 1.0,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of loss terms, averaged over tokens, and each term's value.

    hidden `[N, D]` and head `[V, D]` are the student's (gradients flow to both); teacher_hidden `[N, D']` and
    teacher_head `[V, D']` may be None where only "ce" has a weight. targets int64 `[N]`. A divergence is scaled by
    temperature², so that its gradient does not shrink (arXiv 1503.02531, section 2). Terms of weight 0 are left out.
    `chunk` tokens have logits at once; `compiled`: torch.compile fuses what is done with them.
    """
    check_terms(weights)
    kept = {k: float(w) for k, w in weights.items() if w and parse(k)[0] not in STATES}
    if teacher_hidden is None and (lonely := divergences_of(kept)):
        raise GoriError(f"loss terms {', '.join(lonely)} need a teacher")
    if teacher_head is not None and teacher_head.shape[0] != head.shape[0]:
        raise GoriError(
            f"teacher's vocabulary {teacher_head.shape[0]} is not the student's {head.shape[0]}: use one tokenizer"
        )
    if teacher_hidden is None or teacher_head is None or not divergences_of(kept):
        return _total(hidden, head, targets, kept, 1.0, chunk, compiled, "nothing", lambda rows: ())
    taught, taught_head = for_products(teacher_hidden), teacher_head.to(product_dtype(teacher_hidden))
    buffer = product_buffer(taught, taught_head, min(chunk or chunk_rows(head), len(hidden)))
    known = lambda rows: (product(taught[rows], taught_head, buffer),)  # noqa: E731
    return _total(hidden, head, targets, kept, temperature, chunk, compiled, "logits", known)


def sparse_loss(
    hidden: Tensor,
    head: Tensor,
    soft_ids: Tensor,
    soft_weights: Tensor,
    targets: Tensor,
    weights: Mapping[str, float],
    temperature: float = 1.0,
    tail: bool = False,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The same with a teacher of whom a few entries a token are known: ids int64 and weights float32, both `[N, k]`.

    Without `tail` the weights are an unbiased estimate of the teacher's distribution (importance sampling, arXiv
    2503.16870): "forward_kl" is then -sum w log q, the cross-entropy to the estimate, whose gradient (sum w) q - w has
    forward KL's as its expectation (w's is p, and the sum's is one; so weights are not normalised). Its value is
    forward KL's plus the teacher's entropy. With `tail` the weights are the teacher's largest probabilities, and
    "forward_kl" is KL over the k entries and one outcome for all others: a lower bound of the whole KL.

    The weights are those of the teacher at this `temperature`. Other divergences need every probability of the teacher.
    """
    check_terms(weights)
    kept = {k: float(w) for k, w in weights.items() if w and parse(k)[0] not in STATES}
    check_sparse(kept)
    given = soft_weights.to(wide(hidden.dtype))
    known = lambda rows: (soft_ids[rows], given[rows])  # noqa: E731
    return _total(hidden, head, targets, kept, temperature, chunk, compiled, "topk" if tail else "sample", known)


def _total(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Mapping[str, float],
    temperature: float,
    chunk: int | None,
    compiled: bool,
    of_teacher: str,
    of_teacher_at: Known,
) -> tuple[Tensor, dict[str, float]]:
    work = _overwriting(tuple((*parse(k), w) for k, w in weights.items()), temperature, of_teacher)
    known = lambda rows: (targets[rows], *of_teacher_at(rows))  # noqa: E731
    total, terms = chunked(hidden, head, work, known, list(weights.values()), chunk, compiled)
    return total, dict(zip(weights, terms.tolist(), strict=True))
