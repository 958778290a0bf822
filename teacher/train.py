"""The one training loop, for teachers and students alike: batches in, a loss function, two optimizers, checkpoints.

Knows nothing of recipes or of what the loss means. A run that was cut off continues from its last checkpoint to the
same weights, because batches are a pure function of the seed and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gori import console
from gori.data import Example, batches, collate
from gori.errors import GoriError
from gori.inner import Kept
from gori.model import Block, Decoder
from gori.ranks import agreed, current, gathered
from gori.soft import join
from gori.teacher.checkpoints import Progress, resume, save
from gori.teacher.flops import training_flops
from gori.teacher.optim import Muon, optimizers, schedule
from gori.teacher.sharding import Sharded
from gori.teacher.workers import Workers, split
from gori.tokens import Tokens


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train."""

    steps: int
    batch_tokens: int
    """Padded tokens a step, at most."""
    muon_lr: float
    adam_lr: float
    weight_decay: float = 0.0
    warmup_steps: int = 20
    final_lr: float = 0.0
    """Share of the peak rate at the last step."""
    clip: float = 1.0
    """Largest gradient norm."""
    muon_steps: int = 5
    dropout: float = 0.0
    """Share of what a block adds to the residual stream that is left out (docs/training.md: no gain was seen yet)."""
    evaluate_every: int = 0
    """Steps between evaluations on dev; 0: only at the end."""
    checkpoint_every_s: float = 20.0
    """Seconds between checkpoints of an unfinished run."""
    compile: bool = False
    """torch.compile the blocks and the loss's chunks: pays on a GPU and on long CPU runs, needs a C++ compiler, and a
    mixture of experts needs bf16 for it."""
    accumulate: int = 1
    """Micro-batches that a step's rows are divided into, to hold fewer at once."""
    recompute: bool = False
    """Keep only the input of each block for the gradient and compute the rest again: less memory, more time."""
    precision: Literal["float32", "bf16"] | None = None
    """What forward and backward pass compute with; weights and momenta stay float32. null: bf16 on a GPU, float32 on a
    CPU."""
    expert_parallel: int = 1
    """Ranks that a layer's experts are divided over."""


@dataclass(frozen=True)
class TrainBatch:
    """A batch as tensors on the model's device; inputs are `ids[:, :-1]`, targets `ids[:, 1:]` where `loss[:, 1:]`."""

    ids_BT: Tensor
    loss_BT: Tensor
    valid_BT: Tensor
    progress: float = 0.0
    """Share of the run's steps that are done."""
    noise: int = 0
    """Seed of this batch's dropout."""
    soft: tuple[Tensor, Tensor] | None = None
    """A cached teacher's entries at `targets`: ids int64 and weights float32, both `[answers, k]` (gori.soft)."""

    @property
    def targets(self) -> Tensor:
        """int64 [answers], the tokens to predict."""
        return self.ids_BT[:, 1:][self.loss_BT[:, 1:]]

    def answer_hidden(self, model: Decoder, kept: Kept | None = None) -> Tensor:
        """Last hidden states `[answers, D]` at the positions that predict `targets`; `kept` as in Decoder.hidden."""
        ids, valid = self.ids_BT[:, :-1], self.valid_BT[:, :-1]
        return model.hidden(ids, valid_BT=valid, wanted_BT=self.loss_BT[:, 1:], kept=kept)


Loss = Callable[[Decoder, TrainBatch], tuple[Tensor, dict[str, float]]]


def to_tensors(
    examples: Sequence[Example],
    pad: int,
    device: torch.device,
    progress: float = 0.0,
    noise: int = 0,
    width: int = 0,
) -> TrainBatch:
    b = collate(examples, pad, width)
    ids, loss, valid = (_moved(a, device) for a in (b.ids, b.loss, b.valid))
    soft = [e.soft for e in examples if e.soft is not None]
    joined = None
    if soft:
        if len(soft) != len(examples):
            raise GoriError(f"{len(soft)} of {len(examples)} rows have a teacher's cached entries: cache all or none")
        entries, weights = join(soft)
        joined = _moved(entries, device), _moved(weights, device)
    return TrainBatch(ids, loss, valid, progress, noise, joined)


