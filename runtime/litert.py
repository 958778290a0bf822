"""The session over a .tflite by LiteRT's compiled-model interface: no torch, and caches that are never copied.

A file has signatures of fixed lengths, `prefill_N` and `decode`. How a prompt is cut into their calls is the same for
every runtime of such files and stands in SignatureSession; an engine runs one call.

Shapes in names: T tokens of a call, C cache length.
"""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import json
import os
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori import console
from gori.errors import GoriError, MissingEngine, one_line
from gori.runtime.flatbuffer import mapped, metadata, root
from gori.runtime.session import Logits, Session, SessionInfo

MODEL, METADATA, IDENTIFIER = "model.tflite", "gori", b"TFL3"
DEFAULT_THREADS = 1
HIDDEN = -1e9
"""Added to the score of a position that a token must not see: its share is then exactly 0."""
ONE_COPY = ":memory"
"""XNNPACK's name for a weight cache without a file: signatures then share their packed weights."""
CHATTER = (
    "INFO: ", "npu_registry.cc", "compiler_plugin.cc", "Could not load shared library", "gpu_registry.cc",
)  # fmt: skip
"""What LiteRT 2.3.0's native code says on stderr while it looks for accelerators that gori does not use."""


@dataclass(frozen=True)
class Facts:
    """What a file says of itself."""

    runtime: str
    vocab_size: int
    context: int
    chunk: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    calls: tuple[int, ...]
    """Lengths of its prefill signatures, the longest first."""


@dataclass(frozen=True)
class Call:
    """Inputs of one signature: `tokens [1, T]`, `input_pos [T]` int32, `mask [1, 1, T, C]` float32."""

    signature: str
    tokens: NDArray[np.int32]
    input_pos: NDArray[np.int32]
    mask: NDArray[np.float32]


