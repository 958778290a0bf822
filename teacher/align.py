"""A teacher's distributions over its own tokens, carried over to a student with another tokenizer by their bytes.

At a student's token that begins at byte a of what the assistant says, let b be the bytes between the last beginning of
a teacher's token and a. The teacher's distribution there, restricted to tokens that begin with b and go on, says which
bytes follow (exact byte-level conditioning: Phan et al., arXiv 2410.09303, section 3). Each such token's remaining
bytes go to the student's token of the same bytes, or to the first one that the student's tokenizer cuts from them; the
true token's go to the student's true token, and where that is longer than one teacher's token, with the product of the
probabilities along the true text (the chain rule). What has no place is missing from the sum: it is the tail.

Sorted matching (ULD, arXiv 2402.12030) was left out: it pairs tokens that have nothing to do with each other.
Calls: a template writes them as JSON, a student as special tokens. Only values are the same text, so the student's
tokens of structure are told by the true answer. Shapes: V the student's vocabulary, T the teacher's.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gori.calls import Function
from gori.teacher.cache import Asked, Row
from gori.teacher.foreign_rows import Said, definitions, spoken_by, token_bytes
from gori.tokenizer import Tokenizer

NAMED = re.compile(r"<\|(?:call|arg):(.*)\|>", re.DOTALL)
ENDS_VALUE = (b'"', b"\\")
"""A JSON string ends, or is escaped, with these: no bytes of the value itself."""


@dataclass(frozen=True)
class Spot:
    """Where one student's token stands in what the teacher reads."""

    token: int
    said: Said | None = None
    """None: the teacher does not say this token, the truth stands for it."""
    at: int = 0
    """Byte of `said.text` at which it begins."""
    lead: bool = False
    """Whether it has a space before it that the teacher's text has not."""
    quoted: bool = False
    """Whether it stands in a JSON string."""


@dataclass(frozen=True)
class Moves:
    """Teacher's tokens and where their probability goes, int64 `[n]` both; -1: nowhere."""

    source: Tensor
    target: Tensor
    place: dict[int, int]
    """Teacher's token → its index here."""


