"""The one training loop, for teachers and students alike: batches in, a loss function, two optimizers, checkpoints.

Knows nothing of recipes or of what the loss means. A run that was cut off continues from its last checkpoint to the
same weights, because batches are a pure function of the seed and the step.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gori import console
from gori.artifact import os_errors
from gori.data import Example, batches, collate
from gori.errors import GoriError
from gori.model import Decoder
from gori.soft import join
from gori.teacher.optim import Muon, optimizers, schedule
from gori.teacher.workers import Workers, split


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
    """torch.compile the blocks (pays on a GPU and on long CPU runs; needs a C++ compiler)."""


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

    def answer_hidden(self, model: Decoder) -> Tensor:
        """Last hidden states `[answers, D]` at the positions that predict `targets`."""
        return model.hidden(self.ids_BT[:, :-1], valid_BT=self.valid_BT[:, :-1], wanted_BT=self.loss_BT[:, 1:])


Loss = Callable[[Decoder, TrainBatch], tuple[Tensor, dict[str, float]]]


@dataclass
class Progress:
    """What a checkpoint carries besides weights."""

    step: int = 0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    threads: int = 1


def to_tensors(
    examples: Sequence[Example], pad: int, device: torch.device, progress: float = 0.0, noise: int = 0
) -> TrainBatch:
    b = collate(examples, pad)
    ids, loss, valid = (torch.from_numpy(a).to(device) for a in (b.ids, b.loss, b.valid))
    soft = [e.soft for e in examples if e.soft is not None]
    joined = None
    if soft:
        if len(soft) != len(examples):
            raise GoriError(f"{len(soft)} of {len(examples)} rows have a teacher's cached entries: cache all or none")
        entries, weights = join(soft)
        joined = torch.from_numpy(entries).to(device), torch.from_numpy(weights).to(device)
    return TrainBatch(ids, loss, valid, progress, noise, joined)


def fit(
    model: Decoder,
    epoch_examples: Callable[[int], Sequence[Example]],
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
) -> Progress:
    """Train in place; returns the log. `state` is where the run's checkpoint lies until it is done;
    `workers` threads share each batch's rows on a CPU."""
    device = next(model.parameters()).device
    opts = optimizers(model, settings.muon_lr, settings.adam_lr, settings.weight_decay, muon_steps=settings.muon_steps)
    done = _resume(state, fingerprint, model, opts)
    done.threads, model.dropout.p = workers, settings.dropout
    stream = batches(epoch_examples, settings.batch_tokens, seed, first_step=done.step)
    began, saved = time.monotonic() - done.seconds, time.monotonic()
    with console.steps(label, settings.steps) as bar, _workers(model, workers, settings.compile) as team:
        while done.step < settings.steps:
            rows = next(stream)
            progress, noise = done.step / settings.steps, (seed + 1) * 1_000_003 + done.step * team.count
            parts = [
                to_tensors(part, pad, device, progress=progress, noise=noise + i)
                for i, part in enumerate(split(rows, team.count))
            ]
            entry = _step(model, team, parts, loss, opts, settings, done.step)
            done.step += 1
            done.tokens += sum(len(e.ids) for e in rows)
            last = done.step == settings.steps
            if last or (settings.evaluate_every and done.step % settings.evaluate_every == 0):
                entry |= evaluate(model.eval())
                model.train()
            done.log.append({"step": done.step, **entry})
            done.seconds = time.monotonic() - began
            bar.update(done.step, _note(done))
            if not last and time.monotonic() - saved > settings.checkpoint_every_s:
                _save(state, fingerprint, model, opts, done)
                saved = time.monotonic()
    model.eval()
    return done


@contextmanager
def _workers(model: Decoder, count: int, compiled: bool) -> Iterator[Workers]:
    """Threads for the loop, each with one-threaded operations; one of them on a GPU."""
    before = torch.get_num_threads()
    team = Workers(model, 1 if next(model.parameters()).is_cuda else count)
    team.train()
    if compiled:
        team.compile()
    torch.set_num_threads(1)
    try:
        yield team
    finally:
        torch.set_num_threads(before)
        team.close()


def _step(
    model: Decoder,
    team: Workers,
    parts: Sequence[TrainBatch],
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
    answers = [len(p.targets) for p in parts]
    shares = [n / sum(answers) for n in answers]

    def with_autocast(replica: Decoder, part: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        device = part.ids_BT.device.type
        replica.dropout.seed(part.noise, part.ids_BT.device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return loss(replica, part)

    entry = _join(team.gradient(parts, shares, with_autocast), shares)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
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


def _join(entries: list[dict[str, float]], shares: list[float]) -> dict[str, float]:
    """What the parts report as one: extremes stay extremes, the rest is averaged by the parts' shares."""
    joined: dict[str, float] = {}
    for key in entries[0]:
        values = [e[key] for e in entries]
        if key.endswith("_max"):
            joined[key] = max(values)
        elif key.endswith("_min"):
            joined[key] = min(values)
        else:
            joined[key] = round(sum(v * share for v, share in zip(values, shares, strict=True)), 5)
    return joined


def _note(done: Progress) -> str:
    entry = done.log[-1]
    shown = [f"loss {entry['loss']:.3f}", f"{done.tokens / max(done.seconds, 1e-9):,.0f} tok/s"]
    evaluated = next((e for e in reversed(done.log) if "dev_exact" in e), None)
    if evaluated:
        shown.append(f"dev exact {evaluated['dev_exact']:.3f}")
    return "  ".join(shown)


def _save(path: Path, fingerprint: str, model: Decoder, opts: list[torch.optim.Optimizer], done: Progress) -> None:
    body = {
        "fingerprint": fingerprint,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in opts],
        "progress": json.dumps(vars(done)),
    }
    tmp = path.with_name(f"{path.name}.writing")
    whole = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(body, whole)
    try:
        with os_errors(path):
            tmp.write_bytes(whole.getbuffer())
            os.replace(tmp, path)
    except GoriError:
        tmp.unlink(missing_ok=True)
        raise


def _resume(path: Path, fingerprint: str, model: Decoder, opts: list[torch.optim.Optimizer]) -> Progress:
    """Restore the run's checkpoint if it has one of the same fingerprint."""
    if not path.exists():
        return Progress()
    try:
        body = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise GoriError(f"{path} is not a readable training checkpoint ({e}): delete it to start anew") from e
    if body["fingerprint"] != fingerprint:
        console.log(f"{path.name} belongs to other settings or data: starting anew")
        return Progress()
    model.load_state_dict(body["model"])
    for o, state in zip(opts, body["optimizers"], strict=True):
        o.load_state_dict(state)
    done = Progress(**json.loads(body["progress"]))
    console.log(f"continuing at step {done.step}")
    return done
