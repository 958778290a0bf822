"""Requests that nobody labelled, answered by the teacher: an `answers` directory with the rows whose answer is valid.

A teacher knows of such requests what labels would have said (and its own mistakes). Knows nothing of the student.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from gori import checkpoint, console, evaluate
from gori.artifact import Manifest, ancestry, content_hash, make
from gori.calls import END, CallError, Function, parse
from gori.corpus import Corpus
from gori.data import Conversation, Turn, as_messages, encode, prompt_ids, read_conversations, read_prompts
from gori.distill.on_policy import sampled
from gori.errors import GoriError
from gori.model import Decoder
from gori.recipe import Unlabelled
from gori.teacher.stage import device
from gori.tokenizer import Tokenizer

Row = TypeVar("Row")
BATCH = 64
ROWS = "answers.jsonl"
NO_TEXT = "\ufffd"
"""What a tokenizer writes for bytes that are not UTF-8."""


def prompts(
    section: Unlabelled, functions: Mapping[str, Function], tokenizer: Tokenizer, context: int
) -> list[Conversation]:
    """Every request; one that leaves no room for an answer in `context` tokens is refused."""
    found = []
    for f in section.files:
        rows = read_prompts(Path(f), functions)
        for number, c in enumerate(rows, 1):
            if (tokens := len(prompt_ids(c, tokenizer))) >= context:
                raise GoriError(
                    f"{f}: request {number} has {tokens} tokens and max_position is {context}: shorten the one that "
                    f"begins {c.utterance[:40]!r}, or raise max_position"
                )
        found += rows
    return found


def hashes(section: Unlabelled) -> dict[str, str]:
    return {f"unlabelled/{i}": content_hash(Path(f)) for i, f in enumerate(section.files)}


def write_answers(
    section: Unlabelled, teacher_dir: Path, tokenizer_dir: Path, corpus: Corpus, seed: int, out: Path
) -> bool:
    """Let the teacher answer every request into `out`; returns whether it ran. An answer that is no valid call of the
    corpus' functions is left out and counted."""
    inputs = {"tools": content_hash(corpus.files["tools"]), **hashes(section)}
    inputs |= {"tokenizer": content_hash(tokenizer_dir), "teacher": content_hash(teacher_dir)}
    settings = section.model_dump(include={"temperature"})
    seed = seed if section.temperature else 0  # the likeliest answers are the same for every seed
    manifest = Manifest("answers", "answers", seed, settings, inputs)
    manifest.lineage = ancestry({"tokenizer": tokenizer_dir, "teacher": teacher_dir})

    def build(tmp: Path) -> None:
        tokenizer, teacher = Tokenizer.load(tokenizer_dir), checkpoint.load(teacher_dir).eval().to(device())
        rows = prompts(section, corpus.functions, tokenizer, teacher.cfg.max_position)
        console.log(f"the teacher answers {len(rows):,} requests")
        texts = answers(teacher, rows, tokenizer, section.temperature, seed)
        found = [answered(c, text, corpus.functions) for c, text in zip(rows, texts, strict=True)]
        valid = [c for c in found if c is not None]
        if not valid:
            raise GoriError(
                f"none of the teacher's {len(rows)} answers is a valid call, the first is {texts[0][:80]!r}"
            )
        lines = (json.dumps({"messages": as_messages(c)}, ensure_ascii=False) + "\n" for c in valid)
        (tmp / ROWS).write_text("".join(lines), encoding="utf-8")
        manifest.metrics |= {"requests": len(rows), "valid": len(valid), "refused": len(rows) - len(valid)}

    return make(out, manifest, build)


def answers(
    teacher: Decoder, rows: Sequence[Conversation], tokenizer: Tokenizer, temperature: float, seed: int
) -> list[str]:
    """What the teacher says to each row: its likeliest answers at temperature 0, else drawn ones."""
    ids, end = [prompt_ids(c, tokenizer) for c in rows], tokenizer.id(END)
    if not temperature:
        return [tokenizer.decode(a) for a in evaluate.batched(teacher, end, BATCH)(ids)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [""] * len(ids)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        drawn = sampled(teacher, [ids[i] for i in some], end, temperature, seed + start, evaluate.MAX_NEW_TOKENS)
        for i, a in zip(some, drawn, strict=True):
            found[i] = tokenizer.decode(a[:-1] if a[-1] == end else a)
    return found


def answered(c: Conversation, text: str, functions: Mapping[str, Function]) -> Conversation | None:
    """The row with an answer's text as its calls; None where they are not valid, or hold bytes that are no text."""
    if NO_TEXT in text and NO_TEXT not in c.utterance:
        return None
    try:
        calls = tuple(parse(text, functions))
    except CallError:
        return None
    return Conversation((*c.turns[:-1], Turn("assistant", None, calls)))


def read_answers(directory: Path, corpus: Corpus, tokenizer: Tokenizer, room: int) -> tuple[list[Conversation], int]:
    """The answered rows that a student of `room` tokens can read, and how many it cannot."""
    rows = read_conversations(directory / ROWS, corpus.functions)
    fitting = [c for c in rows if len(encode(c, tokenizer).ids) <= room]
    if not fitting:
        raise GoriError(f"none of the {len(rows)} answered requests fits student.max_position {room}: raise it")
    return fitting, len(rows) - len(fitting)


def mixed(labelled: Sequence[Row], more: Sequence[Row], share: float) -> list[Row]:
    """Both one after the other, `more` with `share` of all; the side that is too small is repeated in turn."""
    a, b = len(labelled), len(more)
    if b < share * (a + b):
        b = max(b, round(a * share / (1 - share)))
    else:
        a = max(a, round(b * (1 - share) / share))
    return [*(labelled[i % len(labelled)] for i in range(a)), *(more[i % len(more)] for i in range(b))]
