"""What an imported teacher writes itself: greedy answers in its own chat template, read back as turns of gori's.

Such answers are the labels of sequence-level distillation (Kim and Rush, arXiv 1606.07947), which needs nothing of the
teacher's tokens, and what the teacher is evaluated by. Knows nothing of caches' files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gori import evaluate
from gori.calls import Call, CallError, Function, check_call, same_calls
from gori.data import Conversation, Example, Turn, encode
from gori.evaluate import Scored
from gori.soft import Soft
from gori.teacher.foreign import ForeignTeacher, check_length, open_foreign
from gori.teacher.foreign_recipe import speaks_gori
from gori.teacher.foreign_rows import definitions, messages, rendered
from gori.tokenizer import Tokenizer

MAX_NEW_TOKENS = 192
"""JSON takes about twice the tokens of gori's own calls."""
BATCH_TOKENS = 4096
THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


@torch.inference_mode()
def greedy(teacher: ForeignTeacher, prompts: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Greedy continuations up to and without the end mark; prompts of similar length share a batch of at most
    `batch_tokens`, answers included."""
    from transformers import GenerationConfig

    end = teacher.model.generation_config.eos_token_id or teacher.tokenizer.eos_token_id
    ends: list[int] = end if isinstance(end, list) else [end]
    pad = ends[0] if teacher.tokenizer.pad_token_id is None else teacher.tokenizer.pad_token_id
    how = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=ends, pad_token_id=pad)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    while order:
        width = len(prompts[order[0]])
        most = max(1, batch_tokens // (width + MAX_NEW_TOKENS))
        some, order = order[:most], order[most:]
        ids, valid = torch.full((len(some), width), pad), torch.zeros(len(some), width, dtype=torch.long)
        for n, i in enumerate(some):  # the left is padded: answers follow the prompts' last tokens
            ids[n, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            valid[n, width - len(prompts[i]) :] = 1
        given = {"input_ids": ids.to(teacher.device), "attention_mask": valid.to(teacher.device)}
        said = teacher.model.generate(**given, generation_config=how)[:, width:].tolist()
        for i, answer in zip(some, said, strict=True):
            out[i] = answer[: next((n for n, t in enumerate(answer) if t in ends), len(answer))]
    return out


def texts(
    teacher: ForeignTeacher, rows: Sequence[Conversation], functions: Mapping[str, Function], batch_tokens: int
) -> list[str]:
    """The teacher's greedy answer to each row's turns but the last, special tokens left out."""
    tokenizer, tools = teacher.tokenizer, definitions(functions)
    asked = [rendered(tokenizer, messages(c)[:-1], tools, ask=True) for c in rows]
    prompts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in asked]
    for c, p in zip(rows, prompts, strict=True):
        check_length(teacher, len(p) + MAX_NEW_TOKENS, c.utterance)
    said = greedy(teacher, prompts, batch_tokens)
    return [str(t) for t in tokenizer.batch_decode(said, skip_special_tokens=True)]


def read_answer(text: str, functions: Mapping[str, Function], calls_wanted: bool) -> Turn | None:
    """An answer as a turn: its calls, wherever the template puts their JSON (`name` with `arguments` or `parameters`);
    words alone are an answer in words, or no call where `calls_wanted`. None: empty, or not a call of these functions.
    """
    text = THOUGHT.sub("", text).strip()
    found = [o for o in _objects(text) if isinstance(o.get("name"), str) and ("arguments" in o or "parameters" in o)]
    if not found:
        if not text:
            return None
        return Turn("assistant", None, ()) if calls_wanted else Turn("assistant", text)
    calls = []
    for o in found:
        arguments = o.get("arguments", o.get("parameters"))
        call = Call(o["name"], arguments if isinstance(arguments, dict) else {"": arguments})
        try:
            check_call(call, functions)
        except CallError:
            return None
        calls.append(call)
    return Turn("assistant", None, tuple(calls))


def _objects(text: str) -> list[dict[str, Any]]:
    """The outermost JSON objects of a text, in order."""
    found, at, decoder = [], 0, json.JSONDecoder()
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def written(
    teacher: ForeignTeacher,
    rows: Sequence[tuple[Conversation, Example]],
    tokenizer: Tokenizer,
    functions: Mapping[str, Function],
    batch_tokens: int,
) -> tuple[list[Example], dict[str, float]]:
    """Rows whose last answer is the teacher's, as hard labels; where that cannot be read, or is too long, the row's own
    stands, and how many those are is told."""
    said = texts(teacher, [c for c, _ in rows], functions, batch_tokens)
    out, kept = [], 0
    longest = max(len(e.ids) for _, e in rows)
    for (c, e), text in zip(rows, said, strict=True):
        turn = read_answer(text, functions, c.answer.calls is not None)
        new = encode(Conversation((*c.turns[:-1], turn)), tokenizer) if turn else e
        if turn is None or len(new.ids) > longest:
            new, kept = e, kept + 1
        ids = np.asarray(new.ids, np.int32)[np.asarray(new.loss)].reshape(-1, 1)
        out.append(Example(new.ids, new.loss, Soft(ids, np.ones(ids.shape, np.float32))))
    return out, {"rows_from_truth": float(kept)}


def answer_all(
    directory: Path, tests: Mapping[str, Sequence[Conversation]], functions: Mapping[str, Function]
) -> list[tuple[str, Scored]]:
    """(split, answer) of every test row: an imported teacher's, in its own template, or in gori's markup where its
    tokenizer has it."""
    teacher, out = open_foreign(directory), []
    own = Tokenizer.load(directory) if speaks_gori(directory) else None
    for split, rows in tests.items():
        if own:
            generate = partial(greedy, teacher, batch_tokens=BATCH_TOKENS)
            found = evaluate.score(rows, generate, own, functions)
        else:
            said = texts(teacher, rows, functions, BATCH_TOKENS)
            found = [_scored(c, text, functions) for c, text in zip(rows, said, strict=True)]
        out += [(split, s) for s in found]
    return out


def _scored(c: Conversation, text: str, functions: Mapping[str, Function]) -> Scored:
    turn, wanted = read_answer(text, functions, c.answer.calls is not None), c.answer
    if wanted.calls is None:
        return Scored(c, text, None, turn is not None and turn.content == (wanted.content or "").strip())
    calls = turn.calls if turn else None
    return Scored(c, text, calls, calls is not None and same_calls(calls, wanted.calls))
