"""Byte automata of one argument's value: any text, a number in a range, a JSON object. Nothing of tokens or functions.

An automaton is deterministic, complete in its table (DEAD where no value goes on) and trimmed: from every state some
value can still be ended. What is accepted is what `gori.calls.check_call` accepts of that schema's type and range,
written as `gori.calls.render` writes it, the space before the value included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEAD = -1
INTEGER_DIGITS, FRACTION_DIGITS = 15, 6
"""Of a number without bounds: every such number is exact in a double."""
DEPTH = 3
"""Objects and lists that may stand in one another."""
ASCII_TEXT = frozenset(range(0x20, 0x7F))
DIGITS = "0123456789"
"""Not str.isdigit: to Python the byte B2, as a character, is a digit (²)."""


@dataclass(frozen=True)
class Automaton:
    """State 0 is the start."""

    next: NDArray[np.int32]
    """`[states, 256]`: state and byte → state or DEAD."""
    accept: NDArray[np.bool_]
    """`[states]`: the bytes so far are a value."""

    def matches(self, text: bytes) -> bool:
        state = 0
        for byte in text:
            state = int(self.next[state, byte])
            if state == DEAD:
                return False
        return bool(self.accept[state])


def explore(start: Hashable, step: Callable[[Any, int], Any], accept: Callable[[Any], bool]) -> Automaton:
    """The automaton of the states that `step(state, byte) → state or None` reaches, minimal and trimmed."""
    index, order, rows = {start: 0}, [start], []
    for state in order:
        row = np.full(256, DEAD, np.int32)
        for byte in range(256):
            if (after := step(state, byte)) is not None:
                if after not in index:
                    index[after] = len(order)
                    order.append(after)
                row[byte] = index[after]
        rows.append(row)
    return minimal(_trimmed(np.array(rows), np.array([accept(s) for s in order])))


def _trimmed(table: NDArray[np.int32], accept: NDArray[np.bool_]) -> Automaton:
    """Transitions from which no value can be ended lead nowhere."""
    alive = accept.copy()
    while True:
        more = alive | (np.append(alive, False)[table]).any(1)
        if (more == alive).all():
            break
        alive = more
    return Automaton(np.where(np.append(alive, False)[table], table, DEAD).astype(np.int32), accept)


def minimal(a: Automaton) -> Automaton:
    """The smallest automaton of the same language (Moore 1956: refine the partition until it is stable); states are
    numbered in the order in which a walk over the bytes meets them."""
    block = a.accept.astype(np.int64)
    count = 0
    while True:
        # DEAD is a block of its own, the last entry
        signature = np.concatenate([block[:, None], np.append(block, -1)[a.next]], 1)
        _, block = np.unique(signature, axis=0, return_inverse=True)
        block = block.reshape(-1)
        if block.max() + 1 == count:
            break
        count = int(block.max()) + 1
    first = np.array([int(np.flatnonzero(block == b)[0]) for b in range(count)])
    table = np.append(block, DEAD)[a.next[first]]
    order, seen = [int(block[0])], {int(block[0])}
    for b in order:
        for after in table[b].tolist():
            if after != DEAD and after not in seen:
                seen.add(after)
                order.append(after)
    renumbered = np.full(count + 1, DEAD)
    renumbered[order] = np.arange(len(order))
    return Automaton(renumbered[table[order]].astype(np.int32), a.accept[first[order]])


# --- text -------------------------------------------------------------------------------------------------------------

_SPACES = {chr(c).encode() for c in range(0x3001) if chr(c).isspace()}
_SPACE_PREFIXES = {s[:n] for s in _SPACES for n in range(1, len(s))}


def _lead(byte: int) -> tuple[int, int, int] | None:
    """(bytes that follow, lowest and highest second byte) of a UTF-8 lead byte (RFC 3629, section 4)."""
    if 0xC2 <= byte <= 0xDF:
        return 1, 0x80, 0xBF
    if 0xE0 <= byte <= 0xEF:
        return 2, 0xA0 if byte == 0xE0 else 0x80, 0x9F if byte == 0xED else 0xBF
    if 0xF0 <= byte <= 0xF4:
        return 3, 0x90 if byte == 0xF0 else 0x80, 0x8F if byte == 0xF4 else 0xBF
    return None


def character(pending: tuple[bytes, int, int, int], byte: int) -> tuple[bytes, int, int, int] | str | None:
    """One more byte of a character of several: what is still pending, `"space"` or `"other"` when it is whole, None
    where the byte does not belong there. Pending is (the bytes, where they may still become white space; how many
    follow; lowest and highest next byte)."""
    so_far, left, low, high = pending
    if not low <= byte <= high:
        return None
    so_far = so_far + bytes([byte]) if so_far else b""
    if left == 1:
        return "space" if so_far in _SPACES else "other"
    return (so_far if so_far in _SPACE_PREFIXES else b""), left - 1, 0x80, 0xBF


def opening(byte: int) -> tuple[bytes, int, int, int] | None:
    """What is pending after a lead byte."""
    lead = _lead(byte)
    if lead is None:
        return None
    return (bytes([byte]) if bytes([byte]) in _SPACE_PREFIXES else b""), *lead


def text() -> Automaton:
    """A space, then UTF-8 that neither begins nor ends with white space and has no `<|` in it."""

    # a state is (what stood last, what is pending of a character)
    def step(state: tuple[str, Any], byte: int) -> tuple[str, Any] | None:
        last, pending = state
        if last == "before":
            return ("start", None) if byte == 0x20 else None
        if pending is not None:
            after = character(pending, byte)
            if isinstance(after, tuple):
                return last, after
            return _after(last, after)
        if byte < 0x80:
            if byte == ord("<"):
                return "<", None
            if byte == ord("|") and last == "<":
                return None
            return _after(last, "space" if bytes([byte]) in _SPACES else "other")
        # what stood before a character of several bytes matters only where that may be white space
        return (last, begun) if (begun := opening(byte)) else None

    return explore(("before", None), step, lambda s: s[0] in ("text", "<") and s[1] is None)


def _after(last: str, kind: str | None) -> tuple[str, None] | None:
    if kind is None or (kind == "space" and last == "start"):
        return None
    return ("space" if kind == "space" else "text"), None


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(low: Decimal | None, high: Decimal | None, fraction: int) -> Automaton:
    """A space and a decimal number from `low` to `high` (None: INTEGER_DIGITS digits at most), with up to `fraction`
    digits behind the point (0: an integer); no exponent and no leading zeros."""
    limit = Decimal(10) ** INTEGER_DIGITS - 1
    low, high = max(-limit, low if low is not None else -limit), min(limit, high if high is not None else limit)
    sides = []
    if high >= 0:
        sides.append(("", max(low, Decimal(0)), high))
    if low < 0:
        sides.append(("-", max(-high, Decimal(0)), -low))
    strands = frozenset(
        (sign, *_digits(a, b, length), -1, True, True)
        for sign, a, b in sides
        for length in range(1, INTEGER_DIGITS + 1)
        if Decimal(10) ** (length - 1) * (length > 1) <= b and Decimal(10) ** length > a
    )

    def step(state: tuple[str, Any], byte: int) -> tuple[str, Any] | None:
        where, some = state
        if where == "before":
            return ("sign", some) if byte == 0x20 else None
        if where == "sign" and byte == ord("-"):
            negative = frozenset(s for s in some if s[0] == "-")
            return ("digits", frozenset(("+", *s[1:]) for s in negative)) if negative else None
        if where == "sign":
            some = frozenset(("+", *s[1:]) for s in some if s[0] == "")
        after = frozenset(t for s in some if (t := _extended(s, byte, fraction)) is not None)
        return ("digits", after) if after else None

    def accept(state: tuple[str, Any]) -> bool:
        return state[0] == "digits" and any(_complete(s) for s in state[1])

    return explore(("before", strands), step, accept)


def _digits(low: Decimal, high: Decimal, length: int) -> tuple[str, str, int]:
    """The bounds' digits for numbers of `length` digits before the point: integer and fraction in one string."""
    least = Decimal(10) ** (length - 1) if length > 1 else Decimal(0)
    top = Decimal(10) ** length - Decimal(1).scaleb(-FRACTION_DIGITS)
    a, b = (
        f"{v:0{length + 1 + FRACTION_DIGITS}.{FRACTION_DIGITS}f}".replace(".", "") for v in _clip(low, high, least, top)
    )
    return a, b, length


