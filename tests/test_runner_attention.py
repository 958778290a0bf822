"""The C++ runner's attention against the same in float64: any number of heads, groups, positions and sizes."""

from __future__ import annotations

import ctypes

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runner_probe import probe_library

Floats = NDArray[np.float32]


def attended(q: Floats, keys: Floats, values: Floats, start: int, scale: float) -> Floats:
    """The runner's: q [S, H, d], keys and values [C, K, d] → [S, H, d]."""
    (S, H, d), K = q.shape, keys.shape[1]
    y = np.full_like(q, np.nan)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (q, keys, values)]
    shape = (ctypes.c_size_t * 4)(S, H, K, d)
    end = y.ctypes.data_as(ctypes.c_void_p)
    probe_library().probe_attention(shape, ctypes.c_size_t(start), *pointers, ctypes.c_float(scale), end)
    return y


def plain(q: Floats, keys: Floats, values: Floats, start: int, scale: float) -> NDArray[np.float64]:
    S, H, _ = q.shape
    group = H // keys.shape[1]
    y = np.empty(q.shape)
    for s in range(S):
        for h in range(H):
            seen = slice(0, start + s + 1)
            k, v = (t[seen, h // group].astype(np.float64) for t in (keys, values))
            score = k @ q[s, h].astype(np.float64) * scale
            weight = np.exp(score - score.max())
            y[s, h] = weight @ v / weight.sum()
    return y


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 9),
    keys=st.integers(1, 3),
    group=st.integers(1, 6),
    size=st.sampled_from([2, 8, 16, 20, 32, 40, 64]),
    start=st.integers(0, 70),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_attention_is_that_of_float64(
    seed: int, tokens: int, keys: int, group: int, size: int, start: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Floats:
        return rng.normal(0, 1, shape).astype(np.float32)

    q = normal(tokens, keys * group, size) * np.float32(spread)
    k, v = normal(start + tokens, keys, size), normal(start + tokens, keys, size)
    scale = size**-0.5
    wanted = plain(q, k, v, start, scale)
    # a score of some hundreds is rounded to 1e-5, and its weight by as much
    np.testing.assert_allclose(
        attended(q, k, v, start, scale), wanted, rtol=0, atol=2e-6 * max(1.0, spread * size**0.5)
    )
