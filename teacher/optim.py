"""Muon for matrices and AdamW for the rest, and the learning-rate schedule. Knows nothing of models or data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gori.teacher.wholes import by_owners, is_sharded, local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Muon's quintic iteration (Keller Jordan 2024)."""


def newton_schulz(G: Tensor, steps: int) -> Tensor:
    """Approximate orthogonalisation of matrices `[..., m, n]`: singular values are driven towards one by the quintic
    iteration, batched."""
    a, b, c = COEFFICIENTS
    wide = G.shape[-2] > G.shape[-1]
    X = G.mT if wide else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if wide else X


def newton_schulz_wide(X: Tensor, steps: int) -> Tensor:
    """`newton_schulz` of one wide matrix `[m, n]`, n much larger than m, through its Gram matrix.

    The same polynomial, but all iterations happen on m by m matrices: X_k = P_k X_0, with P found from X_0 X_0^T. Not
    for bfloat16: a Gram matrix rounded to it has negative eigenvalues, which the polynomial lets grow.
    """
    a, b, c = COEFFICIENTS
    X = X / (X.norm() + 1e-7)
    A = X @ X.mT
    P = torch.eye(len(A), dtype=X.dtype, device=X.device)
    for _ in range(steps):
        Q = torch.addmm(b * A, A, A, beta=1, alpha=c)
        Q.diagonal().add_(a)
        P, A = Q @ P, Q @ A @ Q
    return P @ X


def newton_schulz_narrow(X: Tensor, steps: int) -> Tensor:
    """`newton_schulz` for a GPU, in the type that comes: products alone, with the sums in them, and a tall matrix
    multiplied from its right instead of turned. Muon's author takes bfloat16: an update's direction bears its
    rounding."""
    a, b, c = COEFFICIENTS
    shape, tall = X.shape, X.shape[-2] > X.shape[-1]
    X = X.reshape(-1, *shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X.view(shape)


def _orthogonal(G: Tensor, steps: int) -> Tensor:
    """Of matrices: float32 on a CPU; bfloat16 on a GPU, whose matrix units have no float32."""
    return newton_schulz_narrow(G.bfloat16(), steps) if G.is_cuda else newton_schulz(G, steps)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices and stacks of matrices (experts).

    The update is scaled by 0.2 * sqrt(max(m, n)), so that its root mean square is that of AdamW and one learning rate
    serves both (Moonlight, arXiv 2502.16982, eq. 4). Matrices of one shape are orthogonalised in one batched product. A
    layer's experts are orthogonalised together, as the one wide matrix that they would be in a dense layer.

    Parameters that are sharded over ranks (DTensors) are divided among them: each rank orthogonalises its share whole.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        joined_by_columns: Iterable[nn.Parameter] = (),
    ) -> None:
        """`joined_by_columns`: those stacks `[E, out, in]` whose `out` is the model's width (a down projection)."""
        self._by_columns = {id(p) for p in joined_by_columns}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for job in self.jobs():
            job()

    def jobs(self) -> list[Callable[[], None]]:
        """A step as functions that share nothing, the longest first, so that threads can divide it."""
        found: list[tuple[int, Callable[[], None]]] = []
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            params = [p for p in group["params"] if p.grad is not None]
            if any(is_sharded(p) for p in params):
                found.append((0, partial(self._step_sharded, params, group)))
                continue
            for p in params:
                if p.dim() == 3:
                    found.append((p.numel(), partial(self._step_experts, p, group)))
                else:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                size = sum(p.numel() for p in params)
                found.append((size, partial(self._step_matrices, params, group)))
        return [job for _, job in sorted(found, key=lambda f: -f[0])]

    @torch.no_grad()
    def _step_matrices(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates = _orthogonal(torch.stack([self._momentum(p, group) for p in params]), group["steps"])
        for p, u in zip(params, updates, strict=True):
            self._apply(p, u, group)

    @torch.no_grad()
    def _step_experts(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        self._apply(p, self._orthogonal_experts(p, self._momentum(p, group), group["steps"]), group)

    @torch.no_grad()
    def _step_sharded(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        def orthogonal(p: nn.Parameter, whole: Tensor) -> Tensor:
            if p.dim() == 3:
                return self._orthogonal_experts(p, whole, group["steps"])
            return _orthogonal(whole, group["steps"])

        for p, u in zip(params, by_owners(params, [self._momentum(p, group) for p in params], orthogonal), strict=True):
            self._apply(p, u, group)

    def _orthogonal_experts(self, p: nn.Parameter, u: Tensor, steps: int) -> Tensor:
        """Stacks `[E, out, in]`: joined along the side that is not the model's width."""
        E, m, n = p.shape
        columns = id(p) in self._by_columns  # down: D rows, E*I columns; else gate_up
        u = u.bfloat16() if u.is_cuda else u
        joined = u.transpose(0, 1).reshape(m, E * n) if columns else u.reshape(E * m, n)
        if u.is_cuda:
            joined = newton_schulz_narrow(joined, steps)
        else:
            joined = newton_schulz_wide(joined, steps) if columns else newton_schulz_wide(joined.mT, steps).mT
        return joined.view(m, E, n).transpose(0, 1) if columns else joined.reshape(p.shape)

    def _momentum(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient's momentum of what this process holds of a parameter."""
        assert p.grad is not None
        state, grad = self.state[p], local(p.grad)
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = local(state["momentum"]).lerp_(grad, 1 - group["momentum"])
        return torch.lerp(grad, momentum, group["momentum"])

    def _apply(self, p: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
        longest = max(p.shape)
        if p.dim() == 3:
            E, m, n = p.shape
            longest = max(m, E * n) if id(p) in self._by_columns else max(E * m, n)
        mine = local(p)
        if group["weight_decay"]:
            mine.mul_(1 - group["lr"] * group["weight_decay"])
        mine.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(longest))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the blocks (for Muon) and the rest: embedding, head, router, norms, biases (for AdamW)."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = p.dim() >= 2 and "embed_tokens" not in name and "lm_head" not in name and "mlp.gate.weight" not in name
        (matrices if inside else rest).append(p)
    return matrices, rest


def optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float, muon_steps: int = 5
) -> list[torch.optim.Optimizer]:
    """The two optimizers of a decoder, each group remembering its peak rate as `peak_lr`."""
    matrices, rest = split_parameters(model)
    down = [p for name, p in model.named_parameters() if name.endswith("experts.down")]
    muon = Muon(matrices, lr=muon_lr, weight_decay=weight_decay, steps=muon_steps, joined_by_columns=down)
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    for o, peak in ((muon, muon_lr), (adam, adam_lr)):
        for group in o.param_groups:
            group["peak_lr"] = peak
    return [muon, adam]


def schedule(step: int, total: int, warmup_steps: int, floor: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
