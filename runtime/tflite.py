"""The session over a .tflite by tflite-runtime 2.14, the last of its name, in a process and an environment of its own.

That wheel needs numpy below 2, so it cannot be imported beside gori: a worker (runtime/tflite_worker.py) runs in a
virtual environment that is made once by hand, and reads calls from a pipe. Knows the pipe; the calls are those of
SignatureSession.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import IO

import numpy as np

from gori.errors import GoriError, MissingEngine
from gori.runtime.litert import MODEL, Call, Facts, SignatureSession, read_facts, session_info
from gori.runtime.session import Logits, SessionInfo

VERSION = "2.14.0"
RUNTIME = "tflite-runtime 2.14"
"""As it stands in the files that are written for it."""
ENVIRONMENT, PLACE = "GORI_TFLITE_VENV", Path("~/.cache/gori/tflite-2.14")
BESIDE = Path(sys.prefix) / "tflite-2.14"
"""Where `make setup` puts it: in the environment that gori itself runs in."""
WORKER = Path(__file__).with_name("tflite_worker.py")
LONGEST_S = 600.0
"""A call that takes longer is given up, and its worker ended."""
READY, DONE, FAILED = b"R", b"D", b"E"
MAKE = "python3.11 -m venv {0} && {0}/bin/pip install tflite-runtime==2.14.0 'numpy<2'"
"""2.14.0 has wheels for Python 3.9 to 3.11."""


def interpreter() -> Path:
    """The Python that has tflite-runtime; MissingEngine with the commands that make it."""
    default = BESIDE if BESIDE.exists() else PLACE
    place = Path(os.environ.get(ENVIRONMENT) or default).expanduser()
    python = place / "bin" / "python"
    if not python.exists():
        raise MissingEngine(
            f"tflite-runtime {VERSION} needs numpy below 2 and so an environment of its own, and {place} is none: "
            f"run `{MAKE.format(place)}`, or name another in {ENVIRONMENT}"
        )
    return python


def check() -> None:
    """MissingEngine unless this system has pipes and the environment has tflite-runtime."""
    supported()
    probe = [str(interpreter()), "-I", "-c", "import tflite_runtime"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=LONGEST_S)
    if done.returncode:
        raise lacking(done.stderr.strip().splitlines()[-1:])


def supported() -> None:
    if sys.platform == "win32":
        raise MissingEngine(f"{RUNTIME} is run through pipes that Windows does not have: use Linux or macOS")


def lacking(said: list[str]) -> MissingEngine:
    """What to do with an environment that is there and does not import the runtime."""
    place = interpreter().parents[1]
    return MissingEngine(
        f"{place} has no tflite-runtime {VERSION} ({''.join(said)}): run `{MAKE.format(place)}`, or name another in "
        f"{ENVIRONMENT}"
    )


class Worker:
    """A process with one loaded model; ended with its owner, at exit, and when it does not answer."""

    def __init__(self, file: Path, threads: int, longest_s: float = LONGEST_S) -> None:
        self._longest_s, self._file = longest_s, file
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            [str(interpreter()), "-I", str(WORKER), str(file), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        # at its owner's end or the interpreter's, whichever is first
        self._finalizer = weakref.finalize(self, end, self._process)
        try:
            self.version = self._answer(READY).decode()
        except GoriError:
            self.close()
            raise

    def call(self, call: Call) -> bytes:
        """Run one call; the bytes of decode's logits, of a prefill none."""
        signature = call.signature.encode()
        head = struct.pack("<BII", len(signature), call.tokens.shape[1], call.mask.shape[3])
        body = [call.tokens.astype("<i4"), call.input_pos.astype("<i4"), call.mask.astype("<f4")]
        try:
            pipe = self._pipe(self._process.stdin)
            pipe.write(b"".join([head, signature, *(a.tobytes() for a in body)]))
            pipe.flush()
        except OSError as e:
            raise self._lost(str(e)) from e
        return self._answer(DONE)

    def close(self) -> None:
        """End the process and wait for it, so that none is left behind."""
        self._finalizer()

    def _answer(self, expected: bytes) -> bytes:
        deadline = time.monotonic() + self._longest_s
        kind, length = struct.unpack("<cI", self._read(5, deadline))
        body = self._read(length, deadline)
        if kind == FAILED:
            raise GoriError(
                f"{RUNTIME} does not run {self._file} ({' '.join(body.decode(errors='replace').split())}): export "
                "it again with --target tflite"
            )
        assert kind == expected, kind
        return body

    def _read(self, count: int, deadline: float) -> bytes:
        pipe, found = self._pipe(self._process.stdout), bytearray()
        while len(found) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.close()
                raise GoriError(f"{RUNTIME} did not answer within {self._longest_s:g} s and was ended: try again")
            block = os.read(pipe.fileno(), count - len(found))
            if not block:
                raise self._lost("it ended")
            found += block
        return bytes(found)

    def _lost(self, why: str) -> GoriError:
        code = self._process.wait()
        said = self._pipe(self._process.stderr).read().decode(errors="replace").strip().splitlines()
        self.close()
        if said and said[-1].startswith(("ModuleNotFoundError", "ImportError")):
            return lacking(said[-1:])
        return GoriError(
            f"the process that runs {self._file} by {RUNTIME} is gone ({why}, exit code {code}"
            f"{', ' + said[-1] if said else ''}): check the environment that {ENVIRONMENT} or {PLACE} names"
        )

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process unless it has ended, collect it, and close its pipes."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a call that the process never read
                pipe.close()


class LegacySession(SignatureSession):
    """Calls run by a Worker, which keeps the caches."""

    def __init__(self, worker: Worker, facts: Facts, info: SessionInfo) -> None:
        super().__init__(facts, info)
        self._worker = worker

    def _call(self, call: Call) -> Logits | None:
        body = self._worker.call(call)
        return np.frombuffer(body, "<f4").astype(np.float32) if body else None


def open_directory(directory: Path, threads: int | None) -> LegacySession:
    """Open an exported directory's model.tflite by tflite-runtime 2.14."""
    return open_legacy(directory / MODEL, threads)


def open_legacy(file: Path, threads: int | None) -> LegacySession:
    """Load a .tflite that gori wrote for tflite-runtime, or any other that it can run."""
    supported()
    facts, count = read_facts(file), threads or 1
    worker = Worker(file, count)
    return LegacySession(worker, facts, session_info("tflite-runtime", worker.version, file, facts, count))
