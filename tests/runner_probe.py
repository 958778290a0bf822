"""The C++ runner for tests: its parts through tests/cpp/probe.cpp (no model), and the whole through its C interface.

Both are called by ctypes. What needs a compiler, CMake or ExecuTorch is skipped where these are not installed.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "runtime" / "cpp"
PARTS = ("tables", "sound", "tokenizer", "grammar", "attention")
CAPACITY = 1 << 17
SANITIZE = os.environ.get("GORI_SANITIZE", "")
"""Of a process in which the sanitizer's library was preloaded (test_runner.py)."""


@cache
def probe_library() -> ctypes.CDLL:
    """tests/cpp/probe.cpp with the parts of the runner that need no engine, compiled once for all tests."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    out = Path(tempfile.mkdtemp(prefix="gori-probe-")) / "probe.so"
    files = [ROOT / "tests" / "cpp" / "probe.cpp", *(SOURCES / f"{p}.cpp" for p in PARTS)]
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}"]
    command += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g"] if SANITIZE else []
    done = subprocess.run([*command, *map(str, files), "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(out))
    shutil.rmtree(out.parent)
    library.probe_open.restype = ctypes.c_void_p
    library.probe_error.restype = ctypes.c_char_p
    for name in ("probe_tokens", "probe_normalized", "probe_allowed"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


class Probe:
    """One runner.bin. Raises ValueError with the runner's sentence where it refuses the file."""

    def __init__(self, path: Path) -> None:
        self._c = probe_library()
        handle = self._c.probe_open(str(path).encode())
        if handle is None:
            raise ValueError(self._c.probe_error().decode())
        self._at = ctypes.c_void_p(handle)
        self._ids = (ctypes.c_uint32 * CAPACITY)()

    def close(self) -> None:
        self._c.probe_close(self._at)

    def tokens(self, text: str | bytes) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        count = self._c.probe_tokens(self._at, raw, ctypes.c_size_t(len(raw)), self._ids, ctypes.c_size_t(CAPACITY))
        assert count <= CAPACITY
        return self._ids[:count]

    def normalized(self, text: str | bytes) -> str:
        raw = text.encode() if isinstance(text, str) else text
        out = ctypes.create_string_buffer(len(raw) * 16 + 16)
        size = ctypes.c_size_t(len(out))
        count = self._c.probe_normalized(self._at, raw, ctypes.c_size_t(len(raw)), out, size)
        return out.raw[:count].decode()

    def begin(self, said: str, budget: int) -> None:
        raw = said.encode()
        if self._c.probe_begin(self._at, raw, ctypes.c_size_t(len(raw)), ctypes.c_uint32(budget)):
            raise ValueError(self._c.probe_error().decode())

    def allowed(self) -> tuple[list[int], int | None]:
        """What may follow, and the only token that may if it is the only one."""
        forced = ctypes.c_int64()
        count = self._c.probe_allowed(self._at, self._ids, ctypes.c_size_t(CAPACITY), ctypes.byref(forced))
        return self._ids[:count], None if forced.value < 0 else forced.value

    def advance(self, token: int) -> bool:
        """Whether the answer is at its end."""
        done = self._c.probe_advance(self._at, ctypes.c_uint32(token))
        if done < 0:
            raise ValueError(self._c.probe_error().decode())
        return bool(done)


