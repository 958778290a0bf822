"""Answers of a checkpoint folder or an artifact to test rows, by one code: `gori eval` and the pipeline's table.

A checkpoint answers in batches in eager torch, an artifact one by one in its own engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gori import console, evaluate
from gori.artifact import read_object
from gori.calls import Call, Function, read_tools, render
from gori.data import Conversation
from gori.errors import GoriError
from gori.runtime.session import Session, find_engine, open_session
from gori.targets import PARITY
from gori.tokenizer import Tokenizer, eos_ids

SLICE = 50
"""Rows between two lines of progress."""
ROWS_COMPARED = 100
"""Rows whose teacher-forced logits are compared with a reference."""


def is_artifact(directory: Path) -> bool:
    """Whether an engine other than eager torch runs what lies here."""
    engine, _ = find_engine(Path(directory))
    return engine is not None and engine.name != "eager"


def rounding_of(directory: Path) -> str:
    """How the engine of an exported artifact rounds what a quantized linear is given; see gori.quantized.ROUNDINGS."""
    path = Path(directory) / PARITY
    return str(read_object(path).get("activations", "scheme")) if path.exists() else "scheme"


def generator(directory: Path, threads: int | None = None, rounding: str = "scheme") -> evaluate.Generate:
    """What turns prompts into greedy answers for the model in a directory; a checkpoint computes with `rounding`."""
    end = eos_ids(directory)[0]
    if is_artifact(directory):
        session = open_session(directory, threads)
        return evaluate.one_by_one(session, end, session.info.context)
    from gori import quantized

    return evaluate.batched(quantized.load(directory, rounding), end)


def evaluate_model(
    directory: Path,
    tests: Mapping[str, Sequence[Conversation]],
    functions: Mapping[str, Function],
    label: str,
    threads: int | None = None,
    rounding: str = "scheme",
) -> list[dict[str, Any]]:
    """One dictionary a row: split, utterance, language, wanted and given answer, and whether they are the same call."""
    generate, tokenizer = generator(directory, threads, rounding), Tokenizer.load(directory)
    todo = [(split, c) for split, conversations in tests.items() for c in conversations]
    step = SLICE if is_artifact(directory) else len(todo)  # a decoder's batches are fullest over all rows at once
    rows: list[dict[str, Any]] = []
    with console.steps(f"evaluate {label}", len(todo)) as bar:
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            scored = evaluate.score([c for _, c in part], generate, tokenizer, functions)
            rows += [_row(split, s) for (split, _), s in zip(part, scored, strict=True)]
            bar.update(len(rows), f"exact {sum(r['exact'] for r in rows) / len(rows):.3f}")
    return rows


def _row(split: str, s: evaluate.Scored) -> dict[str, Any]:
    wanted = s.conversation.answer
    return {
        "split": split,
        "language": s.conversation.language,
        "utterance": s.conversation.utterance,
        "wanted": render(wanted.calls) if wanted.calls is not None else wanted.content,
        "answer": s.text,
        "calls": None if s.calls is None else [_plain(c) for c in s.calls],
        "exact": s.exact,
    }


def _plain(c: Call) -> dict[str, Any]:
    return {"name": c.name, "arguments": dict(c.arguments)}


def functions_of(directory: Path) -> dict[str, Function]:
    """The tools that travel with a checkpoint or artifact."""
    path = Path(directory) / "tools.json"
    if not path.exists():
        raise GoriError(f"{path} does not exist: a model that answers with calls carries its tools")
    return read_tools(path)


def open_reference(reference: Path, threads: int | None, rounding: str) -> Session:
    """A session over an artifact, or over a checkpoint that rounds as the engine does that it is compared with."""
    if is_artifact(reference) or rounding == "scheme":
        return open_session(reference, threads)
    from gori import quantized
    from gori.runtime.eager import session_of

    return session_of(quantized.load(reference, rounding), reference)


def compare(
    directory: Path, reference: Path, rows: Sequence[Conversation], threads: int | None = None
) -> dict[str, float]:
    """Teacher-forced agreement with a reference on the first rows' wanted answers: KL(reference || model) in nats, mean
    and 99th percentile over answer tokens, and the share of equal top-1 tokens. A checkpoint as the reference rounds
    activations as the artifact's engine does."""
    model, other = open_session(directory, threads), open_reference(reference, threads, rounding_of(directory))
    tokenizer = Tokenizer.load(directory)
    kl, same = [], []
    for c in rows[:ROWS_COMPARED]:
        mine = evaluate.answer_logits(model, c, tokenizer)
        theirs = evaluate.answer_logits(other, c, tokenizer)
        if mine.shape != theirs.shape:
            raise GoriError(f"{directory} and {reference} have vocabularies of {mine.shape[1]} and {theirs.shape[1]}")
        kl.append(evaluate.divergence(mine, theirs))
        same.append(mine.argmax(-1) == theirs.argmax(-1))
    flat, top = np.concatenate(kl), np.concatenate(same)
    return {
        "kl_mean": float(flat.mean()),
        "kl_p99": float(np.quantile(flat, 0.99)),
        "kl_max": float(flat.max()),
        "top1": float(top.mean()),
        "answer_tokens": len(flat),
    }
