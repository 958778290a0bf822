"""Operations of a training step against PyTorch's own counter, and what a GPU could do, and the live log."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gori.data import Example
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.teacher.flops import peak_tflops, training_flops
from gori.teacher.journal import journal, peak_flops
from gori.teacher.train import to_tensors

DENSE = ModelConfig(
    kind="qwen3", vocab_size=96, hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate_size=48,
)  # fmt: skip


def rows(answers: int) -> list[Example]:
    return [Example(list(range(25)), [i > 24 - answers for i in range(25)]) for _ in range(4)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("answers", [24, 5])
def test_matrix_products_are_those_that_pytorch_counts(tied: bool, answers: int) -> None:
    cfg = dataclasses.replace(DENSE, tied=tied)
    model = Decoder(cfg).initialise(torch.Generator().manual_seed(0))
    batch = to_tensors(rows(answers), 0, torch.device("cpu"))
    attention = FlopCounterMode(display=False, custom_mapping={})
    with attention:
        model.logits(batch.answer_hidden(model)).sum().backward()
    counted = {op: n for op, n in attention.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    square = 3 * 2 * 2 * cfg.layers * cfg.heads * cfg.head_dim * 4 * 24**2  # scores and values, forward and backward
    assert training_flops(cfg, rows(answers)) - square == sum(counted.values())


def test_a_mixture_counts_its_active_experts_and_its_router() -> None:
    moe = dataclasses.replace(DENSE, kind="qwen3_moe", experts=8, experts_per_token=2, intermediate_size=24)
    of_two = dataclasses.replace(moe, experts=2)
    twice_as_wide = dataclasses.replace(DENSE, intermediate_size=48)
    inputs, answers, D = 4 * 24, 4 * 5, 32
    router = 3 * 2 * D * 8 * (2 * inputs + answers)
    assert training_flops(moe, rows(5)) == training_flops(twice_as_wide, rows(5)) + router
    assert training_flops(moe, rows(5)) - training_flops(of_two, rows(5)) == router * 6 / 8


def test_peaks_are_found_by_the_gpus_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA A10") == 125.0
    assert peak_tflops("NVIDIA L4") == 121.0
    assert peak_tflops("NVIDIA GeForce RTX 4090") == 165.0
    assert peak_tflops("Radeon 9") is None


def test_what_a_gpu_could_do_is_given_or_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(2.5) == (2.5e12, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops(None) == (None, "no MFU: trained on a CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Radeon 9")
    assert peak_flops(None) == (None, "no MFU: the peak of Radeon 9 is not known; set train.peak_tflops")


def test_the_live_log_has_rates_and_the_utilisation_of_a_known_peak(tmp_path: Path) -> None:
    with journal(tmp_path / "teacher", 100.0, False) as record:
        record({"step": 1, "loss": 2.0, "tokens": 30, "flops": 50.0, "seconds": 2.0})
    (line,) = (tmp_path / "logs/teacher.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 1, "loss": 2.0, "tokens": 30, "seconds": 2.0, "tokens_per_second": 15.0, "mfu": 0.25,
    }  # fmt: skip


def test_the_live_log_holds_each_step_of_one_run_once(tmp_path: Path) -> None:
    def run(steps: range, loss: float) -> list[tuple[int, float]]:
        with journal(tmp_path / "teacher", None, False) as record:
            for step in steps:
                record({"step": step, "loss": loss, "tokens": 30, "flops": 50.0, "seconds": 2.0})
        lines = (tmp_path / "logs/teacher.jsonl").read_text().splitlines()
        return [(e["step"], e["loss"]) for e in map(json.loads, lines)]

    assert run(range(1, 13), 1.0) == [(n, 1.0) for n in range(1, 13)]
    assert run(range(9, 11), 2.0) == [*((n, 1.0) for n in range(1, 9)), (9, 2.0), (10, 2.0)]  # continued at step 8
    with open(tmp_path / "logs/teacher.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # as a kill leaves it
    assert run(range(11, 12), 3.0)[-2:] == [(10, 2.0), (11, 3.0)]
    assert len(run(range(12, 12), 4.0)) == 11  # nothing was left to do
    assert run(range(1, 3), 5.0) == [(1, 5.0), (2, 5.0)]  # begun anew


def test_tensorboard_is_asked_for_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GoriError, match="needs the tensorboard package: pip install tensorboard"):  # noqa: SIM117
        with journal(tmp_path / "teacher", None, True):
            pass
