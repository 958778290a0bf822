"""Two models over the same wanted answers, token by token: a checkpoint in batches in eager torch, an artifact by its
engine one token after the other.

Logits of one row exist at once, so that neither rows nor a large vocabulary fill the memory; only a few numbers a token
are kept. Knows nothing of intervals. Shapes: N answer tokens, B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gori import console, evaluate
from gori.data import Conversation, Example, collate, encode, prompt_ids
from gori.errors import GoriError
from gori.runtime.session import Session
from gori.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gori.model import Decoder

BATCH_TOKENS = 4096
"""Padded tokens of an eager batch, at most (one longer row is a batch of its own)."""


@dataclass(frozen=True)
class Row:
    """One conversation as token ids; the answer begins after `prompt` of them."""

    ids: list[int]
    prompt: int

    @property
    def answer(self) -> list[int]:
        """What is to be said, the end mark included."""
        return self.ids[self.prompt :]


Answers = Callable[[Sequence[Row]], Iterator[np.ndarray]]
"""Rows → for each of them in turn the float32 logits `[answer tokens, V]`."""


@dataclass(frozen=True)
class Tokens:
    """One entry for each answer token."""

    kl_N: NDArray[np.float64]
    """KL(reference || model) in nats."""
    nll_N: NDArray[np.float64]
    """-log p(wanted token) of the model, nats."""
    nll_reference_N: NDArray[np.float64]
    same_N: NDArray[np.bool_]
    """Both find the same token likeliest."""
    row_N: NDArray[np.int64]
    """Number of the row that the token belongs to."""


def as_row(c: Conversation, tokenizer: Tokenizer) -> Row:
    return Row(encode(c, tokenizer).ids, len(prompt_ids(c, tokenizer)))


def engine_answers(session: Session) -> Answers:
    """Prefill of the prompt, then a step for each token of the answer, as when it is generated."""

    def run(rows: Sequence[Row]) -> Iterator[np.ndarray]:
        for r in rows:
            session.reset()
            first = session.prefill(r.ids[: r.prompt])
            yield np.stack([first, *(session.decode(t) for t in r.answer[:-1])])

    return run


def eager_answers(model: Decoder) -> Answers:
    """One forward pass for rows that fit a batch; give them sorted by length, or padding is computed."""
    import torch

    @torch.inference_mode()
    def hidden(rows: Sequence[Row]) -> Sequence[torch.Tensor]:
        """Hidden states `[answer tokens, D]` of each row."""
        # nothing that a causal model computes sees what stands to its right, so any id pads
        ids_BT = torch.from_numpy(collate([Example(r.ids, [False] * len(r.ids)) for r in rows], pad=0).ids)
        wanted_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        for i, r in enumerate(rows):
            wanted_BT[i, r.prompt - 1 : len(r.ids) - 1] = True
        return model.hidden(ids_BT, wanted_BT=wanted_BT).split([len(r.answer) for r in rows])

    @torch.inference_mode()
    def logits(states_ND: torch.Tensor) -> np.ndarray:
        return model.logits(states_ND).float().numpy()

    def run(rows: Sequence[Row]) -> Iterator[np.ndarray]:
        for r in rows:
            if len(r.ids) > model.cfg.max_position:
                raise GoriError(
                    f"a row of {len(r.ids)} tokens exceeds the context of {model.cfg.max_position}: shorten it"
                )
        for batch in _batches(
            rows
        ):  # no mode of torch's is held while a generator waits: it would stay with its caller
            yield from map(logits, hidden(batch))

    return run


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    start, longest = 0, 0
    for end, r in enumerate(rows):
        longest = max(longest, len(r.ids))
        if end > start and (end + 1 - start) * longest > BATCH_TOKENS:
            yield rows[start:end]
            start, longest = end, len(r.ids)
    yield rows[start:]


def compare(model: Answers, reference: Answers, rows: Sequence[Row], label: str = "compare") -> Tokens:
    """Run both models over the rows, of which there is at least one; GoriError where their vocabularies differ in size
    or a logit is not a number."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    some = [rows[i] for i in order]
    parts = []
    with console.steps(label, len(rows)) as bar:
        for done, (i, mine, theirs) in enumerate(zip(order, model(some), reference(some), strict=True), 1):
            parts.append((*_of_row(mine, theirs, rows[i].answer), np.full(len(mine), i)))
            bar.update(done, "")
    return Tokens(*(np.concatenate(p) for p in zip(*parts, strict=True)))


def _of_row(
    mine: np.ndarray, theirs: np.ndarray, wanted: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    if mine.shape != theirs.shape:
        raise GoriError(f"the model has a vocabulary of {mine.shape[1]} and the reference one of {theirs.shape[1]}")
    q, p = evaluate.log_softmax(mine), evaluate.log_softmax(theirs)
    kl, at = (np.exp(p) * (p - q)).sum(-1), (np.arange(len(wanted)), np.asarray(wanted))
    if np.isnan(kl).any():
        raise GoriError(f"the {'model' if np.isnan(q).any() else 'reference'} gives logits that are not numbers")
    return np.maximum(kl, 0), -q[at], -p[at], mine.argmax(-1) == theirs.argmax(-1)  # float64 leaves -1e-17 of zero
