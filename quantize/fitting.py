"""The loop that tune and qat share: a student with rounded weights learns to say what its float teacher says.

Minimises KL(teacher || student) at the positions where something is to be said (Hinton et al., arXiv 1503.02531), and
keeps the best that a held-out tenth of the rows has seen. Knows nothing of how weights are rounded.
Shapes in names: B rows, T tokens, N answer positions, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gori import console
from gori.data import bucketed
from gori.distill.losses import distillation_loss
from gori.errors import GoriError
from gori.model import Decoder
from gori.quantize.blocks import Kept
from gori.quantize.calibration import Batch, answer_hidden
from gori.quantize.fake import FakeLinear, FakeTable, Weight, floats, forget
from gori.quantized import QuantizedTensor
from gori.teacher.optim import schedule

HELD_SHARE = 0.1
"""Of the rows: they are never learned from, and decide which step is the best."""
BETAS, EPSILON = (0.9, 0.98), 1e-10
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Trained:
    """What a training leaves: integers and portable scales, and the norms and biases that learned along."""

    tensors: dict[str, QuantizedTensor]
    floats: dict[str, Tensor]
    """Parameter name of the decoder → float32 vector."""
    log: list[dict[str, float]] = field(default_factory=list)
    """`step`, `kl` (nats an answer token, of the held-out rows), `loss` (of the rows since the entry before)."""

    def settle(self, model: Decoder) -> Decoder:
        """Put the trained norms and biases into a float decoder, in place; returns it. Its matrices are not touched."""
        for name, value in self.floats.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value.clone(), requires_grad=False))
        return model


class Picked(NamedTuple):
    """Some rows of a calibration set, padded at the right to the longest of them, and what the teacher computed."""

    ids_BT: Tensor
    answer_BT: Tensor
    teacher_ND: Tensor


class Rows:
    """A calibration set row by row, with the teacher's hidden states at the answers: computed once, and kept in memory
    or mapped files (float32, `4 D` bytes an answer token)."""

    def __init__(self, teacher: Decoder, batches: Sequence[Batch], place: Kept) -> None:
        self._batches = batches
        self._hidden = [place.keep(answer_hidden(teacher, b)) for b in batches]
        self.head_VD = teacher.head_weight.detach()
        answers = [b.answer_BT.sum(1).tolist() for b in batches]
        self._where = [
            (i, row, sum(counts[:row]), counts[row]) for i, counts in enumerate(answers) for row in range(len(counts))
        ]
        self.lengths = [int(n) for b in batches for n in b.valid_BT.sum(1)]

    def __len__(self) -> int:
        return len(self._where)

    def pick(self, rows: Sequence[int] | np.ndarray) -> Picked:
        """Some rows by number, together."""
        width = max(self.lengths[r] for r in rows)
        ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        answer_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        hidden = []
        for k, r in enumerate(rows):
            i, row, first, count = self._where[r]
            n = self.lengths[r]
            ids_BT[k, :n] = self._batches[i].ids_BT[row, :n]
            answer_BT[k, :n] = self._batches[i].answer_BT[row, :n]
            hidden.append(self._hidden[i][first : first + count])
        return Picked(ids_BT, answer_BT, torch.cat(hidden))

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the rows to learn from and of the held-out ones."""
        if len(self) < 2:
            raise GoriError(f"{len(self)} calibration row: training needs 2 at least, one of them held out; give more")
        order = np.random.default_rng([seed, 577]).permutation(len(self))
        held = max(1, round(HELD_SHARE * len(self)))
        return np.sort(order[held:]), np.sort(order[:held])


