"""Muon against the singular value decomposition, and the schedule's ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gori.model import Decoder, ModelConfig
from gori.teacher.optim import (
    Muon,
    newton_schulz,
    newton_schulz_narrow,
    newton_schulz_wide,
    optimizers,
    schedule,
    split_parameters,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_svd(G: Tensor, steps: int) -> Tensor:
    """The quintic applied to each singular value by itself."""
    u, s, v = torch.linalg.svd(G, full_matrices=False)
    s = s / (G.norm() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_newton_schulz_applies_the_quintic_to_every_singular_value(m: int, n: int, steps: int, seed: int) -> None:
    G = random(3, m, n, seed=seed)
    want = torch.stack([by_svd(g, steps) for g in G])
    for form in (newton_schulz, newton_schulz_narrow):
        torch.testing.assert_close(form(G, steps), want, atol=1e-9, rtol=1e-7)


def test_in_bfloat16_singular_values_of_a_common_size_come_into_the_band_around_one() -> None:
    u, _, v = torch.linalg.svd(random(48, 160), full_matrices=False)
    G = u @ torch.diag(torch.linspace(0.1, 1, 48, dtype=torch.float64)) @ v
    s = torch.linalg.svdvals(newton_schulz_narrow(G.bfloat16(), 5).double())
    assert s.min() > 0.6
    assert s.max() < 1.25


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_five_steps_bring_singular_values_of_float32_into_the_band_around_one(shape: tuple[int, int]) -> None:
    # the quintic's limit cycle is [0.68, 1.13]; a value below 0.003 of the norm would need more steps than five
    s = torch.linalg.svdvals(newton_schulz(random(*shape).float(), 5).double())
    start = torch.linalg.svdvals(random(*shape)) / random(*shape).norm()
    assert s[start > 0.003].min() > 0.3
    assert s.max() < 1.21


@given(st.integers(1, 8), st.integers(0, 30), st.integers(1, 5), st.integers(0, 99))
def test_the_gram_form_of_a_wide_matrix_is_the_same_iteration(m: int, more: int, steps: int, seed: int) -> None:
    G = random(m, m + more, seed=seed)
    torch.testing.assert_close(newton_schulz_wide(G, steps), newton_schulz(G, steps), atol=1e-9, rtol=1e-7)


def dense_step(weight: Tensor, grads: list[Tensor], columns: bool) -> Tensor:
    """Muon's plain-matrix rule on the one matrix that a layer's experts make together, taken apart again."""
    E, m, n = weight.shape
    join = (lambda x: x.transpose(0, 1).reshape(m, E * n)) if columns else (lambda x: x.reshape(E * m, n))
    p = nn.Parameter(join(weight).clone())
    muon = Muon([p], lr=0.1, weight_decay=0.01)
    for g in grads:
        p.grad = join(g)
        muon.step()
    out = p.detach()
    return out.view(m, E, n).transpose(0, 1) if columns else out.view(E, m, n)


# (experts, out, in): wide experts, and narrow ones whose width is below the model's
@pytest.mark.parametrize("shape", [(4, 24, 8), (4, 6, 8), (3, 8, 12), (3, 8, 4), (2, 8, 8), (1, 3, 8)])
@pytest.mark.parametrize("columns", [False, True])
def test_experts_are_updated_as_the_dense_matrix_that_they_make_together(
    shape: tuple[int, int, int], columns: bool
) -> None:
    weight, grads = random(*shape), [random(*shape, seed=s) for s in (1, 2, 3)]
    p = nn.Parameter(weight.clone())
    muon = Muon([p], lr=0.1, weight_decay=0.01, joined_by_columns=[p] if columns else [])
    for g in grads:
        p.grad = g.clone()
        muon.step()
    torch.testing.assert_close(p.detach(), dense_step(weight, grads, columns), atol=1e-9, rtol=1e-7)


def test_momentum_is_nesterovs_and_the_update_has_adams_size() -> None:
    weight, g1, g2 = random(6, 9), random(6, 9, seed=1), random(6, 9, seed=2)
    p = nn.Parameter(weight.clone())
    muon = Muon([p], lr=0.5, momentum=0.9)
    want, m = weight.clone(), torch.zeros_like(weight)
    for g in (g1, g2):
        p.grad = g.clone()
        muon.step()
        m = 0.9 * m + 0.1 * g
        want -= 0.5 * 0.2 * math.sqrt(9) * newton_schulz((0.9 * m + 0.1 * g).unsqueeze(0), 5)[0]
    torch.testing.assert_close(p.detach(), want, atol=1e-10, rtol=1e-8)
    rms = newton_schulz(random(64, 96), 5).square().mean().sqrt() * 0.2 * math.sqrt(96)
    assert 0.15 < rms < 0.25  # Moonlight's aim is 0.2


def test_experts_of_a_decoder_are_joined_along_their_own_width_even_when_they_are_narrow() -> None:
    cfg = ModelConfig(
        kind="qwen3_moe", vocab_size=11, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8,
        intermediate_size=4, experts=3, experts_per_token=1,
    )  # fmt: skip
    model = Decoder(cfg).initialise(torch.Generator().manual_seed(0))
    experts = model.moe_layers()[0].experts
    before = experts.gate_up.detach().clone(), experts.down.detach().clone()
    opts = optimizers(model, muon_lr=0.1, adam_lr=0.1, weight_decay=0.0)
    grads = random(*experts.gate_up.shape).float(), random(*experts.down.shape).float()
    experts.gate_up.grad, experts.down.grad = grads[0].clone(), grads[1].clone()
    opts[0].step()
    for p, old, g, columns in zip((experts.gate_up, experts.down), before, grads, (False, True), strict=True):
        E, m, n = p.shape
        joined = g.transpose(0, 1).reshape(m, E * n) if columns else g.reshape(E * m, n)
        u = newton_schulz(joined.double(), 5)
        u = u.view(m, E, n).transpose(0, 1) if columns else u.view(E, m, n)
        want = old.double() - 0.1 * 0.2 * math.sqrt(max(joined.shape)) * u
        torch.testing.assert_close(p.detach().double(), want, atol=2e-4, rtol=1e-3)


def test_every_parameter_has_one_optimizer_and_embeddings_router_and_norms_have_adam() -> None:
    cfg = ModelConfig(
        kind="qwen3_moe", vocab_size=11, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8,
        intermediate_size=4, experts=3, experts_per_token=1, tied=False,
    )  # fmt: skip
    model = Decoder(cfg)
    matrices, rest = split_parameters(model)
    assert {id(p) for p in matrices} | {id(p) for p in rest} == {id(p) for p in model.parameters()}
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    adam = sorted({n.split(".")[-2] if "layers" in n else n for p in rest if (n := names[id(p)])})
    assert adam == ["embed_tokens.weight", "gate", "input_layernorm", "k_norm", "lm_head.weight", "norm.weight",
                    "post_attention_layernorm", "q_norm"]  # fmt: skip


def test_the_schedule_warms_up_falls_as_a_cosine_and_ends_at_the_floor() -> None:
    rates = [schedule(s, 100, 10, 0.1) for s in range(101)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert schedule(0, 5, 0, 0.0) == 1.0
    assert schedule(3, 2, 5, 0.0) == pytest.approx(0.8)  # a run that is shorter than its warm-up