class Aligner:
    """Both vocabularies by their bytes, and the moves between them, made as they are needed."""

    def __init__(self, teacher: Any, student: Tokenizer, functions: Mapping[str, Function]) -> None:
        self._teacher, self._student, self._tools = teacher, student, definitions(functions)
        self.bytes, self._special = token_bytes(teacher)
        self.pieces, self.size = student.pieces, student.vocab_size
        self._by_bytes = {p: i for i, p in reversed(list(enumerate(self.pieces))) if p}
        self._names = {student.token_bytes(i): i for i in range(self.size) if not self.pieces[i]}
        plain = [i for i in range(len(self.bytes)) if i not in self._special and self.bytes[i]]
        self._sorted = sorted((self.bytes[i], i) for i in plain)
        self._moves: dict[tuple[bytes, bool, bool], Moves] = {}

    def ask(self, row: Row) -> Asked:
        """The row in the teacher's template, and how its answers are carried over."""
        c, example = row
        ids, said = spoken_by(self._teacher, c, self._tools, self.bytes)
        wanted, spots = [False] * len(ids), []
        for turn, tokens in zip(said, _runs(example.ids, example.loss), strict=True):
            for i in range(turn.first, turn.first + max(0, len(turn.at) - 1)):
                wanted[i] = True
            spots += self._spots(tokens, turn if turn.at else None)
        rows = {i: n for n, i in enumerate(i for i, w in enumerate(wanted) if w)}
        unknown = sum(s.said is None for s in spots)
        return Asked(example, ids, wanted, self._carry(ids, rows, spots), unknown)

    def _spots(self, tokens: Sequence[int], said: Said | None) -> list[Spot]:
        """Where the tokens of one answer stand; special tokens and runs of text in turn."""
        out: list[Spot] = []
        cursor, n = 0, 0
        while n < len(tokens):
            end = n + 1
            if not self.pieces[tokens[n]]:
                spot, cursor = self._special_spot(tokens[n], said, cursor)
                out.append(spot)
            else:
                while end < len(tokens) and self.pieces[tokens[end]]:
                    end += 1
                spots, cursor = self._text_spots(tokens[n:end], said, cursor)
                out += spots
            n = end
        return out

    def _special_spot(self, token: int, said: Said | None, cursor: int) -> tuple[Spot, int]:
        """A special token: the teacher's of the same name, or its own that stands there (an end of turn); else unknown,
        and what it names is searched, for the value that follows."""
        if said is None:
            return Spot(token), cursor
        name = self._student.token_bytes(token)
        if said.text.startswith(name, cursor):
            return Spot(token, said, cursor), cursor + len(name)
        if m := NAMED.fullmatch(name.decode()):
            found = said.text.find(m[1].encode(), cursor)
            return Spot(token), found + len(m[1].encode()) if found >= 0 else cursor
        return Spot(token, said if self._special_at(said, cursor) else None, cursor), cursor

    def _special_at(self, said: Said, at: int) -> bool:
        """Whether one of the teacher's special tokens begins there."""
        return at in said.at and any(n and said.text.startswith(n.encode(), at) for n in self._special.values())

    def _text_spots(self, tokens: Sequence[int], said: Said | None, cursor: int) -> tuple[list[Spot], int]:
        text = b"".join(self.pieces[t] for t in tokens)
        if said is None:
            return [Spot(t) for t in tokens], cursor
        begin, lead, quoted = cursor, False, False
        if not said.text.startswith(text, cursor):
            value = re.compile(rb"(?<![\w])" + re.escape(text.removeprefix(b" ")) + rb"(?![A-Za-z0-9_])")
            m = value.search(said.text, cursor)
            if not m:
                return [Spot(t) for t in tokens], cursor
            begin, lead = m.start(), text.startswith(b" ")
            quoted = said.text[:begin].endswith(b'"')
        out, at = [], begin
        for n, t in enumerate(tokens):
            first = lead and n == 0
            length = len(self.pieces[t]) - first
            out.append(Spot(t, said, at, first, quoted) if length else Spot(t))
            at += length
        return out, at

    def _carry(self, ids: Sequence[int], rows: Mapping[int, int], spots: Sequence[Spot]) -> Callable[[Tensor], Tensor]:
        def carry(probs: Tensor) -> Tensor:
            out = probs.new_zeros(len(spots), self.size)
            for n, spot in enumerate(spots):
                if spot.said is None:
                    out[n, spot.token] = 1
                else:
                    self._project(out[n], spot, spot.said, ids, rows, probs)
            return out

        return carry

    def _project(
        self, out: Tensor, spot: Spot, said: Said, ids: Sequence[int], rows: Mapping[int, int], probs: Tensor
    ) -> None:
        """Fill one student's distribution `[V]` in place."""
        j = next(n for n in range(len(said.at) - 1) if said.at[n + 1] > spot.at)
        true, prefix = ids[said.first + j], said.text[said.at[j] : spot.at]
        moves = self._moves_after(prefix, spot.lead, spot.quoted)
        p = probs[rows[said.first + j]]
        moved = p[moves.source.to(p.device)]
        if prefix:
            moved = moved / moved.sum().clamp(min=torch.finfo(moved.dtype).tiny)
        target = moves.target.to(p.device).clone()
        here = moves.place.get(true)
        assert here is not None
        target[here] = -1
        out.index_add_(0, target[target >= 0], moved[target >= 0])
        rest = said.text[spot.at : spot.at + len(self.pieces[spot.token]) - spot.lead]
        share = moved[here]
        while len(said.text[spot.at : said.at[j + 1]]) < len(rest):
            j += 1
            left = rest[said.at[j] - spot.at :]
            following = probs[rows[said.first + j]]
            longer = said.at[j + 1] - said.at[j] >= len(left)
            share = share * (self._beginning(following, left) if longer else following[ids[said.first + j]])
        out[spot.token] += share

    def _beginning(self, p: Tensor, prefix: bytes) -> Tensor:
        """The probability that the bytes `prefix` come first, in one token."""
        return p[[i for _, i in self._range(prefix)]].sum()

    def _range(self, prefix: bytes) -> list[tuple[bytes, int]]:
        """Text tokens that begin with `prefix`."""
        start = bisect_left(self._sorted, (prefix, -1))
        end = start
        while end < len(self._sorted) and self._sorted[end][0].startswith(prefix):
            end += 1
        return self._sorted[start:end]

    def _moves_after(self, prefix: bytes, lead: bool, quoted: bool) -> Moves:
        key = (prefix, lead, quoted)
        if key not in self._moves:
            pairs = []
            for b, i in self._range(prefix):
                if len(b) > len(prefix):
                    pairs.append((i, self._target(b[len(prefix) :], lead, quoted)))
            if not prefix:
                pairs += [(i, self._names.get(name.encode(), -1)) for i, name in self._special.items()]
            pairs.sort()
            source, target = (torch.tensor(x, dtype=torch.long) for x in zip(*pairs, strict=True))
            self._moves[key] = Moves(source, target, {i: n for n, (i, _) in enumerate(pairs)})
        return self._moves[key]

    def _target(self, rest: bytes, lead: bool, quoted: bool) -> int:
        """The student's token for a teacher's remaining bytes: of the same bytes, else the first that is cut."""
        if quoted and rest.startswith(ENDS_VALUE):
            return -1
        rest = b" " + rest if lead else rest
        same = self._by_bytes.get(rest)
        if same is not None:
            return same
        try:
            cut = self._student.encode(rest.decode())
        except UnicodeDecodeError:
            return -1
        return cut[0] if cut and rest.startswith(self.pieces[cut[0]]) else -1


def _runs(ids: Sequence[int] | NDArray[Any], loss: Sequence[bool] | NDArray[Any]) -> list[list[int]]:
    """The token ids of each assistant's turn."""
    out: list[list[int]] = []
    for n, (i, answer) in enumerate(zip(ids, loss, strict=True)):
        if answer and not loss[n - 1]:
            out.append([])
        if answer:
            out[-1].append(int(i))
    return out
