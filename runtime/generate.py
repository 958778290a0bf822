"""Greedy and sampled generation over a Session, and text that arrives token by token. No torch.

A Hangul syllable may be split over tokens: `Utf8Stream` gives out only what is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gori.errors import GoriError
from gori.runtime.session import Session
from gori.tokenizer import Tokenizer


def choose(
    logits: np.ndarray, rng: np.random.Generator | None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """A token id from logits `[V]`: the largest where `rng` is None or temperature 0, else sampled from the softmax at
    `temperature`, cut to the `top_k` likeliest (0: all) and to the smallest set that holds `top_p` (1904.09751)."""
    if rng is None or temperature == 0:
        return int(logits.argmax())
    x = logits.astype(np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    p = p[:keep] / p[:keep].sum()
    return int(order[rng.choice(len(p), p=p)])


Pick = Callable[[np.ndarray], int]
"""A token id from logits `[V]`, of which some may be -inf."""


def picker(seed: int | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Pick:
    """How tokens are chosen: greedy where `seed` is None, else `choose` with a generator of that seed."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise GoriError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}: allowed are >= 0, (0, 1], >= 0")
    rng = None if seed is None else np.random.default_rng(seed)
    return lambda logits: choose(logits, rng, temperature, top_k, top_p)


def generate(
    session: Session, prompt: Sequence[int], end: Sequence[int], *, max_new: int = 256, pick: Pick | None = None
) -> Iterator[int]:
    """Yield the answer's token ids up to an end mark (left out), `max_new` tokens or a full context.

    The prompt is appended to what the session holds. Without `pick` the likeliest token is taken.
    """
    pick = pick or picker()
    logits = session.prefill(prompt)
    for said in range(max_new):
        token = pick(logits)
        if token in end:
            return
        yield token
        if said + 1 == max_new or session.length >= session.info.context:
            return
        logits = session.decode(token)


class Utf8Stream:
    """Bytes of tokens in, complete characters out; what never becomes UTF-8 is U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def close(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)