class SignatureSession(Session):
    """A session over fixed-length calls: all but the last token by prefill, the last by decode, which gives logits."""

    def __init__(self, facts: Facts, info: SessionInfo) -> None:
        super().__init__()
        self.info, self._facts = info, facts

    @abstractmethod
    def _call(self, call: Call) -> Logits | None:
        """Run one call on the caches; decode gives float32 `[V]`."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """As in Session, but in one piece: between chunks no logits are computed."""
        self._check(ids)
        return self._append([int(t) for t in ids])

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        end = start + len(ids) - 1
        while start < end:
            length = choose_length(end - start, self._facts.calls)
            taken = min(length, end - start)
            self._call(self._inputs(f"prefill_{length}", length, ids[:taken], start))
            ids, start = ids[taken:], start + taken
        logits = self._call(self._inputs("decode", 1, ids, end))
        assert logits is not None
        return logits

    def _inputs(self, signature: str, length: int, ids: Sequence[int], start: int) -> Call:
        """Rows behind the prompt are written, too, and hidden until a later call writes over them."""
        tokens, positions = np.zeros((1, length), np.int32), np.zeros(length, np.int32)
        tokens[0, : len(ids)] = ids
        positions[: len(ids)] = np.arange(start, start + len(ids))
        mask = np.full((1, 1, length, self._facts.context), HIDDEN, np.float32)
        for row in range(len(ids)):
            mask[0, 0, row, : start + row + 1] = 0
        return Call(signature, tokens, positions, mask)


def choose_length(waiting: int, lengths: Sequence[int]) -> int:
    """The call that wastes least: the longest that is filled, else the shortest length that takes all, unless several
    of the shortest are less work."""
    longest, shortest = lengths[0], lengths[-1]
    if waiting >= longest or -(-waiting // shortest) * shortest >= longest:
        return longest
    return shortest


class Compiled:
    """One compiled model and two sets of caches, which take turns as input and output: none is copied."""

    def __init__(self, file: Path, options: Any) -> None:
        from ai_edge_litert.compiled_model import CompiledModel

        self._model = model = CompiledModel.from_file(str(file), options=options)
        signatures: dict[str, dict[str, list[str]]] = model.get_signature_list()
        shapes = model.get_input_tensor_details("decode")
        names = [n for n in signatures["decode"]["inputs"] if n.startswith("kv_cache")]
        self._caches = {n: model.create_input_buffer_by_name("decode", n) for n in names}
        self._updated = {n: model.create_output_buffer_by_name("decode", n) for n in names}
        self._inputs = {
            s: {n: model.create_input_buffer_by_name(s, n) for n in ("tokens", "input_pos", "mask")} for s in signatures
        }
        self._logits = model.create_output_buffer_by_name("decode", "logits")
        for name, buffer in self._caches.items():
            # what is hidden is still multiplied, by 0: it must be a number
            buffer.write(np.zeros(shapes[name]["shape"], np.float32))

    def run(self, call: Call, vocab_size: int) -> Logits | None:
        """Run one call; float32 `[V]` of decode."""
        inputs = self._inputs[call.signature]
        for name, buffer in inputs.items():
            buffer.write(getattr(call, name))
        decodes = call.signature == "decode"
        outputs = {**self._updated, "logits": self._logits} if decodes else self._updated
        self._model.run_by_name(call.signature, {**inputs, **self._caches}, outputs)
        self._caches, self._updated = self._updated, self._caches
        return np.array(self._logits.read(vocab_size, np.float32)) if decodes else None

    def close(self) -> None:
        """Let everything go while native code is kept from saying so."""
        with console.without_lines(*CHATTER):
            vars(self).clear()


class LitertSession(SignatureSession):
    """A session over a Compiled."""

    def __init__(self, compiled: Compiled, facts: Facts, info: SessionInfo) -> None:
        super().__init__(facts, info)
        self._compiled = compiled
        weakref.finalize(self, compiled.close)

    def _call(self, call: Call) -> Logits | None:
        try:
            return self._compiled.run(call, self.info.vocab_size)
        except RuntimeError as e:
            raise GoriError(f"LiteRT does not run {self.info.path} ({one_line(e)}): export it again") from e


def read_facts(file: Path) -> Facts:
    """What gori wrote into a .tflite; GoriError for any other file."""
    try:
        model = root(mapped(file), IDENTIFIER)
        body = json.loads(metadata(model, METADATA) or b"")
        names = [s.string(2) for s in model.tables(7)]
        calls = sorted((int(n.removeprefix("prefill_")) for n in names if n.startswith("prefill_")), reverse=True)
        facts = Facts(**{**body, "eos_ids": tuple(body["eos_ids"])}, calls=tuple(calls))
        if "decode" not in names or not calls:
            raise ValueError(f"signatures {names}")
    except OSError as e:
        raise GoriError(f"{file} cannot be read ({e.strerror}): export it again") from e
    except (ValueError, TypeError, KeyError) as e:
        raise GoriError(f"{file} is not a .tflite that gori wrote ({e}): export it again") from e
    return facts


def session_info(engine: str, version: str, file: Path, facts: Facts, threads: int) -> SessionInfo:
    """SessionInfo of a .tflite."""
    return SessionInfo(
        engine=engine,
        engine_version=version,
        path=str(file),
        vocab_size=facts.vocab_size,
        context=facts.context,
        chunk=facts.chunk,
        bos_id=facts.bos_id,
        eos_ids=facts.eos_ids,
        threads=threads,
        file_bytes=file.stat().st_size,
    )


def open_directory(directory: Path, threads: int | None) -> LitertSession:
    """Open an exported directory's model.tflite by LiteRT."""
    return open_litert(directory / MODEL, threads)


def open_tflite(file: Path, threads: int | None) -> Session:
    """Open a .tflite with the runtime that it was written for."""
    from gori.runtime import tflite

    if read_facts(file).runtime == tflite.RUNTIME:
        return tflite.open_legacy(file, threads)
    return open_litert(file, threads)


@functools.cache
def hush_at_exit() -> None:
    """LiteRT 2.3.0 destroys a global after Python has ended, reports that on stderr and cannot be told not to. What a
    failing program has to say was said before the functions of atexit run."""
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


def load_engine() -> Any:
    """LiteRT's module of options; MissingEngine if the wheel is missing."""
    try:
        from ai_edge_litert import compiled_model, options
    except ImportError as e:
        raise MissingEngine("running a .tflite needs LiteRT: pip install 'gori[litert]'") from e
    assert compiled_model.CompiledModel
    return options


def check() -> None:
    """MissingEngine unless LiteRT is here."""
    load_engine()


def open_litert(file: Path, threads: int | None) -> LitertSession:
    """Load a .tflite that gori exported; its kernels are XNNPACK's, which alone compute it as the checkpoint says."""
    facts, count = read_facts(file), threads or DEFAULT_THREADS
    options = load_engine().Options.create()
    options.cpu_options.num_threads = count
    options.cpu_options.xnnpack_weight_cache_path = ONE_COPY
    info = session_info("LiteRT", importlib.metadata.version("ai-edge-litert"), file, facts, count)
    hush_at_exit()
    try:
        with console.without_lines(*CHATTER):
            return LitertSession(Compiled(file, options), facts, info)
    except (RuntimeError, ValueError, KeyError) as e:
        raise GoriError(f"{file} is not a .tflite that this LiteRT loads ({one_line(e)}): export it again") from e
