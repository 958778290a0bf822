"""A JSON schema's `pattern` as a byte automaton: it accepts text (gori/automata.py) in which the pattern is found.

The common part of regular expressions (ECMA 262, section 22.2, without flags): literals, classes, `.`, `\\d \\w \\s`,
groups, alternatives, greedy repeats, `^` and `$` at the ends. `\\d`, `\\w` and `\\s` are of ASCII alone. The
complements of these, on which engines differ beyond ASCII, look around, back references and the rest are refused. Knows
nothing of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import groupby
from typing import Any

from gori import automata
from gori.automata import DEAD, Automaton
from gori.errors import GoriError

MOST_STATES, MOST_CHARACTERS = 4000, 12_000
ASCII = frozenset(range(0x80))
NAMED = {
    "d": frozenset(b"0123456789"),
    "w": frozenset(b for b in range(0x80) if chr(b).isalnum() or b == ord("_")),
    "s": frozenset(b" \t\n\r\f\v"),
}
SPECIAL = frozenset("()[]{}?*+|^$.\\")

Part = Callable[["_Nfa", int], int]
"""Adds itself to an automaton behind a state; the state where it ends."""


class _Nfa:
    """States with edges of byte ranges, and empty ones (Thompson 1968)."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int, int]]] = []
        self.empty: list[list[int]] = []

    def new(self) -> int:
        if len(self.edges) >= MOST_STATES:
            raise GoriError(f"it needs more than {MOST_STATES} states: shorten its repeats")
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        for s in todo:
            fresh = [e for e in self.empty[s] if e not in found]
            found.update(fresh)
            todo += fresh
        return frozenset(found)

    def step(self, states: frozenset[int], byte: int) -> frozenset[int]:
        return self.closure({to for s in states for low, high, to in self.edges[s] if low <= byte <= high})


def matching(pattern: str) -> Automaton:
    """A space and a text in which the pattern is found. Raises GoriError, with what it is about, for a pattern that is
    not of the common part; the automaton accepts nothing where no text matches."""
    nfa, text = _Nfa(), automata.text()
    start = nfa.new()
    end = _Parser(pattern).whole()(nfa, start)
    begun = nfa.closure([start])

    # a state is (that of any text, those of the pattern)
    def step(state: tuple[int, Any], byte: int) -> tuple[int, Any] | None:
        after = int(text.next[state[0], byte])
        if after == DEAD:
            return None
        if state[1] is None:  # the space before the value is no part of it
            return after, begun
        held = nfa.step(state[1], byte)
        return (after, held) if held else None

    return automata.explore((0, None), step, lambda s: s[1] is not None and bool(text.accept[s[0]]) and end in s[1])


