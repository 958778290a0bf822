"""What runs on a GPU against what runs on a CPU; nothing here runs without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gori import chunked
from gori.data import Example
from gori.distill.divergences import DIVERGENCES
from gori.distill.losses import distillation_loss, sparse_loss
from gori.model import Decoder, ModelConfig
from gori.teacher.optim import Muon, newton_schulz_narrow, newton_schulz_wide
from gori.teacher.stage import answer_loss
from gori.teacher.train import TrainSettings, fit, to_tensors

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # torch.compile's own
]

CFG = ModelConfig(
    kind="qwen3_moe", vocab_size=512, hidden_size=128, layers=3, heads=4, kv_heads=2, head_dim=32,
    intermediate_size=64, experts=6, experts_per_token=3, max_position=128,
)  # fmt: skip
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    """Torch compiles one function for eight cases at most."""
    torch._dynamo.reset()


def rows(seed: int = 0, count: int = 24) -> list[Example]:
    """Of several lengths, the first tokens a prompt."""
    g = np.random.default_rng(seed)
    found = []
    for n in g.integers(20, 60, count):
        ids = g.integers(0, 64, n)
        ids[n // 2 :] = ids[: n - n // 2]
        found.append(Example(ids, np.arange(n) >= 5))
    return found


def gradients(model: Decoder, device: torch.device, bf16: bool) -> tuple[float, dict[str, Tensor]]:
    model = model.to(device).train()
    batch = to_tensors(rows(), 0, device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        loss, _ = answer_loss(0.01)(model, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return loss.item(), {n: g.cpu() for n, g in zip(names, grads, strict=True)}


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())


@pytest.mark.parametrize(("bf16", "compiled", "bound"), [(False, False, 1e-4), (True, False, 0.06), (True, True, 0.06)])
def test_a_mixtures_gradients_are_those_of_a_cpu(bf16: bool, compiled: bool, bound: float) -> None:
    model = Decoder(CFG).initialise(torch.Generator().manual_seed(0))
    want_loss, want = gradients(model, torch.device("cpu"), bf16=False)
    if compiled:
        for block in model.layers:
            block.compile(dynamic=True)
    got_loss, got = gradients(model, GPU, bf16)
    assert got_loss == pytest.approx(want_loss, rel=1e-2 if bf16 else 1e-5)
    assert {n: e for n in want if (e := off(got[n], want[n])) > bound} == {}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*DIVERGENCES, "ce"])
def test_a_loss_is_that_of_float64_on_the_same_numbers(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """bfloat16: only the logits' gradient is rounded, and the head's is summed over many chunks without rounding."""
    g = torch.Generator().manual_seed(1)
    shapes = ((300, 64), (1000, 64), (300, 96), (1000, 96))
    made = [(torch.randn(s, generator=g) * s[1] ** -0.25).to(dtype) for s in shapes]
    y = torch.randint(0, 1000, (300,), generator=g)
    wide = [t.double() for t in made]
    here = [t.cuda() for t in made]
    for some in (wide, here):
        some[0].requires_grad_(), some[1].requires_grad_()
    want, _ = distillation_loss(*wide, y, {name: 1.0}, temperature=2.0)
    got, _ = distillation_loss(*here, y.cuda(), {name: 1.0}, temperature=2.0, chunk=7, compiled=compiled)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    for a, b in zip(torch.autograd.grad(got, here[:2]), torch.autograd.grad(want, wide[:2]), strict=True):
        assert off(a, b) < bound


def test_entries_of_a_cached_teacher_on_a_gpu() -> None:
    g = torch.Generator().manual_seed(2)
    h, W = torch.randn(50, 32, generator=g).requires_grad_(), torch.randn(200, 32, generator=g).requires_grad_()
    ids, w = torch.randint(0, 200, (50, 12), generator=g), torch.rand(50, 12, generator=g) / 12
    y = torch.randint(0, 200, (50,), generator=g)
    for tail in (False, True):
        want, _ = sparse_loss(h, W, ids, w, y, {"forward_kl": 1.0}, tail=tail)
        got, _ = sparse_loss(h.cuda(), W.cuda(), ids.cuda(), w.cuda(), y.cuda(), {"forward_kl": 1.0}, tail=tail)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        for a, b in zip(torch.autograd.grad(got, (h, W)), torch.autograd.grad(want, (h, W)), strict=True):
            assert off(a, b) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_by_chunks_is_that_of_float64(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Under autocast: products of numbers rounded to bfloat16, all else wide."""
    g = torch.Generator().manual_seed(3)
    h, W = torch.randn(500, 64, generator=g), torch.randn(3000, 64, generator=g) * 0.3
    y = torch.randint(0, 3000, (500,), generator=g)
    monkeypatch.setattr(chunked, "WHOLE_BYTES", 0)
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cuda", 3000 * 4 * 33)
    rounded = [t.bfloat16().double().requires_grad_() for t in (h, W)]
    want = torch.nn.functional.cross_entropy(rounded[0] @ rounded[1].T, y)
    here = [t.cuda().requires_grad_() for t in (h, W)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = chunked.cross_entropy(here[0], here[1], y.cuda(), compiled)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(got, here), torch.autograd.grad(want, rounded), strict=True):
        assert off(a, b) < 5e-3


@pytest.mark.parametrize("shape", [(96, 96), (64, 640)])
def test_muon_orthogonalises_in_bfloat16(shape: tuple[int, int]) -> None:
    """As on a CPU: directions of a common size all end near one."""
    g = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    G = u @ torch.diag(torch.linspace(0.2, 1, min(shape))) @ v
    got = newton_schulz_narrow(G.bfloat16().cuda(), 5).float().cpu()
    sizes = torch.linalg.svdvals(got)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    assert off(got, newton_schulz_wide(G, 5)) < 0.05


def trained(device: torch.device, state: Path, settings: TrainSettings, data: Sequence[Example]) -> list[float]:
    model = Decoder(CFG).initialise(torch.Generator().manual_seed(0)).to(device)
    done = fit(
        model, lambda _: data, answer_loss(0.01), settings, seed=0, pad=0, label="x", evaluate=lambda _: {},
        state=state, fingerprint="",
    )  # fmt: skip
    return [entry["loss"] for entry in done.log]


@pytest.mark.parametrize("more", [{}, {"recompute": True}, {"accumulate": 2}, {"compile": True, "precision": "bf16"}])
def test_training_goes_as_on_a_cpu(tmp_path: Path, more: dict[str, Any]) -> None:
    data, plain = rows(1, 60), TrainSettings(60, 600, 1e-2, 3e-3, warmup_steps=5, precision="float32")
    want = trained(torch.device("cpu"), tmp_path / "cpu", plain, data)
    got = trained(GPU, tmp_path / "gpu", replace(plain, **more), data)
    assert got[0] == pytest.approx(want[0], rel=0.02)
    assert np.mean(got[-10:]) == pytest.approx(np.mean(want[-10:]), rel=0.15)
    assert np.mean(want[-10:]) < 0.8 * want[0]


def test_updates_of_muon_are_those_of_a_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    start, grad = torch.randn(6, 128, 64, generator=g), torch.randn(6, 128, 64, generator=g)
    found = []
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(start.to(device, copy=True))
        p.grad = grad.to(device)
        Muon([p], lr=0.1).step()
        found.append(p.detach().cpu() - start)
    assert off(found[1], found[0]) < 0.05
