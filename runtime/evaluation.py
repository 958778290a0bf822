"""Answers of a checkpoint folder or an artifact to test rows, by one code: `gori eval` and the pipeline's table.

A checkpoint answers in batches in eager torch, an artifact one by one in its own engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gori import console, evaluate
from gori.artifact import read_object
from gori.calls import Function, plain, read_tools, render
from gori.data import Conversation, read_conversations
from gori.errors import GoriError
from gori.runtime import forced
from gori.runtime.caller import Caller
from gori.runtime.session import find_engine, folder_of, open_session
from gori.statistics import token_fidelity
from gori.targets import PARITY
from gori.tokenizer import Tokenizer, eos_ids

if TYPE_CHECKING:
    from gori.model import Decoder

SLICE = 50
"""Rows between two lines of progress."""


def is_artifact(directory: Path) -> bool:
    """Whether an engine other than eager torch runs what lies here."""
    engine, _ = find_engine(Path(directory))
    return engine is not None and engine.name != "eager"


def rounding_of(directory: Path) -> str:
    """How the engine of an exported artifact rounds what a quantized linear is given; see gori.quantized.ROUNDINGS."""
    path = folder_of(Path(directory)) / PARITY
    return str(read_object(path).get("activations", "scheme")) if path.exists() else "scheme"


def generator(directory: Path, threads: int | None = None, rounding: str = "scheme") -> evaluate.Generate:
    """What turns prompts into greedy answers for the model in a directory; a checkpoint computes with `rounding`."""
    end = eos_ids(folder_of(directory))[0]
    if is_artifact(directory):
        session = open_session(directory, threads)
        return evaluate.one_by_one(session, end, session.info.context)
    return evaluate.batched(_load(directory, threads, rounding), end)


def evaluate_model(
    directory: Path,
    tests: Mapping[str, Sequence[Conversation]],
    functions: Mapping[str, Function],
    label: str,
    threads: int | None = None,
    rounding: str = "scheme",
    constrained: bool = False,
) -> list[dict[str, Any]]:
    """One dictionary a row: split, utterance, language, wanted and given answer, and whether they are the same call.

    `constrained` answers can be nothing but calls of the model's own tools, and are made one by one."""
    tokenizer = Tokenizer.load(folder_of(directory))
    answering = _constrained(directory, threads) if constrained else _free(directory, threads, rounding)
    todo = [(split, c) for split, conversations in tests.items() for c in conversations]
    one_by_one = constrained or is_artifact(directory)
    step = SLICE if one_by_one else len(todo)  # a decoder's batches are fullest over all rows at once
    rows: list[dict[str, Any]] = []
    with console.steps(f"evaluate {label}", len(todo)) as bar:
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            conversations = [c for _, c in part]
            scored = evaluate.score(conversations, answering(conversations), tokenizer, functions)
            rows += [as_row(split, s) for (split, _), s in zip(part, scored, strict=True)]
            bar.update(len(rows), f"exact {sum(r['exact'] for r in rows) / len(rows):.3f}")
    return rows


Answering = Callable[[Sequence[Conversation]], evaluate.Generate]
"""Rows → what answers their prompts."""


def _free(directory: Path, threads: int | None, rounding: str) -> Answering:
    generate = generator(directory, threads, rounding)
    return lambda _: generate


def _constrained(directory: Path, threads: int | None) -> Answering:
    """Answers to the rows themselves, whatever the prompts: the caller makes those."""
    caller = Caller.open(directory, threads)

    def answer(c: Conversation) -> list[int]:
        return caller.answer(c.turns[:-1], most=evaluate.MAX_NEW_TOKENS).ids

    return lambda rows: lambda _: [answer(c) for c in rows]


def as_row(split: str, s: evaluate.Scored) -> dict[str, Any]:
    """One answered row as a dictionary; see evaluate_model."""
    wanted = s.conversation.answer
    return {
        "split": split,
        "language": s.conversation.language,
        "utterance": s.conversation.utterance,
        "wanted": render(wanted.calls) if wanted.calls is not None else wanted.content,
        "answer": s.text,
        "calls": None if s.calls is None else [plain(c) for c in s.calls],
        "exact": s.exact,
    }


def read_splits(
    files: Sequence[Path], functions: Mapping[str, Function], rows: int | None = None
) -> dict[str, list[Conversation]]:
    """Conversations of each file by its name without ending; with `rows` so many of each, drawn from a fixed seed and
    left in the file's order. GoriError for a bad line and for two files of one name."""
    out: dict[str, list[Conversation]] = {}
    for path in files:
        if path.stem in out:
            raise GoriError(f"two data files are named {path.stem}: the name tells splits apart, so rename one")
        found = read_conversations(path, functions)
        drawn = np.random.default_rng([0, 577]).permutation(len(found))[:rows]
        out[path.stem] = [found[i] for i in sorted(drawn)]
    return out


def functions_of(directory: Path) -> dict[str, Function]:
    """The tools that travel with a checkpoint or artifact."""
    path = folder_of(Path(directory)) / "tools.json"
    if not path.exists():
        raise GoriError(f"{path} does not exist: a model that answers with calls carries its tools")
    return read_tools(path)


def compare(
    directory: Path, reference: Path, rows: Sequence[Conversation], threads: int | None = None
) -> dict[str, Any]:
    """Teacher-forced agreement with a reference on the rows' wanted answers: gori.statistics.token_fidelity.

    A checkpoint computes in batches, an artifact by its engine; a checkpoint as the reference rounds activations as the
    artifact's engine does. GoriError where the two do not share a tokenizer: tokens would not be comparable.
    """
    tokenizers = [Tokenizer.load(folder_of(d)) for d in (directory, reference)]
    tokens = [[forced.as_row(c, t) for c in rows] for t in tokenizers]
    different = next((c.utterance for c, a, b in zip(rows, *tokens, strict=True) if a != b), None)
    if different is not None:
        raise GoriError(
            f"{directory} and {reference} cut {different!r} into different tokens: compare models of one tokenizer"
        )
    model, other = (_forced(d, threads, r) for d, r in ((directory, "scheme"), (reference, rounding_of(directory))))
    found = forced.compare(model, other, tokens[0], f"compare with {reference.name}")
    return token_fidelity(found.kl_N, found.nll_N, found.nll_reference_N, found.same_N, found.row_N)


def _forced(directory: Path, threads: int | None, rounding: str) -> forced.Answers:
    if is_artifact(directory):
        return forced.engine_answers(open_session(directory, threads))
    return forced.eager_answers(_load(directory, threads, rounding))


def _load(directory: Path, threads: int | None, rounding: str) -> Decoder:
    """A checkpoint's decoder; `threads` sets torch's count, which is the process's."""
    import torch

    from gori import quantized

    if threads is not None:
        torch.set_num_threads(threads)
    return quantized.load(folder_of(directory), rounding)
