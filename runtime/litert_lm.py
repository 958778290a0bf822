"""A .litertlm run by LiteRT-LM itself: text in, text out, with the bundle's own tokenizer, template and stop tokens.

The engine takes text and gives text, neither ids nor logits, so this is no Session: it shows that a bundle answers as
the .tflite in it does. No torch.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from gori import console
from gori.errors import GoriError, MissingEngine, one_line
from gori.tokenizer import Tokenizer

BUNDLE = "model.litertlm"
DEFAULT_THREADS = 1
CHATTER = ("INFO: ", "WARNING: ", "I0000 ", "W0000 ")
"""What LiteRT-LM 0.18.1's native code says on stderr without being asked."""
LONGEST_REASON = 200
"""Characters of an error of the engine, which carries native call stacks."""


class LiteRtLm:
    """One loaded bundle; close it, or use it in a `with`. Its weight cache lies in a directory that goes with it."""

    def __init__(self, file: Path, threads: int | None = None) -> None:
        engine = load_engine()
        self._file = file
        self._scratch = tempfile.TemporaryDirectory()
        self._engine: Any = None
        try:
            with console.without_lines(*CHATTER):
                backend = engine.Backend.CPU(thread_count=threads or DEFAULT_THREADS)
                self._engine = engine.Engine(str(file), backend=backend, cache_dir=self._scratch.name)
        except (RuntimeError, ValueError) as e:
            self._scratch.cleanup()
            said = one_line(e, LONGEST_REASON)
            raise GoriError(f"{file} is not a .litertlm that this LiteRT-LM loads ({said}): export it again") from e
        self._greedy = engine.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)

    def __enter__(self) -> LiteRtLm:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def eos_ids(self) -> list[int]:
        """The stop tokens that the bundle names, each of one id."""
        return [ids[0] for ids in self._engine.eos_token_ids]

    def encode(self, text: str) -> list[int]:
        """Token ids by the bundle's tokenizer; special tokens in the text are special."""
        with self._asked("tokenize a text"):
            return list(self._engine.tokenize(text))

    def complete(self, prompt: str, max_new: int = 256) -> str:
        """What the model says after a prompt that has its template already, greedily, up to a stop token."""
        return self._generate(prompt, max_new, template=False)

    def answer(self, text: str, max_new: int = 256) -> str:
        """What the model answers to a user's text, which the bundle's own prompt template surrounds."""
        return self._generate(text, max_new, template=True)

    def render(self, text: str) -> str:
        """A user's text as the bundle's Jinja template writes it, with the opening of an answer."""
        with self._asked("render a turn"), self._engine.create_conversation() as conversation:
            return conversation.render_message_to_string(text)

    def close(self) -> None:
        """Free the engine and its cache."""
        if self._engine is not None:
            with console.without_lines(*CHATTER):
                self._engine.close()
            self._engine = None
            self._scratch.cleanup()

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Keep native chatter away; what the engine refuses is a GoriError."""
        if self._engine is None:
            raise GoriError(f"{self._file} is closed: open it again")
        try:
            with console.without_lines(*CHATTER):
                yield
        except (RuntimeError, ValueError) as e:
            said = one_line(e, LONGEST_REASON)
            raise GoriError(f"LiteRT-LM does not {what} with {self._file} ({said}): export it again") from e

    def _generate(self, text: str, max_new: int, *, template: bool) -> str:
        options = {"apply_prompt_template": template, "sampler_config": self._greedy, "max_output_tokens": max_new}
        with self._asked("answer"):
            session = self._engine.create_session(**options)
            try:
                session.run_prefill([text])
                return session.run_decode().texts[0]
            finally:
                session.close()


def load_engine() -> Any:
    """The module litert_lm; MissingEngine if the wheel is missing."""
    try:
        import litert_lm
    except ImportError as e:
        raise MissingEngine("running a .litertlm needs LiteRT-LM: pip install 'gori[litert]'") from e
    return litert_lm


def check() -> None:
    """MissingEngine unless LiteRT-LM is here."""
    load_engine()


def open_bundle(path: Path, threads: int | None = None) -> LiteRtLm:
    """Open a .litertlm, or the one in an exported directory; GoriError if there is none."""
    file = path / BUNDLE if path.is_dir() else path
    if not file.exists():
        raise GoriError(f"{file} does not exist: export a checkpoint that has a tokenizer.json with --target litert")
    return LiteRtLm(file, threads)


def same_answers(directory: Path, answers: Sequence[Mapping[str, Any]], max_new: int) -> dict[str, Any]:
    """How many golden answers (`{"prompt": ids, "answer": ids}`) LiteRT-LM gives, as text, of those that are text.

    A random model's bytes may be none, and LiteRT-LM's strings end at a zero.
    """
    tokenizer, same, counted = Tokenizer.load(directory), 0, 0
    with open_bundle(directory) as engine:
        for a in answers:
            want, prompt = tokenizer.decode(a["answer"]), tokenizer.decode(a["prompt"])
            if not a["answer"] or {"\ufffd", "\0"} & set(want + prompt):
                continue
            counted += 1
            same += engine.encode(prompt) == a["prompt"] and engine.complete(prompt, max_new) == want
    version = importlib.metadata.version("litert-lm-api")
    return {"engine": f"LiteRT-LM {version}", "same_answers": same, "answers": counted}
