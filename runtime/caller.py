"""A model that answers with calls: session, tokenizer and grammar of one artifact behind one function. No torch of its own.

What `gori call`, `gori serve` and tests use. An answer is constrained to calls that fit their schemas, or free; tokens that
the grammar leaves no choice about are not asked of the model but read together with what follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.calls import Call, CallError, Function, parse
from gori.data import Conversation, Turn, encode, prompt_ids
from gori.errors import GoriError
from gori.grammar import load_grammar, speaks_calls
from gori.runtime.constrain import Constraint, Vocabulary, choose_allowed
from gori.runtime.generate import Pick, Utf8Stream, generate, picker
from gori.runtime.session import Session, Snapshot, open_session
from gori.tokenizer import Tokenizer, eos_ids

MOST = 256
"""Tokens of an answer at most, its end mark among them."""


@dataclass
class Answer:
    """What a model answered, and how long it took."""

    text: str
    """As the tokenizer writes it, without the end mark."""
    calls: list[Call] | None
    """None where the text is no list of calls."""
    ids: list[int]
    """The answer's tokens, without the end mark."""
    prompt_tokens: int
    finished: bool
    """Whether the model ended it; else the tokens or the context ran out."""
    forced_tokens: int = 0
    """Tokens that the grammar left no choice about."""
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    alternatives: list[tuple[str, float]] = field(default_factory=list)
    """Functions that the answer could have begun with, the likeliest first: name (`none`: no function fits) and
    probability among what is allowed."""


class Caller:
    """One open artifact. Not for two threads at once: it has one cache."""

    def __init__(self, session: Session, tokenizer: Tokenizer, directory: Path, functions: dict[str, Function]) -> None:
        self.session, self.tokenizer, self.directory, self.functions = session, tokenizer, directory, functions
        self.ends = eos_ids(directory)
        self.speaks_calls = bool(functions) and speaks_calls(functions, tokenizer)

    @classmethod
    def open(cls, path: Path, threads: int | None = None) -> Caller:
        """Open an artifact or a checkpoint with its engine; GoriError where its tokenizer is not beside it."""
        from gori.runtime.evaluation import folder_of, functions_of

        directory = folder_of(Path(path))
        functions = functions_of(directory) if (directory / "tools.json").exists() else {}
        return cls(open_session(path, threads), Tokenizer.load(directory), directory, functions)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The grammar's tokens, read when a constrained answer is asked for."""
        if not self.speaks_calls:
            raise GoriError(
                f"{self.directory} was not trained on calls of its tools (no special tokens): ask it for free text"
            )
        return Vocabulary(load_grammar(self.directory), self.tokenizer.pieces)

    def answer(
        self,
        turns: Sequence[Turn],
        *,
        constrained: bool = True,
        most: int = MOST,
        pick: Pick | None = None,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer the last user's turn of a conversation. `pick` chooses from logits `[V]` (default: the likeliest),
        `on_text` is given pieces of the text as they are whole, `cancelled` is asked before each token and ends the
        answer where it stands. Raises GoriError where the prompt leaves no room for an answer."""
        began = time.perf_counter()
        prompt = prompt_ids(Conversation((*turns, Turn("assistant", None, ()))), self.tokenizer)
        room = self.session.info.context - len(prompt) + 1
        if room < 2:
            raise GoriError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.session.info.context}: "
                "shorten it, or export with a larger --context"
            )
        said = self._prefix(turns)
        self.session.restore(Snapshot(tuple(said)))
        out = Answer("", None, [], len(prompt), False)
        tokens = (self._constrained if constrained else self._free)(
            prompt[len(said) :], turns, min(most, room), pick or picker(), out
        )
        stream = Utf8Stream(self.tokenizer)
        for token in tokens:
            out.first_token_ms = out.first_token_ms or (time.perf_counter() - began) * 1e3
            if token in self.ends:
                out.finished = True
                break
            out.ids.append(token)
            piece = stream.push(token)
            if on_text and piece:
                on_text(piece)
            if cancelled():
                break
        if (rest := stream.close()) and on_text:
            on_text(rest)
        out.text = self.tokenizer.decode(out.ids)
        out.calls = self._calls(out.text)
        out.total_ms = (time.perf_counter() - began) * 1e3
        return out

    def call(self, utterance: str, **how: Any) -> Answer:
        """`answer` to one utterance."""
        return self.answer((Turn("user", utterance),), **how)

    def _prefix(self, turns: Sequence[Turn]) -> list[int]:
        """What stands before every utterance: computed once, and then kept in the cache."""
        system = [t for t in turns[:1] if t.role == "system"]
        return encode(Conversation(tuple(system)), self.tokenizer).ids if system else []

    def _calls(self, text: str) -> list[Call] | None:
        try:
            return parse(text, self.functions) if self.functions else None
        except CallError:
            return None

    def _free(self, prompt: list[int], turns: Sequence[Turn], budget: int, pick: Pick, out: Answer) -> Iterator[int]:
        yield from generate(self.session, prompt, (), max_new=budget, pick=pick)

    def _constrained(
        self, prompt: list[int], turns: Sequence[Turn], budget: int, pick: Pick, out: Answer
    ) -> Iterator[int]:
        said = self.tokenizer.normalize(turns[-1].content or "")
        constraint, pending = Constraint(self.vocabulary, said, budget), list(prompt)
        while not constraint.done:
            token = constraint.forced()
            if token is not None:
                out.forced_tokens += 1
            else:
                logits = self.session.prefill(pending)
                pending = []
                if not out.ids:
                    out.alternatives = self._alternatives(logits, constraint)
                token = choose_allowed(logits, constraint, pick)
            constraint.advance(token)
            pending.append(token)
            yield token

    def _alternatives(
        self, logits: NDArray[np.float32], constraint: Constraint, most: int = 5
    ) -> list[tuple[str, float]]:
        listed, _ = constraint.allowed()
        names = {self.tokenizer.id(f"<|call:{n}|>"): n for n in self.functions} | {self.vocabulary.none: "none"}
        x = logits[listed].astype(np.float64)
        p = np.exp(x - x.max())
        p /= p.sum()
        return [(names[listed[i]], float(p[i])) for i in np.argsort(-p, kind="stable")[:most]]
