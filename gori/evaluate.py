"""Exact call match per language, by really generating; the same code for a checkpoint and for an artifact.

A model is what turns prompts into answers: `batched` makes one of a decoder, `one_by_one` of a Session.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gori.calls import Call, CallError, Function, parse, same_calls
from gori.data import Conversation, prompt_ids
from gori.errors import GoriError
from gori.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gori.model import Decoder

MAX_NEW_TOKENS = 96
Generate = Callable[[Sequence[list[int]]], list[list[int]]]
"""Prompts → greedy answers, end mark left out."""


class Engine(Protocol):
    """What of a Session an evaluation needs."""

    def reset(self) -> None: ...
    def prefill(self, ids: Sequence[int]) -> np.ndarray: ...
    def decode(self, token: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Scored:
    """One test row, what the model said to it, and whether that is the wanted answer."""

    conversation: Conversation
    text: str
    calls: tuple[Call, ...] | None
    """None where the answer does not parse, or where text was wanted."""
    exact: bool


def batched(model: Decoder, end: int, batch: int = 64) -> Generate:
    """Greedy answers of an eager decoder; prompts of one length share a batch, so that nothing is padded."""
    import torch

    from gori.model import KVCache

    @torch.inference_mode()
    def run(prompts: Sequence[list[int]]) -> list[list[int]]:
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, p in enumerate(prompts):
            by_length[len(p)].append(i)
        answers: list[list[int]] = [[] for _ in prompts]
        device = model.rope_freq.device
        for length, rows in by_length.items():
            if length > model.cfg.max_position:
                context = model.cfg.max_position
                raise GoriError(f"a prompt of {length} tokens exceeds the context of {context}: shorten it")
            for start in range(0, len(rows), batch):
                some = rows[start : start + batch]
                room = min(MAX_NEW_TOKENS, model.cfg.max_position - length)
                cache = KVCache(model.cfg, len(some), length + room)
                ids = torch.tensor([prompts[i] for i in some], device=device)
                for i, answer in zip(some, _greedy(ids, cache, room), strict=True):
                    answers[i] = answer
        return answers

    def _greedy(ids_BT: torch.Tensor, cache: KVCache, room: int) -> list[list[int]]:
        said: list[torch.Tensor] = []
        alive = torch.ones(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        while len(said) < room and alive.any():
            next_B = model.logits(model.hidden(ids_BT, cache)[:, -1]).argmax(-1)
            said.append(next_B)
            alive &= next_B != end
            ids_BT = next_B.unsqueeze(1)
        rows = torch.stack(said, dim=1).tolist() if said else [[] for _ in ids_BT]
        return [row[: row.index(end)] if end in row else row for row in rows]

    return run


def one_by_one(engine: Engine, end: int, context: int) -> Generate:
    """Greedy answers of a Session, one prompt after the other."""

    def run(prompts: Sequence[list[int]]) -> list[list[int]]:
        return [_answer(engine, p, end, min(MAX_NEW_TOKENS, context - len(p))) for p in prompts]

    return run


def _answer(engine: Engine, prompt: list[int], end: int, room: int) -> list[int]:
    engine.reset()
    token, said = int(engine.prefill(prompt).argmax()), []
    while token != end and len(said) < room:
        said.append(token)
        token = int(engine.decode(token).argmax())
    return said


def score(
    rows: Sequence[Conversation], generate: Generate, tokenizer: Tokenizer, functions: Mapping[str, Function]
) -> list[Scored]:
    """Generate an answer to each row and compare it with the wanted one."""
    answers = generate([prompt_ids(c, tokenizer) for c in rows])
    return [_score_row(c, tokenizer.decode(a), functions) for c, a in zip(rows, answers, strict=True)]


def _score_row(c: Conversation, text: str, functions: Mapping[str, Function]) -> Scored:
    wanted = c.answer
    if wanted.calls is None:
        return Scored(c, text, None, text.removeprefix(" ") == wanted.content)
    try:
        calls = tuple(parse(text, functions))
    except CallError:
        return Scored(c, text, None, False)
    return Scored(c, text, calls, same_calls(calls, wanted.calls))


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """`{"exact", "n", "ko", "en"}`: shares of exact rows, a language's share only where it has rows."""
    out: dict[str, Any] = {"exact": _share(scored), "n": len(scored)}
    for language in ("ko", "en"):
        rows = [s for s in scored if s.conversation.language == language]
        if rows:
            out[language] = _share(rows)
    return out


def _share(rows: Sequence[Scored]) -> float:
    return sum(s.exact for s in rows) / len(rows) if rows else 0.0


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log-probabilities `[…, V]` of logits, in float64."""
    y = x.astype(np.float64)
    y -= y.max(-1, keepdims=True)
    return y - np.log(np.exp(y).sum(-1, keepdims=True))
