"""One Session over every artifact: token ids in, logits of the last token out, a KV cache between calls.

Knows nothing of tokenizers, sampling or of any engine: an engine is a subclass with one method, imported only when a
path of its kind is opened. The function is `open_session`, not `open`, so that the builtin stays what it is.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gori.errors import GoriError
from gori.targets import PARITY

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class SessionInfo:
    """What was opened."""

    engine: str
    engine_version: str
    path: str
    vocab_size: int
    context: int
    """Tokens that the KV cache holds."""
    chunk: int
    """Most tokens that the engine takes in one call; longer prompts are cut by `prefill`."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    threads: int
    file_bytes: int
    """Bytes of the weights' file."""
    log_probabilities: bool = False
    """The engine gives log-probabilities in place of logits: the same up to a constant at each position."""
    stand_in: bool = False
    """What runs is not the engine that the file is for, but something that computes the same graph here."""


@dataclass(frozen=True)
class Snapshot:
    """A prefix that a session can return to: its token ids. It holds no cache, so it costs nothing to keep."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """One row of ENGINES."""

    name: str
    holds: str
    """Glob of the file that makes a directory this engine's, or that names the artifact itself."""
    module: str
    opener: str
    """A function of `module`: (file: Path, threads: int | None) → Session."""


ENGINES: tuple[Engine, ...] = (
    Engine("executorch", "*.pte", "gori.runtime.executorch", "open_pte"),
    Engine("litert", "*.tflite", "gori.runtime.litert", "open_tflite"),
    Engine("llama.cpp", "*.gguf", "gori.runtime.gguf", "open_gguf"),
    Engine("eager", "config.json", "gori.runtime.eager", "open_checkpoint"),
)
"""Tried from the top: an exported directory keeps its config.json, so the checkpoint's row is the last."""


class Session(ABC):
    """A decoder with the tokens that it has read.

    `written` are the ids whose keys and values stand in the cache, by position; the first `length` of them are the
    history. Going back to a prefix is a smaller `length`; what stands behind it is used again when the same ids return.
    """

    info: SessionInfo

    def __init__(self) -> None:
        self._written: list[int] = []
        self._length = 0

    @abstractmethod
    def _run(self, ids: Sequence[int], start: int) -> Logits:
        """Write 1..chunk tokens to positions `start`… of the cache; float32 logits `[V]` of the last."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append a prompt of at least one token to the history; float32 logits `[V]` of its last token.

        Raises GoriError, before anything is computed, for an id outside the vocabulary and for a full context.
        """
        self._check(ids)
        logits: Logits | None = None
        for i in range(0, len(ids), self.info.chunk):
            logits = self._append([int(t) for t in ids[i : i + self.info.chunk]])
        assert logits is not None
        return logits

    def decode(self, token: int) -> Logits:
        """Append one token; float32 logits `[V]` of the next."""
        return self.prefill((token,))

    def reset(self) -> None:
        """Forget the history."""
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens in the history."""
        return self._length

    def snapshot(self) -> Snapshot:
        """The history as it is now."""
        return Snapshot(tuple(self._written[: self._length]))

    def restore(self, snapshot: Snapshot) -> None:
        """Make the history the snapshot's; ids that are still in the cache are not computed again."""
        ids = snapshot.ids
        if len(ids) > self.info.context:
            raise GoriError(f"a snapshot of {len(ids)} tokens exceeds the context of {self.info.context}: shorten it")
        kept = _common_prefix(ids, self._written)
        self._length = kept
        if kept < len(ids):
            self.prefill(ids[kept:])

    def _append(self, ids: list[int]) -> Logits:
        start = self._length
        # what stood from here on is lost even if the engine fails half way
        del self._written[start:]
        logits = self._run(ids, start)
        self._written += ids
        self._length = len(self._written)
        return logits

    def _check(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise GoriError("a prompt of 0 tokens has no logits: give at least one token id")
        wrong = next((t for t in ids if not 0 <= t < self.info.vocab_size), None)
        if wrong is not None:
            raise GoriError(f"token id {wrong} is outside the vocabulary 0..{self.info.vocab_size - 1}")
        if self._length + len(ids) > self.info.context:
            raise GoriError(
                f"{self._length} tokens are in the context and {len(ids)} more exceed its {self.info.context}: "
                "reset the session, shorten the prompt, or export with a larger --context"
            )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def open_session(path: Path | str, threads: int | None = None, kv: str | None = None) -> Session:
    """Open an artifact directory, an artifact file or a checkpoint folder with the engine that runs it.

    `threads=None` leaves the choice to the engine; `Session.info.threads` says what it is. `kv` is what keys and values
    are kept in where the engine has a choice: llama.cpp alone, float32 or q8_0. Raises GoriError where nothing that
    gori runs lies at `path`, or where the engine's package is not installed.
    """
    path = Path(path)
    if threads is not None and threads < 1:
        raise GoriError(f"{threads} threads cannot compute: choose 1 or more")
    engine, file = find_engine(path)
    if engine is not None:
        if kv and engine.name != "llama.cpp":
            raise GoriError(f"{engine.name} keeps keys and values in float32 alone: --kv is of .gguf files")
        opener = getattr(importlib.import_module(engine.module), engine.opener)
        return opener(file, threads, kv) if kv else opener(file, threads)
    if (path / PARITY).exists():
        raise GoriError(
            f"{path} was exported for an engine that does not run here: `gori verify {path}` runs its stand-in"
        )
    known = ", ".join(f"{e.holds} ({e.name})" for e in ENGINES)
    raise GoriError(f"{path} {'holds' if path.is_dir() else 'is'} nothing that gori runs: a session opens {known}")


def folder_of(path: Path) -> Path:
    """Where the tokenizer and the tools of a model lie: its directory, also where its file was named."""
    return path.parent if path.is_file() else path


def find_engine(path: Path) -> tuple[Engine | None, Path]:
    """The engine that runs what lies at a path, and the file that it opens."""
    for engine in ENGINES:
        file = _artifact(path, engine.holds)
        # an export for an engine that does not run here keeps config.json, but no weights that eager torch reads
        if file is not None and (engine.name != "eager" or any(file.parent.glob("*.safetensors"))):
            return engine, file
    return None, path


def _artifact(path: Path, pattern: str) -> Path | None:
    if path.is_file():
        return path if path.match(pattern) else None
    found = sorted(path.glob(pattern)) if path.is_dir() else []
    if len(found) > 1:
        raise GoriError(f"{path} holds {len(found)} files {pattern}: name one, such as {found[0]}")
    return found[0] if found else None