class _Parser:
    """Recursive descent over a pattern's characters."""

    def __init__(self, pattern: str) -> None:
        self.text, self.at = pattern, 0

    def whole(self) -> Part:
        part = self.alternatives(top=True)
        if self.at < len(self.text):
            raise self.refused()
        return part

    def refused(self) -> GoriError:
        return GoriError(f"{self.text[self.at :]!r} of it is not among what is known of regular expressions")

    def take(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def alternatives(self, top: bool = False) -> Part:
        parts = [self.sequence(top)]
        while self.take("|"):
            parts.append(self.sequence(top))
        return parts[0] if len(parts) == 1 else _either(parts)

    def sequence(self, top: bool) -> Part:
        """Up to a bar or a closing bracket; at the top, anything may stand around what is not anchored."""
        parts = [] if not top or self.take("^") else [_repeated(_of(ASCII, None), 0, None)]
        while self.at < len(self.text) and self.text[self.at] not in "|)$":
            parts.append(self.repeat(self.atom()))
        if top and not self.take("$"):
            parts.append(_repeated(_of(ASCII, None), 0, None))
        return lambda nfa, s: reduce(lambda at, part: part(nfa, at), parts, s)

    def repeat(self, part: Part) -> Part:
        counted = re.compile(r"\{(\d+)(,?)(\d*)\}").match(self.text, self.at)
        if counted:
            self.at = counted.end()
            least, upper = int(counted[1]), counted[3] if counted[2] else counted[1]
            return _repeated(part, least, int(upper) if upper else None)
        for sign, least, most in (("?", 0, 1), ("*", 0, None), ("+", 1, None)):
            if self.take(sign):
                return _repeated(part, least, most)
        return part

    def atom(self) -> Part:
        if self.take("(?:") or self.take("("):
            inner = self.alternatives()
            if not self.take(")"):
                raise self.refused()
            return inner
        if self.take("["):
            return self.characters()
        if self.take("."):
            return _any
        if self.take("\\"):
            return self.escaped()
        if self.text[self.at] in SPECIAL:
            raise self.refused()
        self.at += 1
        return _literal(self.text[self.at - 1])

    def escaped(self) -> Part:
        c = self.text[self.at : self.at + 1]
        if c in NAMED:
            self.at += 1
            return _of(NAMED[c], ())
        if not c or c.isalnum():
            self.at -= 1
            raise self.refused()
        self.at += 1
        return _literal(c)

    def characters(self) -> Part:
        """A class, its opening bracket behind us."""
        negated, held, named = self.take("^"), set[int](), False
        if self.text.startswith("]", self.at):  # to Python a character, to ECMAScript the end of an empty class
            raise self.refused()
        while not self.take("]"):
            low = self.one()
            if isinstance(low, frozenset):
                held |= low
                named = True
            elif self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.one()
                if isinstance(high, frozenset) or high < low or high - low > MOST_CHARACTERS:
                    raise self.refused()
                held |= set(range(low, high + 1))
            else:
                held.add(low)
        beyond = sorted(held - ASCII)
        if negated and (beyond or named):
            raise GoriError("its negated classes may name single characters of ASCII alone")
        return _of(ASCII - held, None) if negated else _of(frozenset(held & ASCII), beyond)

    def one(self) -> int | frozenset[int]:
        """A character of a class, or a named set."""
        c = self.text[self.at : self.at + 1]
        if not c:
            raise GoriError("one of its classes is not closed")
        self.at += 1
        if c != "\\":
            return ord(c)
        c = self.text[self.at : self.at + 1]
        if c in NAMED:
            self.at += 1
            return NAMED[c]
        if not c or c.isalnum():
            raise self.refused()
        self.at += 1
        return ord(c)


def _literal(c: str) -> Part:
    return _of(frozenset({ord(c)} & ASCII), [ord(c)] if ord(c) >= 0x80 else ())


def _any(nfa: _Nfa, s: int) -> int:
    return _of(ASCII - {0x0A, 0x0D}, None)(nfa, s)


def _of(ascii_bytes: frozenset[int], beyond: Iterable[int] | None) -> Part:
    """One character: of these bytes, or of these points beyond ASCII (None: any)."""

    def part(nfa: _Nfa, s: int) -> int:
        end = nfa.new()
        nfa.edges[s] += [(b, b, end) for b in sorted(ascii_bytes)]
        if beyond is None:
            _any_beyond(nfa, s, end)
        else:
            raw = [chr(c).encode() for c in beyond if not 0xD800 <= c < 0xE000]
            for prefix, last in groupby(raw, key=lambda r: r[:-1]):
                at = s
                for byte in prefix:
                    nfa.edges[at].append((byte, byte, nfa.new()))
                    at = len(nfa.edges) - 1
                nfa.edges[at] += [(r[-1], r[-1], end) for r in last]
        return end

    return part


def _any_beyond(nfa: _Nfa, s: int, end: int) -> None:
    """By lead bytes alone; that the bytes are UTF-8 is the other automaton's part."""
    after = end
    for low, high in ((0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4)):
        middle = nfa.new()
        nfa.edges[middle].append((0x80, 0xBF, after))
        nfa.edges[s].append((low, high, middle))
        after = middle


def _either(parts: list[Part]) -> Part:
    def part(nfa: _Nfa, s: int) -> int:
        end = nfa.new()
        for p in parts:
            begin = nfa.new()
            nfa.empty[s].append(begin)
            nfa.empty[p(nfa, begin)].append(end)
        return end

    return part


def _repeated(inner: Part, least: int, most: int | None) -> Part:
    def part(nfa: _Nfa, s: int) -> int:
        for _ in range(least):
            s = inner(nfa, s)
        end = nfa.new()
        nfa.empty[s].append(end)
        if most is None:
            begin = nfa.new()
            nfa.empty[s].append(begin)
            nfa.empty[inner(nfa, begin)] += [begin, end]
        for _ in range((most or least) - least):
            s = inner(nfa, s)
            nfa.empty[s].append(end)
        return end

    return part
