"""The read bandwidth against a C loop over eight streams, and what the measuring process insists on."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gori.runtime import bandwidth

SOURCE = """
#include <stddef.h>
#include <stdint.h>
uint64_t sum(const uint64_t *p, size_t n) {
  uint64_t s[8][8] = {{0}};
  size_t m = n / 8;
  for (size_t i = 0; i + 8 <= m; i += 8)
    for (int k = 0; k < 8; k++)
      for (int j = 0; j < 8; j++) s[k][j] += p[k * m + i + j];
  uint64_t all = 0;
  for (int k = 0; k < 8; k++) for (int j = 0; j < 8; j++) all += s[k][j];
  return all;
}
"""


def test_numpy_reads_as_fast_as_c_within_a_factor(tmp_path: Path) -> None:
    """Bound 0.6: it reached 0.97 where little else ran, and a neighbour may disturb either of the two."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler is here to compare with")
    (tmp_path / "read.c").write_text(SOURCE)
    native = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([compiler, *native, str(tmp_path / "read.c"), "-o", str(tmp_path / "read.so")], check=True)
    loop = ctypes.CDLL(str(tmp_path / "read.so")).sum
    loop.argtypes, loop.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    rows = np.ones((bandwidth.buffer_bytes() // 4 // bandwidth.COLUMNS, bandwidth.COLUMNS), np.float32)
    words = rows.reshape(-1).view(np.uint64)
    assert loop(words.ctypes.data, len(words)) == int(words.sum())
    best_c, best = 0.0, 0.0
    for _ in range(6):
        began = time.perf_counter()
        loop(words.ctypes.data, len(words))
        best_c = max(best_c, words.nbytes / (time.perf_counter() - began) / 1e9)
        best = max(best, bandwidth.read_gb_per_s(rows, 1, readings=2))
    assert best > 0.6 * best_c


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_every_row_is_read_by_one_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of the product are those of the columns: no row is left out or read by two."""
    rows = np.random.default_rng(0).integers(0, 9, (10, 16)).astype(np.float32)
    sums: list[np.ndarray] = []
    dot = np.dot

    def spied(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        sums.append(dot(a, b, out).copy())

    monkeypatch.setattr(bandwidth.np, "dot", spied)
    assert bandwidth.read_gb_per_s(rows, threads, readings=1) > 0
    # once to start the threads, once to be timed
    np.testing.assert_array_equal(sum(sums), 2 * rows.sum(0))


def test_the_buffer_does_not_fit_the_last_level_cache() -> None:
    cache = bandwidth.last_level_cache_bytes()
    assert bandwidth.SMALLEST_BYTES <= bandwidth.buffer_bytes() <= bandwidth.LARGEST_BYTES
    assert cache is None or bandwidth.buffer_bytes() >= min(4 * cache, bandwidth.LARGEST_BYTES)


def test_a_process_whose_blas_may_use_threads_of_its_own_does_not_measure() -> None:
    free = {k: v for k, v in os.environ.items() if k not in bandwidth.ONE_THREAD}
    command = [sys.executable, "-m", "gori.runtime.bandwidth", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=free)
    assert done.returncode != 0
    assert "threads of its own" in done.stderr
