"""A model that answers with calls: session, tokenizer and grammar of one artifact behind one function.

What `gori call`, `gori serve` and tests use. An answer is constrained to calls that fit their schemas, or free; tokens
that the grammar leaves no choice about are not asked of the model but read together with what follows. No torch of its
own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.calls import Call, CallError, Function, parse, read_tools
from gori.data import Conversation, Turn, encode, prompt_ids
from gori.errors import GoriError
from gori.grammar import load_grammar, speaks_calls
from gori.runtime.constrain import MOST_CALLS, Constraint, PromptError, Vocabulary, choose_allowed
from gori.runtime.generate import Pick, Utf8Stream, generate, picker
from gori.runtime.session import Session, Snapshot, folder_of, open_session
from gori.tokenizer import SYSTEM_FILE, Tokenizer, eos_ids

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
        system = directory / SYSTEM_FILE
        self.system = system.read_text(encoding="utf-8") if system.exists() else ""
        self.speaks_calls = bool(functions) and speaks_calls(functions, tokenizer)

    @classmethod
    def open(cls, path: Path, threads: int | None = None, kv: str | None = None) -> Caller:
        """Open an artifact or a checkpoint with its engine; GoriError where its tokenizer is not beside it."""
        directory = folder_of(Path(path))
        tools = directory / "tools.json"
        functions = read_tools(tools) if tools.exists() else {}
        return cls(open_session(path, threads, kv), Tokenizer.load(directory), directory, functions)

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
        only: Collection[str] | None = None,
        must_call: bool = False,
        most_calls: int = MOST_CALLS,
    ) -> Answer:
        """Answer the last user's turn of a conversation, which begins with the artifact's system.txt unless it begins
        with a system turn of its own. `pick` chooses from logits `[V]` (default: the likeliest),
        `on_text` is given pieces of the text as they are whole, `cancelled` is asked before each token and ends the
        answer where it stands. Of a constrained answer, `only` are the functions that may be called (None: all),
        `must_call` forbids to say that none fits. Raises PromptError where the prompt leaves no room for an answer."""
        began = time.perf_counter()
        if self.system and turns[0].role != "system":
            turns = (Turn("system", self.system), *turns)
        prompt = prompt_ids(Conversation((*turns, Turn("assistant", None, ()))), self.tokenizer)
        room = self.session.info.context - len(prompt) + 1
        if room < 2:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.session.info.context}: "
                "shorten it, or export with a larger --context"
            )
        said = self._prefix(turns)
        self.session.restore(Snapshot(tuple(said)))
        out = Answer("", None, [], len(prompt), False)
        prompt, budget, pick = prompt[len(said) :], min(most, room), pick or picker()
        if constrained:
            constraint = self._constraint(turns, budget, only, must_call, most_calls)
            tokens = self._constrained(prompt, constraint, pick, out)
        else:
            tokens = generate(self.session, prompt, (), max_new=budget, pick=pick)
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

    def _constraint(
        self, turns: Sequence[Turn], budget: int, only: Collection[str] | None, must_call: bool, most_calls: int
    ) -> Constraint:
        said = self.tokenizer.normalize(Conversation(tuple(turns)).utterance)
        of = self.vocabulary.function_of
        places = None if only is None else {of[self.tokenizer.id(f"<|call:{name}|>")] for name in only}
        return Constraint(self.vocabulary, said, budget, places, must_call, most_calls)

    def _constrained(self, prompt: list[int], constraint: Constraint, pick: Pick, out: Answer) -> Iterator[int]:
        pending = list(prompt)
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
