"""Answers that a student draws itself, to be compared with its teacher at what it would really say (GKD, arXiv
2306.13649). Knows nothing of losses. Draws are a pure function of the generator's seed.

Shapes in names: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gori.data import Example
from gori.model import Decoder, KVCache


def chosen(share: float, start: float, progress: float, seed: int) -> bool:
    """Whether the step at this progress is one of the `share` of those after `start` whose answers are sampled; the
    same on every thread and rank, and in a resumed run."""
    return progress >= start and np.random.default_rng([seed, round(progress * 2**40)]).random() < share


def prompts_of(ids_BT: Tensor, loss_BT: Tensor, valid_BT: Tensor) -> list[list[int]]:
    """Each row up to its last answer: what stands before the last run of tokens that are predicted. Of a row that
    counts for nothing (a rank without rows computes one) the first token."""
    found = []
    for ids, loss, length in zip(ids_BT.tolist(), loss_BT.tolist(), valid_BT.sum(1).tolist(), strict=True):
        end = max((i for i in range(length) if loss[i]), default=0) + 1
        while loss[end - 1] and end > 1:
            end -= 1
        found.append(ids[:end])
    return found


def near(prompts: Sequence[list[int]], count: int, seed: int) -> list[list[int]]:
    """`count` prompts of nearly one length, so that none waits for another: neighbours of a random one where they are
    sorted by length. Fewer where there are fewer."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    at = int(np.random.default_rng([seed, 31]).integers(max(1, len(order) - count + 1)))
    return [prompts[i] for i in order[at : at + count]]


@torch.no_grad()
def sampled(
    model: Decoder, prompts: Sequence[list[int]], end: int, temperature: float, seed: int, longest: int
) -> list[list[int]]:
    """An answer to each prompt, drawn token by token at `temperature`, its end mark included if it came within
    `longest` tokens and the model's context. One batch: rows with a longer prompt go on reading it while others answer,
    so nothing is padded. Every prompt must be shorter than the context.
    """
    device, was_training = model.rope_freq.device, model.training
    noise = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    room = torch.clamp(lengths + longest, max=model.cfg.max_position)
    width = int(room.max())
    ids = torch.full((len(prompts), width), end, device=device)
    for row, p in enumerate(prompts):
        ids[row, : len(p)] = torch.tensor(p, device=device)
    cache = KVCache(model.cfg, len(prompts), width)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    read, at = 0, int(lengths.min())
    model.eval()  # dropout is the loss's
    with torch.autocast(device.type, enabled=False):  # in the weights' own type
        while at < width and not bool(ended.all()):
            logits = model.logits(model.hidden(ids[:, read:at], cache)[:, -1])
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=noise).squeeze(1)
            speaking = (lengths <= at) & ~ended
            ids[:, at] = torch.where(speaking, drawn, ids[:, at])
            read, at = at, at + 1
            ended |= (speaking & (drawn == end)) | (room <= at)
    model.train(was_training)
    answers = [row[len(p) : stop] for row, p, stop in zip(ids.tolist(), prompts, room.tolist(), strict=True)]
    return [a[: a.index(end) + 1] if end in a else a for a in answers]


def examples(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Example]:
    """Rows whose answers are to be predicted."""
    return [Example([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in zip(prompts, answers, strict=True)]
