"""Conversations from JSON Lines, checked with precise errors, and as token ids in length buckets.

The form is that of TRL and the OpenAI API. Loss is on what the assistant says. Knows nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gori.artifact import read_bytes
from gori.calls import ASSISTANT, END, SYSTEM, TOOL, USER, Call, CallError, Function, check_call, read_text, render
from gori.errors import GoriError
from gori.soft import Soft
from gori.tokenizer import Tokenizer

ROLES = {"user": USER, "system": SYSTEM, "assistant": ASSISTANT}
MARKS = {**ROLES, "tool": TOOL}
"""A conversation may also hold what a tool answered; no row of training does."""


@dataclass(frozen=True)
class Turn:
    """One message; an assistant's turn has either text or calls (an empty list: no function fits)."""

    role: str
    content: str | None
    calls: tuple[Call, ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant's turn."""

    turns: tuple[Turn, ...]

    @property
    def utterance(self) -> str:
        """The last thing that the user said."""
        return next((t.content or "" for t in reversed(self.turns) if t.role == "user"), "")

    @property
    def answer(self) -> Turn:
        return self.turns[-1]

    @property
    def language(self) -> str:
        """`ko` where the user's words hold Hangul, else `en`."""
        return "ko" if any("가" <= c <= "힣" for c in self.utterance) else "en"


@dataclass(frozen=True)
class Example:
    """A conversation as token ids; `loss[i]` says whether token i is to be predicted."""

    ids: list[int]
    loss: list[bool]
    soft: Soft | None = None
    """What a teacher said of each answer token, where it was cached."""


def read_conversations(path: Path, functions: Mapping[str, Function]) -> list[Conversation]:
    """All conversations of a JSON Lines file, each checked; the first bad line is refused with its place."""
    raw = read_bytes(path)
    if not raw.strip():
        raise GoriError(f"{path} is empty: expected one conversation a line")
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            rows.append(read_conversation(line, f"{path} line {number}", functions))
    return rows


def read_conversation(line: bytes, where: str, functions: Mapping[str, Function]) -> Conversation:
    """One line's conversation, checked; `where` begins the error that refuses it."""
    turns = _read_turns(line, where, functions)
    if turns[-1].role != "assistant":
        raise GoriError(
            f"{where} message {len(turns) - 1}: a row ends with the assistant's answer, got {turns[-1].role}"
        )
    return Conversation(turns)


def read_prompts(path: Path, functions: Mapping[str, Function]) -> list[Conversation]:
    """Conversations that nobody answered, each with an empty answer in the answer's place: lines of JSON whose messages
    end with the user's, or, of a file that is not named `.jsonl`, lines of text that a user said."""
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            line = json.dumps({"messages": [{"role": "user", "content": _decoded(line.strip(), where)}]}).encode()
        turns = _read_turns(line, where, functions)
        if turns[-1].role != "user":
            raise GoriError(
                f"{where}: the last message is of role {turns[-1].role}: an unlabelled row ends with a user's"
            )
        rows.append(Conversation((*turns, Turn("assistant", None, ()))))
    if not rows:
        raise GoriError(f"{path} is empty: expected one conversation, or one thing said, a line")
    return rows


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        column = len(line[: e.start].decode("utf-8")) + 1
        raise GoriError(f"{where} column {column}: byte 0x{line[e.start]:02x} is not UTF-8") from e


def _read_turns(line: bytes, where: str, functions: Mapping[str, Function]) -> tuple[Turn, ...]:
    text = _decoded(line, where)
    try:
        body = read_text(json.loads(text), where)
    except json.JSONDecodeError as e:
        raise GoriError(f"{where} column {e.colno}: not JSON ({e.msg})") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, endless nesting
        raise GoriError(f"{where} column 1: JSON that cannot be read ({e})") from e
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages:
        raise GoriError(f'{where} column 1: expected {{"messages": [...]}} with at least one message')
    return tuple(_turn(m, f"{where} message {i}", functions) for i, m in enumerate(messages))


def _turn(m: Any, where: str, functions: Mapping[str, Function]) -> Turn:
    role = m.get("role") if isinstance(m, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise GoriError(f"{where}: role {role!r}, expected one of {', '.join(ROLES)}")
    content, calls = m.get("content"), m.get("tool_calls")
    if content is not None and not isinstance(content, str):
        raise GoriError(f"{where}: content must be a string, got {type(content).__name__}")
    if role != "assistant":
        if not content:
            raise GoriError(f"{where}: a {role} message needs content")
        return Turn(role, content)
    if (content is None) == (calls is None):
        raise GoriError(f"{where}: an assistant's message has content or tool_calls, one of the two")
    if calls is None:
        if not content:
            raise GoriError(f"{where}: the assistant says nothing: give content, or an empty tool_calls list")
        return Turn(role, content)
    if not isinstance(calls, list):
        raise GoriError(f"{where}: tool_calls must be a list, got {type(calls).__name__}")
    return Turn(role, None, tuple(_call(c, f"{where} tool_calls[{i}]", functions) for i, c in enumerate(calls)))


def _call(c: Any, where: str, functions: Mapping[str, Function]) -> Call:
    f = c.get("function") if isinstance(c, dict) else None
    if not isinstance(f, dict) or not isinstance(f.get("name"), str):
        raise GoriError(f'{where}: expected {{"type": "function", "function": {{"name": …, "arguments": {{…}}}}}}')
    arguments = f.get("arguments", {})
    if isinstance(arguments, str):  # the OpenAI API sends arguments as a JSON string
        try:
            arguments = read_text(json.loads(arguments), where)
        except (ValueError, RecursionError) as e:
            raise GoriError(f"{where}: arguments are a string that is not JSON ({e})") from e
    if not isinstance(arguments, dict):
        raise GoriError(f"{where}: arguments must be an object, got {type(arguments).__name__}")
    call = Call(f["name"], arguments)
    try:
        check_call(call, functions)
    except CallError as e:
        raise GoriError(f"{where}: {e}") from e
    return call


def as_messages(c: Conversation) -> list[dict[str, Any]]:
    """The conversation as the dictionaries that a chat template takes."""
    out: list[dict[str, Any]] = []
    for t in c.turns:
        calls = {"tool_calls": [x.as_openai() for x in t.calls]} if t.calls is not None else {"content": t.content}
        out.append({"role": t.role, **calls})
    return out


def encode(c: Conversation, tokenizer: Tokenizer) -> Example:
    """Token ids of a conversation, the same as the chat template's text gives; special tokens that stand in a user's
    words are taken as plain text."""
    ids: list[int] = []
    loss: list[bool] = []
    for t in c.turns:
        answer = t.role == "assistant"
        said = tokenizer.encode(f" {t.content}") if t.calls is None else tokenizer.encode_markup(render(t.calls))
        piece = [tokenizer.id(MARKS[t.role]), *said, *([tokenizer.id(END)] if answer else [])]
        ids += piece
        loss += [False] + [answer] * (len(piece) - 1)
    return Example(ids, loss)


def prompt_ids(c: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Token ids up to and with the mark that opens the last assistant's turn."""
    before = encode(Conversation(c.turns[:-1]), tokenizer).ids if len(c.turns) > 1 else []
    return [*before, tokenizer.id(ASSISTANT)]


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and what to predict: `ids[:, :-1]` are inputs, `loss[:, 1:]` marks targets."""

    ids: np.ndarray
    """int64 [B, T]"""
    loss: np.ndarray
    """bool [B, T]"""
    valid: np.ndarray
    """bool [B, T], false at padding"""


def collate(examples: Sequence[Example], pad: int, width: int = 0) -> Batch:
    """Examples as a batch, at least `width` wide."""
    width = max(width, *(len(e.ids) for e in examples))
    ids = np.full((len(examples), width), pad, dtype=np.int64)
    loss = np.zeros(ids.shape, dtype=bool)
    valid = np.zeros(ids.shape, dtype=bool)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = e.ids
        loss[row, : len(e.ids)] = e.loss
        valid[row, : len(e.ids)] = True
    return Batch(ids, loss, valid)


def bucketed(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row indices of one epoch's batches: shuffled, sorted by length inside windows, each batch at most `batch_tokens`
    padded tokens, batches shuffled again. A pure function of its arguments, so a resumed run sees the same batches."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    size = np.asarray(lengths)
    batches: list[np.ndarray] = []
    window = max(1, 64 * batch_tokens // max(1, int(size.mean())))
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(size[rows], kind="stable")]
        batches += list(_cut(rows, size, batch_tokens))
    return [batches[i] for i in rng.permutation(len(batches))]


def _cut(rows: np.ndarray, size: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * size[rows[end]] > batch_tokens:
            yield rows[start:end]
            start = end


def batches(
    epoch_examples: Callable[[int], Sequence[Example]], batch_tokens: int, seed: int, first_step: int = 0
) -> Iterator[list[Example]]:
    """Endless batches, epoch after epoch, from step `first_step` on; `epoch_examples` gives an epoch's examples."""
    step, epoch = 0, 0
    while True:
        examples = epoch_examples(epoch)
        for rows in bucketed([len(e.ids) for e in examples], batch_tokens, seed, epoch):
            if step >= first_step:
                yield [examples[i] for i in rows]
            step += 1
        epoch += 1
