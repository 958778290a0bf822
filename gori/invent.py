"""Words that nobody said: random values in the manner of a given one, so that every token is copied now and then.

A token that training never shows as an answer is pushed down by all others, and a name that holds it cannot be
copied. Latin words are put together from the vocabulary's pieces, Korean ones from syllables, the last of the
original's kind (open, ㄹ or closed), so that the particle behind it stays right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gori.tokenizer import Tokenizer

FIRST, LAST = ord("가"), ord("힣")
ANY_SYLLABLE = 0.1
"""Share of syllables drawn from all of Hangul, the others from those that the data shows."""


class Inventor:
    """Makes values like a given one."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._syllables = sorted({c for t in texts for c in t if FIRST <= ord(c) <= LAST})
        shown = (tokenizer.decode([i]).strip().lower() for i in range(tokenizer.vocab_size))
        self._pieces = sorted({p for p in shown if p.isascii() and p.isalpha()})

    def like(self, value: str, rng: np.random.Generator) -> str:
        """Each word replaced by one of its kind; numbers, signs and other scripts stay."""
        return " ".join(self._word(w, rng) for w in value.split(" "))

    def _word(self, word: str, rng: np.random.Generator) -> str:
        if word and all(FIRST <= ord(c) <= LAST for c in word) and self._syllables:
            return "".join(self._syllable(c, rng, i == len(word) - 1) for i, c in enumerate(word))
        if word.isascii() and word.isalpha() and self._pieces:
            made = "".join(self._pieces[int(i)] for i in rng.integers(0, len(self._pieces), 1 + len(word) // 4))
            return made.capitalize() if word[0].isupper() else made
        return word

    def _syllable(self, like: str, rng: np.random.Generator, last: bool) -> str:
        while True:
            if rng.random() < ANY_SYLLABLE:
                new = chr(int(rng.integers(FIRST, LAST + 1)))
            else:
                new = self._syllables[int(rng.integers(len(self._syllables)))]
            if not last or _ending(new) == _ending(like) or rng.random() < 0.01:
                return new


def _ending(syllable: str) -> str:
    final = (ord(syllable) - FIRST) % 28
    return "open" if final == 0 else "ㄹ" if final == 8 else "closed"
