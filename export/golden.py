"""Golden inputs and outputs that travel in an artifact, so that another machine can check it with its engine alone.

For each prompt the likeliest tokens of the reference (the eager model of the same integers) after its last token and
after some that are decoded one by one, and for utterances in Korean and English its greedy answer. NumPy alone:
`gori verify` reads this without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.artifact import read_object, write_json
from gori.errors import GoriError
from gori.runtime.generate import generate
from gori.runtime.session import Session
from gori.targets import Target, named
from gori.tokenizer import Tokenizer

FILE = "golden.json"
VERSION = 2
KEPT = 64
"""Tokens of each distribution that are kept; all others are one event."""
DECODED = 3
"""Tokens of each prompt that are decoded one by one, after a prefill of its first half."""
SAME = 0.9
"""Share of the golden answers that an engine gave at home which it must give again: on another processor a last place
may differ, and a random model's choices are close."""
DIGITS = 6
"""Of a log-probability in the file."""
LONGEST_ANSWER = 48
UTTERANCES = (
    "에어컨 좀 켜 줘", "조수석 창문 반만 열어 줘", "서울역까지 길 안내해 줘", "엄마한테 전화 걸어 줘",
    "실내 온도 23도로 맞추고 라디오 꺼 줘", "오늘 하늘이 왜 이렇게 파랄까?",
    "turn on the air conditioning", "open the passenger window halfway", "navigate to Central Park",
    "call my mother", "set it to 23 degrees and turn off the radio", "why is the sky so blue today?",
)  # fmt: skip
"""What is said to every exported model besides random tokens."""


@dataclass(frozen=True)
class Golden:
    """The content of golden.json."""

    prompts: list[list[int]]
    top: NDArray[np.int64]
    """`[rows, KEPT]` token ids, the likeliest first; a prompt has a row for each of its `positions`."""
    log_p: NDArray[np.float64]
    """`[rows, KEPT]` their log-probabilities."""
    kl_bound: float
    """What an engine's mean KL over these may be, in nats."""
    same_answers: int
    """Of the answers, how many the engine gave when the artifact was made."""
    answers: list[dict[str, Any]]
    """`{"text", "prompt": ids, "answer": ids}` of each utterance."""


def utterance_prompts(directory: Path, longest: int) -> dict[str, list[int]]:
    """Utterance → token ids as this checkpoint's tokenizer gives them, in the turns of gori's template where it has
    those; utterances of more than `longest` tokens, and folders without a tokenizer, have none."""
    from gori.calls import ASSISTANT
    from gori.data import Conversation, Turn, prompt_ids

    if not (directory / "tokenizer.json").exists():
        return {}
    tokenizer = Tokenizer.load(directory)
    found = {}
    for text in UTTERANCES:
        if tokenizer.has(ASSISTANT):
            ids = prompt_ids(Conversation((Turn("user", text), Turn("assistant", None, ()))), tokenizer)
        else:
            ids = tokenizer.encode(text)
        if 0 < len(ids) <= longest:
            found[text] = ids
    return found


def greedy(session: Session, prompt: Sequence[int], end: Sequence[int]) -> list[int]:
    """The session's greedy answer to a prompt, from an empty history."""
    session.reset()
    room = min(LONGEST_ANSWER, session.info.context - len(prompt))
    return list(generate(session, prompt, end, max_new=room)) if room > 0 else []


def positions(length: int, decoded: int = DECODED) -> list[int]:
    """Positions of a prompt that are compared: those decoded after the first half, and the last."""
    half = (length + 1) // 2
    return sorted({*range(half - 1, min(half + decoded, length)), length - 1})


def logits(session: Session, prompt: Sequence[int], decoded: int = DECODED) -> NDArray[np.float32]:
    """An engine's logits `[N, V]` at `positions` of a prompt: a prefill of half, single tokens after it, and a prefill
    of the whole."""
    half = (len(prompt) + 1) // 2
    session.reset()
    whole = session.prefill(prompt)
    session.reset()
    rows = {half - 1: session.prefill(prompt[:half])}
    for i in range(half, min(half + decoded, len(prompt))):
        rows[i] = session.decode(prompt[i])
    rows[len(prompt) - 1] = whole
    return np.stack([rows[i] for i in positions(len(prompt), decoded)])


