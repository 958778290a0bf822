"""Small trainings that run in one process or on several ranks with the same result, and how to start the ranks."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gori import corpus
from gori.data import Example
from gori.distill.objective import Draws, Inside, divergence_loss
from gori.distill.stage import train_student
from gori.errors import GoriError
from gori.evaluate import batched
from gori.model import Decoder, ModelConfig
from gori.ranks import barrier, current, joined
from gori.recipe import Distill, Student
from gori.teacher import optim, sharding
from gori.teacher.sharding import whole_tensors
from gori.teacher.stage import answer_loss
from gori.teacher.train import Loss, Progress, TrainBatch, TrainSettings, fit

DENSE = ModelConfig(
    kind="qwen3", vocab_size=97, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48,
    init_std=0.2,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, kind="qwen3_moe", intermediate_size=24, experts=4, experts_per_token=2, tied=False)
SETTINGS = TrainSettings(steps=6, batch_tokens=160, muon_lr=0.01, adam_lr=0.003, warmup_steps=2, checkpoint_every_s=1e9)
CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "few rows": (DENSE, {"batch_tokens": 30}),
    "moe": (MOE, {}),
    "accumulate": (MOE, {"accumulate": 2}),
    "recompute": (MOE, {"recompute": True}),
    "experts": (MOE, {"expert_parallel": 2}),
    "experts over all": (MOE, {"expert_parallel": 4}),
    "experts at once": (MOE, {"expert_parallel": 2, "accumulate": 2, "recompute": True}),
    "resharded": (MOE, {"whole_bytes": 0}),
    "on-policy": (DENSE, {"on_policy": True}),
    "on-policy, few rows": (DENSE, {"on_policy": True, "batch_tokens": 30}),
    "states": (DENSE, {"states": {"hidden": 0.5, "attention": 1.0, "ce": 1.0}}),
    "states, recompute": (DENSE, {"states": {"hidden": 0.5, "attention": 1.0, "ce": 1.0}, "recompute": True}),
    "states, resharded": (DENSE, {"states": {"attention": 1.0, "ce": 0.1}, "whole_bytes": 0}),
    "bf16": (DENSE, {"precision": "bf16"}),
    "bf16 muon": (MOE, {"bf16_muon": True}),
    "bf16 states": (DENSE, {"states": {"hidden": 0.5, "attention": 1.0, "ce": 1.0}, "precision": "bf16"}),
}


class CutError(Exception):
    """Stands for a kill."""


def examples(epoch: int) -> Sequence[Example]:
    """Rows of 6 to 24 ids with answers of several lengths."""
    rng = np.random.default_rng(epoch)
    rows = []
    for n in rng.integers(6, 25, 40):
        first = int(rng.integers(1, n - 1))
        rows.append(Example(rng.integers(0, 97, n).tolist(), [i >= first for i in range(n)]))
    return rows


def train_case(
    case: str, state: Path, cut_after: int | None = None, alone: bool = True, **changes: Any
) -> tuple[dict[str, Tensor], Progress]:
    """Whole weights and progress of a case; `cut_after` so many steps it is cut, with a checkpoint of each step.

    `alone`: in one process its experts are not divided. Draws of on-policy steps differ with the parts that a batch is
    cut into, so one process cuts it for two threads.
    """
    cfg, own = CASES[case]
    own = dict(own)
    whole_bytes = own.pop("whole_bytes", sharding.WHOLE_BYTES)
    on_policy, bf16_muon = own.pop("on_policy", False), own.pop("bf16_muon", False)
    loss = drawing() if on_policy else inside(own.pop("states")) if "states" in own else answer_loss(0.05)
    settings = dataclasses.replace(SETTINGS, **own, **changes)
    if alone and current().world == 1:
        settings = dataclasses.replace(settings, expert_parallel=1)
    if cut_after is not None:
        settings = dataclasses.replace(settings, checkpoint_every_s=0.0)
    model = Decoder(cfg).initialise(torch.Generator().manual_seed(0))
    for moe in model.moe_layers():  # a router that is sure: rounding then changes no token's experts
        moe.gate.weight.data.mul_(10)
    with mock.patch.object(sharding, "WHOLE_BYTES", whole_bytes), muon_as_on_a_gpu() if bf16_muon else nullcontext():
        done = fit(
            model, examples, cut(loss, cut_after, settings.accumulate),
            settings, seed=1, pad=0, label=case, state=state, evaluate=evaluate, fingerprint=case,
            workers=2 if on_policy and current().world == 1 else 1,
        )  # fmt: skip
    return dict(whole_tensors(model)), done


@contextmanager
def muon_as_on_a_gpu() -> Iterator[None]:
    """Updates orthogonalised in bfloat16, and given in it."""

    def narrow(G: Tensor, steps: int) -> Tensor:
        return optim.newton_schulz_narrow(G.bfloat16(), steps)

    with mock.patch.multiple(optim, newton_schulz=narrow, newton_schulz_wide=narrow):
        yield


def drawing() -> Loss:
    """Reverse KL to a random teacher at answers that the student draws."""
    teacher = Decoder(DENSE).initialise(torch.Generator().manual_seed(7)).eval()
    draws = Draws(share=0.8, temperature=1.0, start=0.2, seed=3, end=5, pad=0, longest=6)
    return divergence_loss(teacher, {"reverse_kl": 1.0, "ce": 0.5}, 1.0, draws=draws)


def inside(weights: dict[str, float]) -> Loss:
    """Terms on the streams and attention of a random teacher."""
    teacher = Decoder(DENSE).initialise(torch.Generator().manual_seed(7)).eval()
    return divergence_loss(teacher, weights, 1.0, inside=Inside([(1, 1), (0, 0)], None))


def cut(loss: Loss, after: int | None, calls_a_step: int) -> Loss:
    calls = 0

    def stopping(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if after is not None and calls > after * calls_a_step:
            raise CutError
        return loss(model, batch)

    return stopping


def evaluate(model: Decoder) -> dict[str, float]:
    """What stands for a share of right answers: the sum of the ids of five answers."""
    prompts = [list(range(1, n)) for n in (3, 4, 9, 4, 7)]
    answer = batched(model, end=96)
    said = answer(prompts) if current().world == 1 else sharding.by_ranks(model, prompts, answer)
    return {"dev_exact": sum(map(sum, said))}


def run_cases(directory: Path, cases: Sequence[str]) -> None:
    """Train each; `NAME:3` is cut after three steps."""
    for case in cases:
        name, _, steps = case.partition(":")
        try:
            weights, done = train_case(name, directory / f"{name}.training.pt", int(steps) if steps else None)
        except CutError:
            continue
        if current().first:
            torch.save({"weights": weights, "log": done.log, "tokens": done.tokens}, directory / f"{name}.pt")


def run_and_cut(out: Path, cases: Sequence[str], cut: Sequence[str]) -> None:
    """Every case in `out`; of `cut` also runs that are cut, in `out/cut`, and copies of them that are finished, in
    `out/again`."""
    run_cases(out, cases)
    if current().first:
        (out / "cut").mkdir()
    barrier()
    run_cases(out / "cut", cut)
    barrier()
    if current().first:
        shutil.copytree(out / "cut", out / "again")
    barrier()
    run_cases(out / "again", [case.partition(":")[0] for case in cut])


def check_same(path: Path, weights: dict[str, Tensor], done: Progress, atol: float) -> None:
    """Whether what a run wrote is what another trained."""
    got = torch.load(path)
    assert got["tokens"] == done.tokens
    for one, other in zip(got["log"], done.log, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-4)  # the log is rounded to 4 and 5 digits
    for name, w in weights.items():
        torch.testing.assert_close(
            got["weights"][name], w.detach(), atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def fail(rank: int, directory: Path) -> None:
    """What a rank's error does to all: `rank` refuses its third batch."""

    def refusing(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        if current().rank == rank and batch.progress > 0.3:
            raise GoriError("this row is refused")
        return answer_loss(0.0)(model, batch)

    settings = dataclasses.replace(SETTINGS)
    model = Decoder(DENSE).initialise(torch.Generator().manual_seed(0))
    fit(
        model, examples, refusing, settings, seed=1, pad=0, label="fails", evaluate=evaluate,
        state=directory / "fails.pt", fingerprint="fails",
    )  # fmt: skip


def draw_with_a_large_student(directory: Path, toy: Path, tokenizer: Path) -> None:
    """An on-policy student whose weights no rank may hold at once."""
    rows = corpus.read(toy / "train.jsonl", toy / "dev.jsonl", [toy / "test.jsonl"], toy / "tools.json")
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "intermediate_size": 48}
    student = Student.model_validate({**shape, "max_position": 200, "induction": False})
    distill = Distill.model_validate({"init": "random", "on_policy": {}, "train": {"steps": 1, "batch_tokens": 99}})
    with mock.patch.object(sharding, "WHOLE_BYTES", 0):
        train_student(student, distill, directory / "teacher", rows, tokenizer, 0, directory / "distill")


def _begin(rank: int, world: int, port: int, directory: Path, work: Any, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said = os.open(directory / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    with joined():
        work(*arguments)


def start(world: int, directory: Path, work: Any, *arguments: Any) -> list[int | None]:
    """Run `work` on so many ranks, each saying what it says into DIR/rank-N.txt; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gori.teacher.stage"])  # torch is imported once
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun holds it
    given = [(rank, world, store.port, directory, work, arguments) for rank in range(world)]
    processes = [context.Process(target=_begin, args=a, daemon=True) for a in given]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    return [p.exitcode for p in processes]
