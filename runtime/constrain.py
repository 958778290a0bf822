"""What may be said next while a model answers with calls: the walk through a grammar (gori/grammar.py), token by token.

Every answer that ends is a list of calls that parses and fits its schemas, and every answer ends within its budget of
tokens: a token after which the shortest ending would not fit any more is not allowed. runtime/cpp/grammar.cpp is the
same walk; a test compares the two step by step. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.errors import GoriError
from gori.grammar import COPY, NOWHERE, REPEATS, REQUIRED, Grammar, open_automaton

MOST_CALLS = 8
"""Calls of one answer."""
NEVER = 1 << 30


class PromptError(GoriError):
    """What was asked leaves no room for an answer; the model and its engine are well."""


class Vocabulary:
    """What a grammar's tokens are as text; one for all answers of a model."""

    def __init__(self, grammar: Grammar, pieces: Sequence[bytes]) -> None:
        a = grammar.arrays
        self.pieces = list(pieces)
        self.size = len(self.pieces)
        self.tokens = {p: i for i, p in enumerate(self.pieces) if p}
        self.longest = max(map(len, self.pieces))
        self.none, self.ends = int(a["marks"][0]), [int(t) for t in a["marks"][2:]]
        self.functions, self.arguments = grammar.functions.tolist(), grammar.arguments.tolist()
        self.function_of = {row[0]: i for i, row in enumerate(self.functions)}
        self.wide = len(a["mask_of"])
        self.accept, self.finish = a["accept"].tolist(), a["finish"].tolist()
        self.masks = np.unpackbits(
            a["masks"].view(np.uint8).reshape(-1, -(-self.size // 32) * 4), axis=1, bitorder="little"
        )[:, : self.size].astype(bool)
        self.mask_of = a["mask_of"].tolist()
        self.byte_class = a["byte_class"].tolist()
        self.byte_next = a["byte_next"].reshape(self.wide, -1).tolist() if self.wide else []
        self.edges: list[dict[int, int]] = []
        at = a["edges_at"].tolist()
        tokens, after = a["edge_token"].tolist(), a["edge_next"].tolist()
        for begin, end in pairwise(at):
            self.edges.append(dict(zip(tokens[begin:end], after[begin:end], strict=True)))
        self.longest_wide = max((f for f in self.finish[: self.wide] if f != NOWHERE), default=0)

    def step(self, state: int, token: int) -> int:
        """The state after a token, or NOWHERE."""
        if state >= self.wide:
            return self.edges[state - self.wide].get(token, NOWHERE)
        for byte in self.pieces[token]:
            state = self.byte_next[state][self.byte_class[byte]]
            if state == NOWHERE:
                return NOWHERE
        return state if self.pieces[token] else NOWHERE


class Utterance:
    """Where copied values may come from: the words that were said, as bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.reach = [NEVER] * (len(text) + 1)
        """From each place: bytes until a character that is no white space has been read to its end."""
        any_text = open_automaton("string")
        after_space = int(any_text.next[0, 0x20])
        self.beginnings: list[int] = []
        """Where a value can begin: at a character that is no white space."""
        end = len(text)
        for place in range(len(text) - 1, -1, -1):
            if not self._starts(place):
                continue
            state = after_space
            for byte in text[place:end]:
                state = int(any_text.next[state, byte]) if state >= 0 else state
            said = state >= 0 and bool(any_text.accept[state])
            # white space ends no value, so from inside it the character behind it is read, too
            for inside in range(place, end):
                self.reach[inside] = min(NEVER, end - inside + (0 if said else self.reach[end]))
            if said:
                self.beginnings.append(place)
            end = place
        self.beginnings.reverse()
        self.shortest = 1 + min((self.reach[p] for p in self.beginnings), default=NEVER)
        """Tokens that a value of one character may need, the space before it included."""

    def _starts(self, place: int) -> bool:
        """A character begins here, or the text ends."""
        return place == len(self.text) or not 0x80 <= self.text[place] < 0xC0


class Constraint:
    """One answer. `allowed` says what may follow, `advance` says what did."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        utterance: str,
        budget: int,
        only: Collection[int] | None = None,
        must_call: bool = False,
        most_calls: int = MOST_CALLS,
    ) -> None:
        """`budget` counts the tokens of the whole answer, the end mark among them. `only` are the functions that may be
        called, by their place in the grammar (None: all), `must_call` forbids to say that none fits. Raises
        PromptError where no answer fits."""
        if budget < 2:
            raise PromptError(f"an answer of {budget} tokens cannot say even that no function fits: allow 2 or more")
        self.v, self.left = vocabulary, budget
        self._only, self._must_call, self._most_calls = only, must_call, most_calls
        self.done = False
        self.function, self.argument, self.state = -1, -1, -1
        self.used = 0
        self.calls = 0
        self.said_none = False
        self._said = utterance.encode()
        self._places: list[int] = []
        if must_call and not self.allowed()[0]:
            need = min((need for _, need in self._calls()), default=NEVER)
            short = f"the shortest needs {need + 1}" if need < NEVER else "none can be made of these words"
            raise PromptError(f"an answer of {budget} tokens has to be a call, but {short}: allow more, or no call")

    # --- what may follow ---

    def allowed(self) -> tuple[list[int], NDArray[np.bool_] | None]:
        """Tokens one by one, and a mask `[V]` of further ones or None."""
        if self.said_none:
            return list(self.v.ends), None
        listed = [t for t, need in self._structural() if need <= self.left - 1]
        if self.state < 0:
            return listed, None
        if self._copies():
            return listed + sorted(self._copied_tokens()), None
        if self.state >= self.v.wide:
            edges = self.v.edges[self.state - self.v.wide]
            rest = self._rest()
            return listed + [t for t, n in edges.items() if self.v.finish[n] + rest <= self.left - 1], None
        return listed, self._mask()

    def forced(self) -> int | None:
        """The only token that may follow, if it is the only one."""
        listed, mask = self.allowed()
        if mask is not None and mask.any():
            return None if listed or mask.sum() > 1 else int(mask.argmax())
        return listed[0] if len(listed) == 1 else None

    def _mask(self) -> NDArray[np.bool_]:
        mask = self.v.masks[self.v.mask_of[self.state]]
        rest = self._rest()
        if self.v.longest_wide + rest <= self.left - 1:
            return mask
        mask = mask.copy()
        for t in np.flatnonzero(mask).tolist():
            mask[t] = self.v.finish[self.v.step(self.state, t)] + rest <= self.left - 1
        return mask

    def _structural(self) -> Iterator[tuple[int, int]]:
        """Special tokens that may follow here, each with what an ending after it needs."""
        if self.function < 0:
            if not self._must_call:
                yield self.v.none, 1
            yield from self._calls()
            return
        if self.state >= 0 and not self._accepts():
            return
        missing, complete = self._rest(), True
        _, first, count = self.v.functions[self.function]
        for i in range(first, first + count):
            token, _, flags = self.v.arguments[i]
            seen = self.used >> (i - first) & 1
            complete = complete and bool(seen or not flags & REQUIRED)
            if not seen or (flags & REPEATS and i == self.argument):
                need = self._need(i)
                yield token, missing + need - (1 + need if not seen and flags & REQUIRED else 0)
        if complete:
            yield from ((t, 0) for t in self.v.ends)
            if self.calls < self._most_calls:
                yield from self._calls()

    def _calls(self) -> Iterator[tuple[int, int]]:
        for i, (token, _, _) in enumerate(self.v.functions):
            if self._only is None or i in self._only:
                yield token, self._missing(i, 0) + 1

    def _missing(self, function: int, used: int) -> int:
        """Tokens of the required arguments that are not used yet."""
        _, first, count = self.v.functions[function]
        return sum(
            1 + self._need(i)
            for i in range(first, first + count)
            if self.v.arguments[i][2] & REQUIRED and not used >> (i - first) & 1
        )

    def _rest(self) -> int:
        """What an ending needs besides the open value: required arguments and the end mark."""
        return self._missing(self.function, self.used) + 1

    def _need(self, argument: int) -> int:
        """Tokens of an argument's shortest value."""
        _, start, flags = self.v.arguments[argument]
        return self.utterance.shortest if flags & COPY else self.v.finish[start]

    # --- copied values ---

    @cached_property
    def utterance(self) -> Utterance:
        """Read when an argument asks for a copied value."""
        return Utterance(self._said)

    def _copies(self) -> bool:
        return self.argument >= 0 and bool(self.v.arguments[self.argument][2] & COPY)

    def _accepts(self) -> bool:
        return bool(self.v.accept[self.state])

    def _copied_tokens(self) -> set[int]:
        out, rest = set(), self._rest()
        fresh = self.state == self.v.arguments[self.argument][1]
        text, lead = self.utterance.text, b" " if fresh else b""
        for place in self.utterance.beginnings if fresh else self._places:
            for length in range(0 if fresh else 1, self.v.longest + 1):
                if place + length > len(text):
                    break
                token = self.v.tokens.get(lead + text[place : place + length])
                if token is not None and token not in out and self._after_copy(token) + rest <= self.left - 1:
                    out.add(token)
        return out

    def _after_copy(self, token: int) -> int:
        """Tokens that a copied value needs after this one; NEVER where it leads nowhere."""
        state = self.v.step(self.state, token)
        if state == NOWHERE:
            return NEVER
        if self.v.accept[state]:
            return 0
        return min((self.utterance.reach[p] for p in self._places_after(token)), default=NEVER)

    def _places_after(self, token: int) -> list[int]:
        piece, text = self.v.pieces[token], self.utterance.text
        if self.state == self.v.arguments[self.argument][1]:
            piece = piece[1:]
            return [p + len(piece) for p in self.utterance.beginnings if text.startswith(piece, p)]
        return [p + len(piece) for p in self._places if text.startswith(piece, p)]

    # --- what did ---

    def advance(self, token: int) -> None:
        """Append an allowed token."""
        self.left -= 1
        if token in self.v.ends:
            self.done = True
        elif token == self.v.none:
            self.said_none = True
        elif token in self.v.function_of and (self.state < 0 or self._accepts()):
            self.function, self.argument, self.state = self.v.function_of[token], -1, -1
            self.used, self.calls = 0, self.calls + 1
        elif (i := self._argument(token)) is not None:
            self.argument, self.state = i, self.v.arguments[i][1]
            self.used |= 1 << (i - self.v.functions[self.function][1])
        else:
            places = self._places_after(token) if self._copies() else []
            self.state, self._places = self.v.step(self.state, token), places
            assert self.state != NOWHERE, token

    def _argument(self, token: int) -> int | None:
        _, first, count = self.v.functions[self.function]
        return next((i for i in range(first, first + count) if self.v.arguments[i][0] == token), None)


def choose_allowed(logits: NDArray[np.float32], constraint: Constraint, pick: Any) -> int:
    """The token that `pick(logits)` takes of those that are allowed, from logits `[V]`."""
    listed, mask = constraint.allowed()
    open_to = np.zeros(len(logits), bool) if mask is None else mask.copy()
    open_to[listed] = True
    return int(pick(np.where(open_to, logits, -np.inf)))