@cache
def build(*, sanitize: str = SANITIZE, tests: bool = False) -> Path:
    """A directory with libgori.so, gori-call and, if asked for, the tests' programs; built by CMake where it is old."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("building the runner needs CMake and a C++ compiler")
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        pytest.skip("building the runner needs ExecuTorch")
    out = ROOT / "build" / ("runner" + ("-" + sanitize.replace(",", "-") if sanitize else ""))
    sources = [*SOURCES.iterdir(), *((ROOT / "tests" / "cpp").iterdir() if tests else ())]
    wanted = [out / n for n in ("libgori.so", "gori-call", *(("gori-stress", "gori-allocations") if tests else ()))]
    newest = max(s.stat().st_mtime for s in sources)
    out.parent.mkdir(exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:  # of several test processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(not w.exists() or w.stat().st_mtime < newest for w in wanted):
            _compile(out, Path(next(iter(found.submodule_search_locations))), sanitize, tests)
    return out


def _compile(out: Path, executorch: Path, sanitize: str, tests: bool) -> None:
    how = [f"-DEXECUTORCH_ROOT={executorch}", f"-DGORI_SANITIZE={sanitize}"]
    how += ["-DGORI_TESTS=ON"] if tests else []
    how += ["-G", "Ninja"] if shutil.which("ninja") and not (out / "CMakeCache.txt").exists() else []
    for command in (["cmake", "-S", SOURCES, "-B", out, *how], ["cmake", "--build", out, "--parallel", "2"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


class Options(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), *((n, ctypes.c_int32) for n in ("threads", "use_prefix", "lookup"))]


class CallOptions(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("form", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("seed", ctypes.c_uint64),
    ]


class Result(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("text", ctypes.c_char_p),
        ("capacity", ctypes.c_size_t),
        ("length", ctypes.c_size_t),
        ("prompt_tokens", ctypes.c_uint32),
        ("prefix_tokens", ctypes.c_uint32),
        ("answer_tokens", ctypes.c_uint32),
        ("forced_tokens", ctypes.c_uint32),
        ("guessed_tokens", ctypes.c_uint32),
        ("confirmed_tokens", ctypes.c_uint32),
        ("first_token_ms", ctypes.c_double),
        ("total_ms", ctypes.c_double),
    ]


class Facts(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t)] + [
        (n, ctypes.c_uint32) for n in ("vocabulary", "context", "chunk", "threads", "functions", "prefix_tokens")
    ]


OnText = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t)
CALLS, GLEO, TEXT = 0, 1, 2
LOOKUP_MEASURED, LOOKUP_ALWAYS, LOOKUP_NEVER = 0, 1, 2
OK, ARGUMENT, FILE, ENGINE, TOO_LONG, NO_CALL, CAPACITY_STATUS, CANCELLED, MEMORY, INTERNAL = range(10)


class RunnerError(Exception):
    """A status that is not GORI_OK, and what gori_error says of it."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class Library:
    """libgori.so as it is, for tests of what callers may do wrong."""

    def __init__(self, directory: Path) -> None:
        self.c = ctypes.CDLL(str(directory / "libgori.so"))
        self.c.gori_error.restype = self.c.gori_version.restype = ctypes.c_char_p
        self.c.gori_close.restype = self.c.gori_cancel.restype = None
        for name in ("gori_close", "gori_cancel"):
            getattr(self.c, name).argtypes = [ctypes.c_void_p]

    def check(self, status: int) -> None:
        if status:
            raise RunnerError(status, self.c.gori_error().decode())


class Runner:
    """One open artifact."""

    def __init__(self, library: Library, artifact: Path, **options: int) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        settings = (options.get("threads", 0), options.get("use_prefix", 1), options.get("lookup", LOOKUP_MEASURED))
        given = Options(ctypes.sizeof(Options), *settings)
        library.check(
            library.c.gori_open(str(artifact).encode(), ctypes.byref(given), ctypes.byref(self.handle)),
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.c.gori_close(self.handle)

    def call(self, said: str | bytes, capacity: int = 1 << 16, **options: Any) -> tuple[str, Result]:
        """The answer's text and what else is known of it."""
        buffer = ctypes.create_string_buffer(capacity)
        result = Result(ctypes.sizeof(Result), ctypes.cast(buffer, ctypes.c_char_p), capacity)
        given = CallOptions(ctypes.sizeof(CallOptions), **options)
        raw = said.encode() if isinstance(said, str) else said
        status = self.library.c.gori_call(self.handle, raw, ctypes.byref(given), ctypes.byref(result))
        self.library.check(status)
        return buffer.raw[: result.length].decode(), result

    def tokens(self, text: bytes) -> list[int]:
        ids, count = (ctypes.c_uint32 * CAPACITY)(), ctypes.c_size_t()
        size, room = ctypes.c_size_t(len(text)), ctypes.c_size_t(CAPACITY)
        self.library.check(self.library.c.gori_tokens(self.handle, text, size, ids, room, ctypes.byref(count)))
        return ids[: count.value]
