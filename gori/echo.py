"""Copy practice: rows that repeat pieces of what was just said, so that copying circuits form early.

A small model trained on calls alone sees few copied tokens and finds induction (match the last token earlier on, take what
followed it; arXiv 2209.11895) late. In an echo row nearly every predicted token is a copy:
`<|user|> words … <|echo|>piece<|echo|>piece`, loss on each piece from its second token on, because its first one cannot
be known. Needs nothing but the rows that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gori.data import Example

PIECES = 2


def echo(e: Example, marker: int, rng: np.random.Generator) -> Example:
    """A row's prompt and two random pieces of it, each of 2 tokens at least; rows that say less come back unchanged."""
    said = e.ids[1 : e.loss.index(True) - 1] if True in e.loss else []
    if len(said) < 2:
        return e
    ids, loss = [e.ids[0], *said], [False] * (1 + len(said))
    for _ in range(PIECES):
        start = int(rng.integers(0, len(said) - 1))
        piece = said[start : start + 2 + int(rng.integers(0, len(said) - start - 1))]
        ids += [marker, *piece]
        loss += [False, False] + [True] * (len(piece) - 1)
    return Example(ids, loss)


def share_at(step: int, steps: int, share: float, until: float) -> float:
    """Share of echo rows at a step: `share` at first, falling linearly to none at `until` of all steps."""
    return share * max(0.0, 1 - step / max(1.0, until * steps))


def mix(rows: Sequence[Example], share: float, marker: int, seed: int, step: int) -> list[Example]:
    """A batch with a share of its rows turned into echo rows; a pure function of its arguments."""
    rng = np.random.default_rng([seed, 104729, step])
    draws = rng.random(len(rows))
    return [echo(e, marker, rng) if draw < share else e for e, draw in zip(rows, draws, strict=True)]
