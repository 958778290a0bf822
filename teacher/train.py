"""The one training loop, for teachers and students alike: batches in, a loss function, two optimizers, checkpoints.

Knows nothing of recipes or of what the loss means. A run that was cut off continues from its last checkpoint to the
same weights, because batches are a pure function of the seed and the step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
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
from gori.teacher.optim import optimizers, schedule


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

    @property
    def targets(self) -> Tensor:
        """int64 [answers], the tokens to predict."""
        return self.ids_BT[:, 1:][self.loss_BT[:, 1:]]

    def answer_hidden(self, model: Decoder) -> Tensor:
        """Last hidden states `[answers, D]` at the positions that predict `targets`."""
        h_BTD = model.hidden(self.ids_BT[:, :-1], valid_BT=self.valid_BT[:, :-1])
        return h_BTD[self.loss_BT[:, 1:]]


Loss = Callable[[Decoder, TrainBatch], tuple[Tensor, dict[str, float]]]


@dataclass
class Progress:
    """What a checkpoint carries besides weights."""

    step: int = 0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def to_tensors(examples: Sequence[Example], pad: int, device: torch.device) -> TrainBatch:
    b = collate(examples, pad)
    return TrainBatch(*(torch.from_numpy(a).to(device) for a in (b.ids, b.loss, b.valid)))


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
) -> Progress:
    """Train in place; returns the log. `state` is where the run's checkpoint lies until it is done."""
    device = next(model.parameters()).device
    opts = optimizers(model, settings.muon_lr, settings.adam_lr, settings.weight_decay, muon_steps=settings.muon_steps)
    done = _resume(state, fingerprint, model, opts)
    if settings.compile:
        for block in model.layers:
            block.compile(dynamic=True)
    stream = batches(epoch_examples, settings.batch_tokens, seed, first_step=done.step)
    began, saved = time.monotonic() - done.seconds, time.monotonic()
    model.train()
    with console.steps(label, settings.steps) as bar:
        while done.step < settings.steps:
            batch = to_tensors(next(stream), pad, device)
            entry = _step(model, batch, loss, opts, settings, done.step)
            done.step += 1
            done.tokens += int(batch.valid_BT.sum())
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


def _step(
    model: Decoder, batch: TrainBatch, loss: Loss, opts: list[torch.optim.Optimizer], s: TrainSettings, step: int
) -> dict[str, float]:
    """One update: forward, backward, clip, both optimizers. Returns what the loss reports, and the gradient's norm."""
    rate = schedule(step, s.steps, s.warmup_steps, s.final_lr)
    for o in opts:
        for group in o.param_groups:
            group["lr"] = group["peak_lr"] * rate
    device = batch.ids_BT.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        value, entry = loss(model, batch)
    if not torch.isfinite(value):
        raise GoriError(
            f"the loss became {value.item()} at step {step}: lower muon_lr {s.muon_lr} or adam_lr {s.adam_lr}"
        )
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
    for o in opts:
        o.step()
        o.zero_grad(set_to_none=True)
    return {**entry, "gradient_norm": round(float(norm), 4)}


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
    with os_errors(path):
        torch.save(body, tmp)
        os.replace(tmp, path)


def _resume(path: Path, fingerprint: str, model: Decoder, opts: list[torch.optim.Optimizer]) -> Progress:
    """Restore the run's checkpoint if it has one of the same fingerprint."""
    if not path.exists():
        return Progress()
    body = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    if body["fingerprint"] != fingerprint:
        console.log(f"{path.name} belongs to other settings or data: starting anew")
        return Progress()
    model.load_state_dict(body["model"])
    for o, state in zip(opts, body["optimizers"], strict=True):
        o.load_state_dict(state)
    done = Progress(**json.loads(body["progress"]))
    console.log(f"continuing at step {done.step}")
    return done
