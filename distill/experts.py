"""What a dense MLP can be made of: a teacher's most important neurons, those of a mixture's experts all together, or of
experts selected or merged.

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

from gori.model import MLP
from gori.moe import MoE

Score = Literal["use", "output"]
How = Literal["neurons", "select", "merge"]


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


@dataclass(frozen=True)
class Candidates:
    """Neurons that a dense MLP may be made of."""

    neurons: Neurons
    group: Tensor
    """[I] int64: of neurons with the same number the outputs are scaled alike."""
    report: dict[str, object]
    """Where they are from."""

    def taken(self, rows: Tensor) -> Candidates:
        """Some of them; groups are numbered anew."""
        group = self.group[rows].unique(return_inverse=True)[1]
        return Candidates(self.neurons.taken(rows), group, self.report)


def candidates(
    mlp: MLP | MoE, x_ND: Tensor, width: int, score: Score = "use", how: How = "neurons", *, spare: int = 1
) -> Candidates:
    """Of a layer whose MLP has inputs x: the `width * spare` ones with the largest mean |activation| (weighted by the
    router, where there is one) times the norm of what they write: activation importance (Minitron, arXiv 2407.14679,
    section 2.2). Of a mixture's selected or merged experts just `width`."""
    if isinstance(mlp, MLP):
        every = Neurons(*(m.weight.detach() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))
        rows = _strongest(x_ND, every, width * spare)
        return Candidates(every.taken(rows), torch.zeros(len(rows), dtype=torch.int64), {"of": len(every.gate)})
    if how == "neurons":
        return _from_all_experts(mlp, x_ND, width * spare)
    return _from_few_experts(mlp, x_ND, width, score, how)


def _strongest(x_ND: Tensor, of: Neurons, count: int) -> Tensor:
    """Indices of the most important neurons, all where there are not as many."""
    importance = _importance(x_ND, of, x_ND.new_ones(len(x_ND)))
    return importance.topk(min(count, len(importance))).indices.sort().values


def _importance(x_ND: Tensor, of: Neurons, weight_N: Tensor) -> Tensor:
    """[I], a sum over tokens that have weights."""
    return (weight_N @ of.activation(x_ND).abs()) * of.down.norm(dim=0)


def expert(moe: MoE, e: int) -> Neurons:
    gate, up = moe.experts.gate_up[e].detach().chunk(2)
    return Neurons(gate, up, moe.experts.down[e].detach())


def joined(parts: Sequence[Neurons]) -> Neurons:
    return Neurons(
        torch.cat([p.gate for p in parts]), torch.cat([p.up for p in parts]), torch.cat([p.down for p in parts], dim=1)
    )


def _from_all_experts(moe: MoE, x_ND: Tensor, count: int) -> Candidates:
    """The most important neurons of all experts together, each counted where its expert was chosen."""
    seen = routing(moe, x_ND)
    found = []
    for e in range(moe.cfg.experts):  # one at a time: a large mixture's activations are far more than its inputs
        rows = seen.weight_NE[:, e] > 0
        found.append(_importance(x_ND[rows], expert(moe, e), seen.weight_NE[rows, e]))
    I = moe.cfg.intermediate_size  # noqa: E741
    importance = torch.stack(found)
    kept = importance.flatten().topk(min(count, importance.numel())).indices.sort().values
    group = kept // I
    parts = [expert(moe, e).taken(kept[group == e] % I) for e in range(moe.cfg.experts)]
    return Candidates(joined(parts), group.unique(return_inverse=True)[1], {"of": importance.numel()})


def _from_few_experts(moe: MoE, x_ND: Tensor, width: int, score: Score, how: How) -> Candidates:
    """The experts with the highest scores, whole, the last one cut to its most important neurons."""
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
    report: dict[str, object] = {
        "experts": chosen,
        "share_of_routing": round(float(seen.use[[e for g in groups for e in g]].sum()), 4),
        **({"merged": groups} if how == "merge" else {}),
    }
    return Candidates(joined(parts), torch.cat([torch.full((len(p.gate),), i) for i, p in enumerate(parts)]), report)


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
