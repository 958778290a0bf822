"""A dense MLP made of a teacher's: its strongest neurons, or those of a mixture's experts, selected or merged.

Knows nothing of residual width, which is cut afterwards. Shapes in names: N calibration tokens, D width, I MLP width of
one expert, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gori.model import MLP, MoE

Score = Literal["use", "output"]
How = Literal["select", "merge"]


class Neurons(NamedTuple):
    """Neurons of a SwiGLU."""

    gate: Tensor
    """[I, D]"""
    up: Tensor
    """[I, D]"""
    down: Tensor
    """[D, I]"""

    def taken(self, rows: Tensor) -> Neurons:
        return Neurons(self.gate[rows], self.up[rows], self.down[:, rows])

    def activation(self, x_ND: Tensor) -> Tensor:
        """[N, I]"""
        return F.silu(x_ND @ self.gate.T) * (x_ND @ self.up.T)


@dataclass(frozen=True)
class Routing:
    """What a router did with the calibration tokens."""

    logits_NE: Tensor
    weight_NE: Tensor
    """Share of each expert in each token's output, zero where it was not chosen."""

    @property
    def use(self) -> Tensor:
        """Each expert's share of all routing weight."""
        total = self.weight_NE.sum(0)
        return total / total.sum()


def dense_neurons(
    mlp: MLP | MoE, x_ND: Tensor, width: int, score: Score = "use", how: How = "select"
) -> tuple[Neurons, dict[str, object]]:
    """`width` neurons that do nearest what a layer's MLP does with its inputs x, and where they are from."""
    if isinstance(mlp, MLP):
        every = Neurons(*(m.weight.detach() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))
        return every.taken(_strongest(x_ND, every, width)), {"neurons": width, "of": len(every.gate)}
    return _from_experts(mlp, x_ND, width, score, how)


def _strongest(x_ND: Tensor, of: Neurons, width: int) -> Tensor:
    """Indices of the neurons with the largest mean |activation| times the norm of what they write: activation
    importance (Minitron, arXiv 2407.14679, section 2.2) with the weight that a neuron's output has."""
    return (of.activation(x_ND).abs().mean(0) * of.down.norm(dim=0)).topk(width).indices.sort().values


def expert(moe: MoE, e: int) -> Neurons:
    gate, up = moe.experts.gate_up[e].detach().chunk(2)
    return Neurons(gate, up, moe.experts.down[e].detach())


def _from_experts(moe: MoE, x_ND: Tensor, width: int, score: Score, how: How) -> tuple[Neurons, dict[str, object]]:
    """The experts with the highest scores, whole, the last one cut to its strongest neurons; every expert's output is
    scaled by the factor that brings the dense sum nearest to the mixture's output (least squares over tokens)."""
    seen = routing(moe, x_ND)
    I = moe.cfg.intermediate_size  # noqa: E741
    scores_E = seen.use if score == "use" else output_scores(moe, x_ND, seen)
    chosen: list[int] = scores_E.topk(-(-width // I)).indices.tolist()
    groups = [[e] for e in chosen]
    if how == "merge":
        groups = grouped(chosen, seen.logits_NE)
    parts: list[Neurons] = []
    for group in groups:
        whole = merged([expert(moe, e) for e in group], seen.use[group])
        parts.append(whole.taken(_strongest(x_ND, whole, min(I, width - sum(len(p.gate) for p in parts)))))
    outputs = [p.activation(x_ND) @ p.down.T for p in parts]
    scales = _least_squares(outputs, moe(x_ND.unsqueeze(0))[0])
    neurons = Neurons(
        torch.cat([p.gate for p in parts]),
        torch.cat([p.up for p in parts]),
        torch.cat([p.down * s for p, s in zip(parts, scales, strict=True)], dim=1),
    )
    taken: dict[str, object] = {
        "experts": chosen,
        "share_of_routing": round(float(seen.use[[e for g in groups for e in g]].sum()), 4),
        "scales": [round(float(s), 4) for s in scales],
    }
    return neurons, taken | ({"merged": groups} if how == "merge" else {})


def routing(moe: MoE, x_ND: Tensor) -> Routing:
    logits = F.linear(x_ND, moe.gate.weight)
    weight, chosen = logits.softmax(-1).topk(moe.cfg.experts_per_token, dim=-1)
    if moe.cfg.norm_topk:
        weight = weight / weight.sum(-1, keepdim=True)
    return Routing(logits, torch.zeros_like(logits).scatter_(1, chosen, weight))


def output_scores(moe: MoE, x_ND: Tensor, seen: Routing) -> Tensor:
    """Sum over the tokens that chose an expert of its routing weight times the norm of its output, `[E]`: REAP's
    saliency (arXiv 2510.13999, eq. 9) times the number of those tokens, since the dense sum serves every token."""
    found = []
    for e in range(moe.cfg.experts):
        rows = seen.weight_NE[:, e] > 0
        own = expert(moe, e)
        found.append((seen.weight_NE[rows, e] * (own.activation(x_ND[rows]) @ own.down.T).norm(dim=-1)).sum())
    return torch.stack(found)


def grouped(centres: Sequence[int], logits_NE: Tensor) -> list[list[int]]:
    """Every expert in the group of the centre whose router logits over the tokens are most like its own (cosine);
    a group's first is its centre (M-SMoE, arXiv 2310.01334, section 3.2)."""
    alike = F.normalize(logits_NE - logits_NE.mean(1, keepdim=True), dim=0)
    nearest = (alike.T @ alike[:, list(centres)]).argmax(1).tolist()
    return [[c, *(e for e, n in enumerate(nearest) if n == i and e not in centres)] for i, c in enumerate(centres)]


def merged(group: Sequence[Neurons], use: Tensor) -> Neurons:
    """The average of experts weighted by their use, each with its neurons in the order that fits the first's best
    (weight matching: the assignment with the largest sum of products; M-SMoE, section 3.1, after Git Re-Basin)."""
    from scipy.optimize import linear_sum_assignment

    share = use / use.sum() if use.sum() > 0 else torch.full_like(use, 1 / len(use))
    first = group[0]
    total = [t * share[0] for t in first]
    for other, s in zip(group[1:], share[1:], strict=True):
        fit = first.gate @ other.gate.T + first.up @ other.up.T + first.down.T @ other.down
        order = torch.as_tensor(linear_sum_assignment(fit.numpy(), maximize=True)[1])
        total = [a + s * b for a, b in zip(total, other.taken(order), strict=True)]
    return Neurons(*total)


def _least_squares(outputs: list[Tensor], wanted: Tensor) -> Tensor:
    """Scales s minimising |sum_e s_e outputs_e - wanted|², in float64 with a little ridge."""
    A = torch.stack([o.flatten() for o in outputs], dim=1).double()
    gram = A.T @ A
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(outputs), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, A.T @ wanted.flatten().double()).float()