def _clip(low: Decimal, high: Decimal, least: Decimal, top: Decimal) -> tuple[Decimal, Decimal]:
    return max(low, least), min(high, top)


def _extended(strand: tuple[str, str, str, int, int, bool, bool], byte: int, fraction: int) -> Any:
    """A strand (sign, low's digits, high's digits, digits before the point, last place written or -1, still equal to
    low, still equal to high) after one more byte. A point is the place `length` - 1 counted again as negative."""
    sign, low, high, length, place, tight_low, tight_high = strand
    if byte == ord("."):
        return (
            (sign, low, high, length, -length - 1, tight_low, tight_high) if place == length - 1 and fraction else None
        )
    if not 0x30 <= byte <= 0x39:
        return None
    place = length if place == -length - 1 else place + 1
    if place == length and strand[4] == length - 1:  # a digit too many before the point
        return None
    if place >= length + fraction or place >= len(low):
        return None
    digit = chr(byte)
    if (tight_low and digit < low[place]) or (tight_high and digit > high[place]):
        return None
    return sign, low, high, length, place, tight_low and digit == low[place], tight_high and digit == high[place]


def _complete(strand: tuple[str, str, str, int, int, bool, bool]) -> bool:
    _, low, _, length, place, tight_low, _ = strand
    return place >= length - 1 and not (tight_low and low[place + 1 :].strip("0"))


