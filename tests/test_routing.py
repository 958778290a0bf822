"""Rows to experts and back, against loops over tokens and autograd's own gathers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gori.routing import Routes, counts


def drawn(tokens: int, experts: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each token's k different experts, its weights, rows, and a matrix an expert."""
    g = torch.Generator().manual_seed(seed)
    expert_Nk = torch.rand(tokens, experts, generator=g).topk(k, dim=1).indices
    weight_Nk = torch.rand(tokens, k, generator=g, dtype=torch.float64).requires_grad_()
    x_ND = torch.randn(tokens, 3, generator=g, dtype=torch.float64).requires_grad_()
    return expert_Nk, weight_Nk, x_ND, torch.randn(experts, 3, 3, generator=g, dtype=torch.float64)


def by_hand(x_D: Tensor, weight_k: Tensor, matrix_kDD: Tensor) -> Tensor:
    """One token through each of its experts, weighted, `[k, D]`."""
    return torch.stack([w * (x_D @ m) for w, m in zip(weight_k, matrix_kDD, strict=True)])


@given(st.integers(0, 12), st.integers(1, 6), st.data(), st.integers(0, 99))
def test_rows_go_to_their_experts_and_back(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    expert_Nk, weight_Nk, x_ND, matrix_EDD = drawn(tokens, experts, data.draw(st.integers(1, experts)), seed)
    routes = Routes.of(expert_Nk, experts)
    starts = [0, *routes.ends_E.tolist()]
    sent = routes.sent(x_ND)
    parts = [sent[a:b] @ m for a, b, m in zip(starts[:-1], starts[1:], matrix_EDD, strict=True)]
    got = routes.back(torch.cat(parts), weight_Nk)
    want = x_ND * weight_Nk.sum() * 0
    for n, chosen in enumerate(expert_Nk.tolist()):
        want = want.index_add(0, torch.tensor([n] * len(chosen)), by_hand(x_ND[n], weight_Nk[n], matrix_EDD[chosen]))
    torch.testing.assert_close(got, want)
    aim = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * aim).sum(), (x_ND, weight_Nk)),
        torch.autograd.grad((want * aim).sum(), (x_ND, weight_Nk)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert starts[-1] == expert_Nk.numel()
    assert counts(expert_Nk, experts).tolist() == torch.bincount(expert_Nk.flatten(), minlength=experts).tolist()