def distributions(logits_NV: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The KEPT likeliest tokens of each row of logits and their log-probabilities."""
    log_p = log_softmax(logits_NV)
    top = np.argsort(-log_p, axis=-1, kind="stable")[:, :KEPT]
    return top, np.take_along_axis(log_p, top, -1)


def log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Along the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(golden_log_p: NDArray[np.float64], log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(golden ‖ other) in nats of each row over the kept tokens and one event for all others: at most the KL over the
    whole vocabulary (data processing inequality)."""
    p, q = np.exp(golden_log_p), np.exp(log_p)
    rest_p, rest_q = np.clip(1 - p.sum(-1), 1e-12, 1), np.clip(1 - q.sum(-1), 1e-12, 1)
    return np.maximum((p * (golden_log_p - log_p)).sum(-1) + rest_p * (np.log(rest_p) - np.log(rest_q)), 0)


def write(golden: Golden, directory: Path) -> None:
    """golden.json: prompts, distributions, answers."""
    body = {
        "schema_version": VERSION,
        "kl_bound": golden.kl_bound,
        "same_answers": golden.same_answers,
        "prompts": golden.prompts,
        "top": golden.top.tolist(),
        "log_p": np.round(golden.log_p, DIGITS).tolist(),
        "answers": golden.answers,
    }
    write_json(directory / FILE, body)


def read(directory: Path) -> Golden:
    """golden.json of an artifact; one of another version or shape is refused."""
    path = directory / FILE
    body = read_object(path)
    if body.get("schema_version") != VERSION:
        raise GoriError(f"{path} has version {body.get('schema_version')}, this gori reads {VERSION}: export again")
    try:
        golden = Golden(
            [_ids(p) for p in body["prompts"]],
            np.array(body["top"], dtype=np.int64),
            np.array(body["log_p"], dtype=np.float64),
            float(body["kl_bound"]),
            int(body["same_answers"]),
            [{"text": str(a["text"]), "prompt": _ids(a["prompt"]), "answer": _ids(a["answer"])}
             for a in body["answers"]],
        )  # fmt: skip
        rows = sum(len(positions(len(p))) for p in golden.prompts)
        if not rows or golden.top.ndim != 2 or golden.top.shape != golden.log_p.shape or len(golden.top) != rows:
            raise ValueError(f"{len(golden.top)} rows for {rows} positions")
        if not np.isfinite(golden.log_p).all() or golden.top.min() < 0:
            raise ValueError("no distributions")
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise GoriError(f"{path} does not have the fields of golden outputs ({e}): export again") from e
    return golden


def _ids(found: Any) -> list[int]:
    if not all(type(i) is int for i in found):
        raise ValueError(f"{found!r:.40} is no list of token ids")
    return list(found)


def second_engine(target: Target, directory: Path, answers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the engine of a target's second file gives of the golden answers; None where there is no such file."""
    if target.second is None or not (directory / target.second[0]).exists():
        return None
    return named(target.second[1])(directory, answers, LONGEST_ANSWER)


def agrees(second: dict[str, Any] | None) -> bool:
    """Whether a second engine gives enough of the golden answers; one that is not there does not disagree."""
    return second is None or second["same_answers"] >= SAME * second["answers"]


@dataclass(frozen=True)
class Check:
    """How an engine did on golden inputs."""

    kl_mean: float
    kl_max: float
    kl_bound: float
    top1: float
    same_answers: int
    same_at_home: int
    answers: int

    @property
    def met(self) -> bool:
        return self.kl_mean <= self.kl_bound and self.same_answers >= int(SAME * self.same_at_home)


def check(session: Session, golden: Golden) -> Check:
    """Run the prompts and utterances in an engine and compare with what travelled."""
    if golden.top.max() >= session.info.vocab_size:
        raise GoriError(f"golden outputs name token {golden.top.max()}, the vocabulary is {session.info.vocab_size}")
    rows = np.concatenate([logits(session, p) for p in golden.prompts])
    kl = divergence(golden.log_p, np.take_along_axis(log_softmax(rows), golden.top, -1))
    end = session.info.eos_ids
    same = sum(greedy(session, a["prompt"], end) == a["answer"] for a in golden.answers)
    top1 = float((rows.argmax(-1) == golden.top[:, 0]).mean())
    return Check(
        float(kl.mean()), float(kl.max()), golden.kl_bound, top1, same, golden.same_answers, len(golden.answers)
    )