def divergence(student: Decoder, rows: Rows, some: Picked, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats, the mean over the answers of some rows."""
    hidden_ND = student.hidden(some.ids_BT, wanted_BT=some.answer_BT)
    head = student.head
    if isinstance(head, (FakeLinear, FakeTable)):
        hidden_ND = head.rounded(hidden_ND)
    none = torch.zeros(len(hidden_ND), dtype=torch.int64)
    teacher = (some.teacher_ND, rows.head_VD)
    return distillation_loss(hidden_ND, student.head_weight, *teacher, none, {"forward_kl": 1.0}, temperature)[0]


@torch.no_grad()
def held_out_kl(student: Decoder, rows: Rows, parts: Sequence[np.ndarray]) -> float:
    """The mean over all answers of the held-out rows."""
    total = count = 0
    for part in parts:
        some = rows.pick(part)
        total += float(divergence(student, rows, some)) * len(some.teacher_ND)
        count += len(some.teacher_ND)
    forget(student)
    return total / count


class Adam:
    """Adam (arXiv 1412.6980) of one parameter, applied as soon as its gradient is there and freeing it: no two
    parameters' gradients exist at once. Moments lie in memory or in mapped files."""

    def __init__(self, p: nn.Parameter, lr: float, place: Kept) -> None:
        self.p, self.lr, self.share, self._steps = p, lr, 0.0, 0
        self._mean, self._square = place.keep(torch.zeros_like(p)), place.keep(torch.zeros_like(p))
        self._hook = p.register_post_accumulate_grad_hook(self.step)

    @torch.no_grad()
    def step(self, p: Any) -> None:
        """One update at `share` of the peak rate; the gradient is gone afterwards."""
        self._steps += 1
        self._mean.lerp_(p.grad, 1 - BETAS[0])
        self._square.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
        spread = (self._square / (1 - BETAS[1] ** self._steps)).sqrt_().add_(EPSILON)
        p.addcdiv_(self._mean, spread, value=-self.lr * self.share / (1 - BETAS[0] ** self._steps))
        p.grad = None

    def release(self) -> None:
        """Let the parameter be as it was."""
        self._hook.remove()


def rates(student: Decoder, lr: float, latent_lr: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Each parameter that learns and its peak rate: latents in units of their scale, scales by a share of themselves,
    norms and biases by a share of their root mean square."""
    for name, p in student.named_parameters():
        if not p.requires_grad:
            continue
        if name.endswith(".w_OI"):
            yield p, latent_lr
        elif name.endswith(".log_OG"):
            yield p, lr
        else:
            yield p, lr * max(float(p.detach().square().mean().sqrt()), 1e-3)


def fit(
    student: Decoder,
    weights: dict[str, Weight],
    rows: Rows,
    place: Kept,
    *,
    epochs: int,
    lr: float,
    latent_lr: float,
    step_tokens: int,
    temperature: float,
    seed: int,
    label: str,
) -> Trained:
    """Train a student of fake.student and return the best of its start and its epochs' ends, by the held-out KL.

    `step_tokens` bounds a step's padded tokens. Rates rise over a twentieth of the steps and fall as a cosine. The best
    is kept as int8 integers, scales and vectors.
    """
    learn, held = rows.split(seed)
    parts = [held[at] for at in bucketed([rows.lengths[r] for r in held], 4 * step_tokens, 0, 0)]
    plan = [bucketed([rows.lengths[r] for r in learn], step_tokens, seed, e) for e in range(epochs)]
    total, step = sum(map(len, plan)), 0
    optimisers = [Adam(p, rate, place) for p, rate in rates(student, lr, latent_lr)]
    best = snapshot(student, weights)
    log = [{"step": 0.0, "kl": held_out_kl(student, rows, parts)}]
    with console.steps(label, total) as bar:
        for epoch in plan:
            loss = 0.0
            for at in epoch:
                share = schedule(step, total, round(WARMUP_SHARE * total), 0.0)
                loss += _step(student, weights, optimisers, rows, learn[at], share, temperature) / len(epoch)
                step += 1
                bar.update(step, f"kl {log[-1]['kl']:.4f}")
            kl = held_out_kl(student, rows, parts)
            if kl < min(entry["kl"] for entry in log):
                best = snapshot(student, weights)
            log.append({"step": float(step), "kl": kl, "loss": loss})
    for o in optimisers:
        o.release()
    return Trained(*best, log)


def _step(
    student: Decoder,
    weights: dict[str, Weight],
    optimisers: list[Adam],
    rows: Rows,
    at: np.ndarray,
    share: float,
    temperature: float,
) -> float:
    for o in optimisers:
        o.share = share
    loss = divergence(student, rows, rows.pick(at), temperature)
    loss.backward()
    forget(student)
    for w in weights.values():
        w.project()
    return float(loss.detach())


def snapshot(student: Decoder, weights: dict[str, Weight]) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """What the student computes with, as it is now."""
    return {n: w.tensor() for n, w in weights.items()}, floats(student)