# --- JSON objects -----------------------------------------------------------------------------------------------------


def json_object() -> Automaton:
    """A space and a JSON object as `json.dumps` spaces it, DEPTH deep at most; no `<|` and no \\u in its strings."""
    start = (" ", (), None)

    def step(state: tuple[Any, ...], byte: int) -> tuple[Any, ...] | None:
        where, stack, pending = state
        if pending is not None:
            after = character(pending, byte)
            return None if after is None else (where, stack, after if isinstance(after, tuple) else None)
        return _json_step(where, stack, byte)

    return explore(start, step, lambda s: s[0] == "end")


def _json_step(where: str, stack: tuple[str, ...], byte: int) -> tuple[Any, ...] | None:
    c = chr(byte)
    if where == " ":
        return ("object", (), None) if c == " " else None
    if where == "object":
        return ("first key", ("{",), None) if c == "{" else None
    if where in ("string", "key", "string<", "key<"):
        return _string_step(where, stack, byte)
    if where.endswith("\\"):
        return (where[:-1], stack, None) if c in '"\\/bfnrt' else None
    if where == "first key" and c == "}":
        return _closed(stack)
    if where in ("first key", "next key"):
        return ("key", stack, None) if c == '"' else None
    if where == "space key":
        return ("next key", stack, None) if c == " " else None
    if where == "colon":
        return ("space value", stack, None) if c == ":" else None
    if where == "space value":
        return ("value", stack, None) if c == " " else None
    if where == "first item" and c == "]":
        return _closed(stack)
    if where in ("value", "first item"):
        return _value_step(stack, c)
    if where.startswith("literal "):
        rest = where[8:]
        return ("literal " + rest[1:] if rest[1:] else "after", stack, None) if c == rest[0] else None
    if where.startswith("number"):
        if (more := _number_step(where, c)) is not None:
            return more, stack, None
        if where in ("number -", "number ."):
            return None
    return _after_value(stack, c) if where.startswith("number") or where == "after" else None


def _string_step(where: str, stack: tuple[str, ...], byte: int) -> tuple[Any, ...] | None:
    plain = where.removesuffix("<")
    if byte >= 0x80:
        begun = opening(byte)
        return (plain, stack, (b"", *begun[1:])) if begun else None
    c = chr(byte)
    if byte not in ASCII_TEXT or (c == "|" and where.endswith("<")):
        return None
    if c == '"':
        return ("colon" if plain == "key" else "after"), stack, None
    return plain + {"\\": "\\", "<": "<"}.get(c, ""), stack, None


def _value_step(stack: tuple[str, ...], c: str) -> tuple[Any, ...] | None:
    if c in "{[":
        return ("first key" if c == "{" else "first item", (*stack, c), None) if len(stack) < DEPTH else None
    if c == '"':
        return "string", stack, None
    for literal in ("true", "false", "null"):
        if c == literal[0]:
            return "literal " + literal[1:], stack, None
    begun = {"-": "number -", "0": "number 0"}.get(c, "number 1" if c in "123456789" else None)
    return (begun, stack, None) if begun else None


def _number_step(where: str, c: str) -> str | None:
    """`number N` has N digits before the point (0 alone: a zero), `number .N` N behind it."""
    kind = where[7:]
    if kind == "-":
        return "number 0" if c == "0" else "number 1" if c in "123456789" else None
    if kind.startswith("."):
        digits = int(kind[1:] or 0)
        return f"number .{digits + 1}" if c in DIGITS and digits < FRACTION_DIGITS else None
    if c == ".":
        return "number ."
    digits = int(kind)
    return f"number {digits + 1}" if c in DIGITS and 0 < digits < INTEGER_DIGITS else None


def _closed(stack: tuple[str, ...]) -> tuple[Any, ...]:
    return ("after", stack[:-1], None) if len(stack) > 1 else ("end", (), None)


def _after_value(stack: tuple[str, ...], c: str) -> tuple[Any, ...] | None:
    if c == ",":
        return ("space key" if stack[-1] == "{" else "space value"), stack, None
    return _closed(stack) if c == {"{": "}", "[": "]"}[stack[-1]] else None


def spelled(value: Any) -> str:
    """A value as text, as `gori.calls.render` writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
