"""A mixture of experts: a router and the stacked matrices of its SwiGLU experts.

Shapes: B batch, T tokens, N = B*T, M tokens that are counted, k experts a token, A = N*k assignments, E experts, I MLP
width, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gori.precision import product_dtype
from gori.routing import Routes, counts

if TYPE_CHECKING:
    from gori.model import ModelConfig


class Experts(nn.Module):
    """SwiGLU experts as stacked matrices: `gate_up [E, 2I, D]` (gate first), `down [E, D, I]`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        E, width, D = cfg.experts, cfg.intermediate_size, cfg.hidden_size
        self.gate_up = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x_AD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert and, for each expert, where its rows end (int32) → outputs `[A, D]`."""
        return expert_rows(x_AD, ends_E, self.gate_up, self.down)


def expert_rows(x_AD: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each row through its expert's SwiGLU; weights and ends as in `Experts`."""
    dtype = product_dtype(x_AD)  # autocast does not know grouped_mm
    x_AD, gate_up, down = x_AD.to(dtype), gate_up.to(dtype), down.to(dtype)
    gate, up = F.grouped_mm(x_AD, gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends_E)


class MoE(nn.Module):
    """Top-k mixture of SwiGLU experts; the router's softmax is in float32 (Qwen3-MoE).

    After a forward pass in training mode `routed_2E` holds how many tokens each expert was chosen for, and its
    probabilities summed over tokens (`Decoder.balance`).
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.gate = nn.Linear(cfg.hidden_size, cfg.experts, bias=False)
        self.experts = Experts(cfg)
        self.routed_2E: Tensor | None = None

    def forward(self, x_BTD: Tensor, counted_M: Tensor | None = None) -> Tensor:
        """`counted_M` (int64): which of the B*T rows that come the balance counts; None: all."""
        x_ND = x_BTD.flatten(0, 1)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.gate.weight.float())
        probs_NE = logits_NE.softmax(-1)
        weight_Nk, expert_Nk = probs_NE.topk(self.cfg.experts_per_token, dim=-1)
        if self.cfg.norm_topk:
            weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        routes = Routes.of(expert_Nk, self.cfg.experts)
        y_AD = self.experts(routes.sent(x_ND), routes.ends_E)
        if self.training:
            self.routed_2E = self._routed(probs_NE, expert_Nk, counted_M)
        return routes.back(y_AD, weight_Nk).to(x_ND.dtype).view_as(x_BTD)

    def _routed(self, probs_NE: Tensor, expert_Nk: Tensor, counted_M: Tensor | None) -> Tensor:
        if counted_M is not None:
            probs_NE, expert_Nk = probs_NE.index_select(0, counted_M), expert_Nk.index_select(0, counted_M)
        return torch.stack((counts(expert_Nk, self.cfg.experts), probs_NE.sum(0)))
