"""How fast this machine reads memory: `python -m gori.runtime.bandwidth --threads 1` prints one JSON object.

A buffer several times the last-level cache is read from end to end by a product of a vector of ones with it as a
matrix of 4096 columns: BLAS then adds several rows at once to 16 KiB of sums that stay in the first cache, so that
several streams of memory are open, as in a product with weights. NumPy's own reductions (sum, maximum, bitwise or)
read one stream and reached 0.6–0.75 of what a C loop over 8 streams reads on the x86-64 machine of
docs/performance.md (gcc -O3 -march=native); this reaches 0.9–0.97 of it. tests/test_bandwidth.py compares the two where
a C compiler is. No torch.

The figure is the best of several readings: what can be read while neighbours are quiet. It is no limit for a model
that fits the last-level cache, which may read faster, and it says nothing about random access, writing, or memory of
other sockets. A virtual machine's share of cache and memory is not known; neighbours take theirs at any moment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SMALLEST_BYTES, LARGEST_BYTES, TIMES_CACHE = 128 << 20, 1 << 30, 4
"""The buffer is so many times the last-level cache, within these bounds."""
USUAL_CACHE_BYTES = 32 << 20
"""Where the system does not say how large the last-level cache is."""
COLUMNS = 4096
READINGS = 5
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""Environment that keeps BLAS from adding threads of its own; it must stand before NumPy is loaded."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache_bytes() -> int | None:
    """Bytes of the largest cache that processor 0 sees; None where the system does not tell."""
    sizes = [p.read_text(encoding="ascii").strip() for p in CACHES.glob("index*/size")]
    return max((int(s[:-1]) << {"K": 10, "M": 20, "G": 30}[s[-1]] for s in sizes if s[-1:] in "KMG"), default=None)


def buffer_bytes() -> int:
    """How much is read at a time, a whole number of rows."""
    wanted = TIMES_CACHE * (last_level_cache_bytes() or USUAL_CACHE_BYTES)
    return min(max(wanted, SMALLEST_BYTES), LARGEST_BYTES)


def read_gb_per_s(buffer_RC: NDArray[np.float32], threads: int, readings: int = READINGS) -> float:
    """Best of several readings of a float32 buffer `[R, C]`, in 10^9 bytes a second; each thread reads its own rows."""
    parts = [p for p in np.array_split(buffer_RC, threads) if len(p)]
    ones = [np.ones(len(p), np.float32) for p in parts]
    sums = [np.empty(p.shape[1], np.float32) for p in parts]
    took_s = []
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(readings + 1):
            began = time.perf_counter()
            # np.dot gives up the interpreter's lock while it computes
            list(pool.map(np.dot, ones, parts, sums))
            took_s.append(time.perf_counter() - began)
    # the first one starts the threads
    return buffer_RC.nbytes / min(took_s[1:]) / 1e9


def main(arguments: list[str] | None = None) -> None:
    """The command that `gori bench` starts in each round."""
    parser = argparse.ArgumentParser(prog="gori.runtime.bandwidth", description=__doc__)
    parser.add_argument("--threads", type=int, action="append", required=True)
    parser.add_argument("--readings", type=int, default=READINGS)
    a = parser.parse_args(arguments)
    assert all(os.environ.get(k) == v for k, v in ONE_THREAD.items()), "BLAS would add threads of its own"
    buffer = np.ones((buffer_bytes() // 4 // COLUMNS, COLUMNS), np.float32)
    found = {str(n): read_gb_per_s(buffer, n, a.readings) for n in a.threads}
    json.dump({"buffer_bytes": buffer.nbytes, "gb_per_s": found}, sys.stdout)


if __name__ == "__main__":
    main()
