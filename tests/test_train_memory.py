"""What saves memory in one process: micro-batches, recomputation and bf16 change rounding, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_probe import CASES, train_case
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gori.errors import GoriError
from gori.model import Decoder
from gori.teacher.train import Progress


def trained(tmp_path: Path, case: str = "moe", **changes: Any) -> tuple[dict[str, Tensor], Progress]:
    return train_case(case, tmp_path / "state.pt", **changes)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_blocks_train_to_the_same_bits(dropout: float, tmp_path: Path) -> None:
    plain, again = (trained(tmp_path, recompute=r, dropout=dropout) for r in (False, True))
    assert plain[1].log == again[1].log
    assert all(torch.equal(w, again[0][name]) for name, w in plain[0].items())


def test_a_recomputed_block_keeps_less() -> None:
    def kept(recompute: bool) -> int:
        model = Decoder(CASES["dense"][0]).initialise(torch.Generator().manual_seed(0)).train()
        for block in model.layers:
            block.recompute = recompute
        found = 0

        def count(t: Tensor) -> Tensor:
            nonlocal found
            found += t.numel()
            return t

        with saved_tensors_hooks(count, lambda t: t):
            model.hidden(torch.arange(60).view(3, 20))
        return found

    assert kept(True) < kept(False) / 2


def test_micro_batches_add_up_to_the_step(tmp_path: Path) -> None:
    whole, parts = (trained(tmp_path, "dense", accumulate=n) for n in (1, 3))
    for name, w in whole[0].items():
        torch.testing.assert_close(parts[0][name], w, atol=2e-5, rtol=0)  # float32 sums in another order


@pytest.mark.parametrize("case", ["dense", "moe"])
def test_bf16_is_computed_with_where_it_is_asked_for(case: str, tmp_path: Path) -> None:
    exact, rough = ([e["loss"] for e in trained(tmp_path, case, precision=p)[1].log] for p in ("float32", "bf16"))
    assert rough == pytest.approx(exact, rel=2**-7)
    assert rough != exact


def test_experts_too_are_computed_in_bf16() -> None:
    experts = Decoder(CASES["moe"][0]).initialise(torch.Generator().manual_seed(0)).moe_layers()[0].experts
    rows, ends = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 4, 6, 8]).int()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = experts(rows, ends)
    assert rough.dtype == torch.bfloat16
    exact = experts(rows, ends)
    # three roundings to 8 bits
    torch.testing.assert_close(rough.float(), exact, atol=2**-6 * exact.abs().max().item(), rtol=0)


def test_experts_are_not_divided_over_one_rank(tmp_path: Path) -> None:
    with pytest.raises(GoriError, match="expert_parallel 2 divides experts over ranks, and this is one: use torchrun"):
        trained(tmp_path, alone=False, expert_parallel=2)