def _moved(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """On its device; to a GPU from pinned memory, while it works on what came before."""
    t = torch.from_numpy(array)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def fit(
    model: Decoder,
    data: Callable[[int], Sequence[Example]] | Tokens,
    loss: Loss,
    settings: TrainSettings,
    *,
    seed: int,
    pad: int,
    label: str,
    evaluate: Callable[[Decoder], dict[str, float]],
    state: Path,
    fingerprint: str,
    workers: int = 1,
    record: Callable[[dict[str, float]], None] = lambda _: None,
) -> Progress:
    """Train in place; returns the log. `data` gives an epoch's examples, or is a set of token shards.

    `state` is where the run's checkpoint lies until it is done. `workers` threads share each batch's rows on a CPU;
    under ranks each takes its part of the rows with that many threads, and `model` ends sharded over them.
    `record` gets every step's entry with its seconds, tokens and FLOPs.
    """
    with _at_work(model, workers, settings) as team:
        device, s = next(model.parameters()).device, settings
        opts = optimizers(model, s.muon_lr, s.adam_lr, s.weight_decay, muon_steps=s.muon_steps)
        done = resume(state, fingerprint, model, opts)
        done.threads = workers
        stream = _stream(data, s.batch_tokens, seed, done.step)
        began, saved = time.monotonic() - done.seconds, time.monotonic()
        with console.steps(label, s.steps) as bar:
            while done.step < s.steps:
                started, rows = time.monotonic(), next(stream)
                micros = _micro_batches(rows, s, team.count * current().world, seed, done.step, pad, device)
                entry = _step(model, team, micros, loss, opts, s, done.step)
                work = {"tokens": sum(len(e.ids) for e in rows), "flops": training_flops(model.cfg, rows)}
                done.step, done.tokens, done.flops = (
                    done.step + 1,
                    done.tokens + work["tokens"],
                    done.flops + work["flops"],
                )
                record({"step": done.step, **entry, **work, "seconds": time.monotonic() - started})
                last = done.step == s.steps
                if last or (s.evaluate_every and done.step % s.evaluate_every == 0):
                    entry |= evaluate(model.eval())
                    model.train()
                done.log.append({"step": done.step, **entry})
                done.seconds = time.monotonic() - began
                bar.update(done.step, _note(done))
                if not last and agreed(time.monotonic() - saved > s.checkpoint_every_s):
                    save(state, fingerprint, model, opts, done)
                    saved = time.monotonic()
    model.eval()
    return done


def _stream(
    data: Callable[[int], Sequence[Example]] | Tokens, batch_tokens: int, seed: int, step: int
) -> Iterator[Sequence[Example]]:
    """Each step's rows, from `step` on."""
    return data.steps(batch_tokens, seed, step) if isinstance(data, Tokens) else batches(data, batch_tokens, seed, step)


@contextmanager
def _at_work(model: Decoder, workers: int, s: TrainSettings) -> Iterator[Workers | Sharded]:
    """All ranks, or threads with one-threaded operations each; one of them on a GPU."""
    before, alone = torch.get_num_threads(), current().world == 1
    if alone and s.expert_parallel > 1:
        raise GoriError(
            f"expert_parallel {s.expert_parallel} divides experts over ranks, and this is one: use torchrun"
        )
    if s.compile and model.cfg.experts and not bf16(s.precision):
        raise GoriError("torch compiles a mixture's products in bfloat16 alone: set precision to bf16, or compile off")
    model.dropout.p = s.dropout
    for block in model.layers:
        assert isinstance(block, Block)
        block.recompute = s.recompute
    if alone:
        team: Workers | Sharded = Workers(model, 1 if next(model.parameters()).is_cuda else workers)
    else:
        team = Sharded(model, s.expert_parallel, torch.bfloat16 if bf16(s.precision) else None)
    team.train()
    if s.compile:
        team.compile()
    torch.set_num_threads(1 if alone else workers)
    try:
        yield team
    finally:
        torch.set_num_threads(before)
        team.close()


def bf16(precision: str | None) -> bool:
    """Whether bf16 is computed with; null: on a GPU."""
    return torch.cuda.is_available() if precision is None else precision == "bf16"


def _micro_batches(
    rows: Sequence[Example], s: TrainSettings, cuts: int, seed: int, step: int, pad: int, device: torch.device
) -> Iterator[tuple[list[TrainBatch], list[float]]]:
    """A step's rows in micro-batches, each cut for threads or ranks: this process's parts, and their shares of the
    step's answers.

    Ranks' parts are padded as their micro-batch is, so that the experts' loads count what one process counts. A rank
    for which no row is left computes a first row again, for nothing: the others wait for it.
    """
    me, total = current(), sum(_answers(e) for e in rows)
    for m, some in enumerate(split(rows, s.accumulate)):
        parts, width = split(some, cuts), 0 if me.world == 1 else max(len(e.ids) for e in some)
        tensors, shares = [], []
        for i in range(len(parts)) if me.world == 1 else (me.rank,):
            noise = (seed + 1) * 1_000_003 + (step * s.accumulate + m) * cuts + i
            spare = i >= len(parts)
            batch = to_tensors(some[:1] if spare else parts[i], pad, device, step / s.steps, noise, width)
            tensors.append(replace(batch, valid_BT=torch.zeros_like(batch.valid_BT)) if spare else batch)
            shares.append(0.0 if spare else sum(_answers(e) for e in parts[i]) / total)
        yield tensors, shares


def _answers(e: Example) -> int:
    """Tokens to predict."""
    return int(np.count_nonzero(e.loss[1:]))


def _step(
    model: Decoder,
    team: Workers | Sharded,
    micro_batches: Iterable[tuple[list[TrainBatch], list[float]]],
    loss: Loss,
    opts: list[torch.optim.Optimizer],
    s: TrainSettings,
    step: int,
) -> dict[str, float]:
    """One update: forward, backward, clip, both optimizers. Returns what the loss reports, and the gradient's norm."""
    rate = schedule(step, s.steps, s.warmup_steps, s.final_lr)
    for o in opts:
        for group in o.param_groups:
            group["lr"] = group["peak_lr"] * rate
    autocast = isinstance(team, Workers) and bf16(s.precision)  # sharded weights are gathered in bf16

    def with_autocast(replica: Decoder, part: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        replica.dropout.seed(part.noise, part.ids_BT.device)
        with torch.autocast(part.ids_BT.device.type, dtype=torch.bfloat16, enabled=autocast):
            return loss(replica, part)

    reported: list[tuple[dict[str, float], float]] = []
    for parts, shares in micro_batches:
        reported += zip(team.gradient(parts, shares, with_autocast), shares, strict=True)
    entry = _join([r for some in gathered(reported) for r in some])
    norm = team.clip(s.clip)
    if not math.isfinite(entry["loss"]) or not torch.isfinite(norm):
        raise GoriError(
            f"the loss became {entry['loss']} and its gradient {float(norm)} at step {step}: "
            f"lower muon_lr {s.muon_lr} or adam_lr {s.adam_lr}"
        )
    muon, adam = opts
    assert isinstance(muon, Muon)
    team.each(lambda job: job(), [*muon.jobs(), adam.step])
    for o in opts:
        o.zero_grad(set_to_none=True)
    return {**entry, "gradient_norm": round(float(norm), 4)}


def _join(reported: Sequence[tuple[dict[str, float], float]]) -> dict[str, float]:
    """What the parts report as one: extremes stay extremes, the rest is averaged by the parts' shares."""
    counted = [(entry, share) for entry, share in reported if share]
    joined: dict[str, float] = {}
    for key in counted[0][0]:
        values = [entry[key] for entry, _ in counted]
        if key.endswith("_max"):
            joined[key] = max(values)
        elif key.endswith("_min"):
            joined[key] = min(values)
        else:
            joined[key] = round(sum(entry[key] * share for entry, share in counted), 5)
    return joined


def _note(done: Progress) -> str:
    entry = done.log[-1]
    shown = [f"loss {entry['loss']:.3f}", f"{done.tokens / max(done.seconds, 1e-9):,.0f} tok/s"]
    evaluated = next((e for e in reversed(done.log) if "dev_exact" in e), None)
    if evaluated:
        shown.append(f"dev exact {evaluated['dev_exact']:.3f}")
    return "  ".join(shown)
