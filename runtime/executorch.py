"""The session over a .pte by ExecuTorch's Python wheel.

The wheel's pybind module hands tensors over as torch's, so torch is imported here although the model does not need it;
`executorch.runtime` would besides import all of ExecuTorch's exporter, which is why the extension is imported itself
(docs/executorch.md has the figures). The caches are the program's own mutable buffers: one loaded program is one
session.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from gori import console
from gori.errors import GoriError, MissingEngine, one_line
from gori.runtime.session import Logits, Session, SessionInfo

# The two libraries register the kernels that an exported decoder calls; loading a program without them fails.
KERNELS = ("extension/llm/custom_ops/libcustom_ops_aot_lib.so", "kernels/quantized/libquantized_ops_aot_lib.so")
DEFAULT_THREADS = 1
CHATTER = ("[cpuinfo_utils.cpp", "[threadpool.cpp")
"""What ExecuTorch 1.5.1's native code says on stderr each time that it starts."""

_threads: int | None = None
"""The process's pool as a session set it; None before the first."""


def load_engine() -> ModuleType:
    """ExecuTorch's extension module with every kernel registered; MissingEngine if it is not there or does not load."""
    try:
        engine = importlib.import_module("executorch.extension.pybindings._C")
        assert engine.__file__ is not None
        root = Path(engine.__file__).parents[2]
        for library in KERNELS:
            torch.ops.load_library(root / library)
    except (ImportError, OSError) as e:
        raise MissingEngine(
            f"running a .pte needs ExecuTorch, which does not load here ({one_line(e)}): pip install 'gori[executorch]'"
        ) from e
    return engine


def check() -> None:
    """MissingEngine if what running a .pte needs is not installed; loads nothing of it."""
    if missing := [n for n in ("torch", "executorch") if importlib.util.find_spec(n) is None]:
        raise MissingEngine(f"running a .pte needs {' and '.join(missing)}: pip install 'gori[executorch]'")


def set_threads(engine: ModuleType, threads: int | None) -> int:
    """Size the process's one thread pool; the count that is used.

    XNNPACK's loaded programs keep a pointer to the pool and a resize frees it, so the first session decides.
    """
    global _threads
    if _threads is None:
        wanted = threads or DEFAULT_THREADS
        if engine._threadpool_get_thread_count() != wanted:
            engine._unsafe_reset_threadpool(wanted)
        _threads = wanted
    if threads not in (None, _threads):
        raise GoriError(
            f"{threads} threads were asked for, but an earlier session of this process runs ExecuTorch with "
            f"{_threads} and its pool cannot be resized: use {_threads}, or another process"
        )
    return _threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch's products, which the wheel's attention uses: they are another pool than ExecuTorch's,
    and on a busy machine its threads spin for each other (a prompt of 128 tokens took three times as long)."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ExecutorchSession(Session):
    """One loaded program; see Session."""

    def __init__(self, program: Any, info: SessionInfo) -> None:
        super().__init__()
        self.info = info
        self._program = program  # a method does not keep its program alive
        self._forward = program.load_method("forward")

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        tokens = torch.from_numpy(np.asarray([ids], dtype=np.int64))
        try:
            with torch_threads(self.info.threads):
                logits = self._forward((tokens, torch.tensor([start])))[0]
            return logits[0].numpy()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise GoriError(f"{self.info.path} does not run ({one_line(e)}): export it again") from e


def open_pte(file: Path, threads: int | None) -> ExecutorchSession:
    """Load a .pte that gori exported."""
    try:
        with console.without_lines(*CHATTER):
            engine = load_engine()
            count = set_threads(engine, threads)
            program = engine._load_program(str(file))
            facts = {name: _constant(program, name) for name in METADATA}
            version = importlib.metadata.version("executorch")
            return ExecutorchSession(program, session_info(facts, file, "executorch", version, count))
    except (LookupError, RuntimeError, TypeError) as e:
        raise GoriError(f"{file} is not a .pte that this ExecuTorch loads ({one_line(e)}): export it again") from e


def session_info(
    facts: Mapping[str, Sequence[int]],
    file: Path,
    engine: str,
    version: str,
    threads: int,
    *,
    stand_in: bool = False,
) -> SessionInfo:
    """What a .pte says of itself by its constant methods."""
    return SessionInfo(
        engine=engine,
        engine_version=version,
        path=str(file),
        vocab_size=facts["get_vocab_size"][0],
        context=facts["get_max_context_len"][0],
        chunk=facts["get_max_seq_len"][0],
        bos_id=next((i for i in facts["get_bos_id"] if i >= 0), None),
        eos_ids=tuple(facts["get_eos_ids"]),
        threads=threads,
        file_bytes=file.stat().st_size,
        stand_in=stand_in,
    )


def open_directory(directory: Path, threads: int | None) -> ExecutorchSession:
    """The model.pte of an exported directory."""
    return open_pte(directory / "model.pte", threads)


METADATA = ("get_vocab_size", "get_max_context_len", "get_max_seq_len", "get_bos_id", "get_eos_ids")


def _constant(program: Any, name: str) -> list[int]:
    return list(program.load_method(name)(()))
