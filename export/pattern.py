"""A tokenizer's pre-token pattern as data: classes of characters, and sequences of them for a small matcher to try.

The patterns of byte-level BPE tokenizers (GPT-2's, Llama 3's, Qwen's, gori's own) are alternatives of repeated
character classes, some with a look ahead. Which characters a class holds is asked of the tokenizers library itself,
character by character: its regex engine brings its own Unicode tables, and a second engine's would differ in some.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from gori.errors import GoriError

CONSUME, NOT_AHEAD, AHEAD = 0, 1, 2
UNBOUNDED = 0xFFFFFFFF
LAST = 0x110000
# nothing is assigned between these, so a class holds all of such a range or nothing (a noncharacter is unassigned, too)
UNIFORM = ((0x32400, 0xE0000), (0xE1000, 0xF0000), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
BLOCK = 256
_ATOM = re.compile(
    r"\\[pP]\{\^?\w+\}|\\u[0-9a-fA-F]{4}|\\.|\[\^?(?:\\[pP]\{\^?\w+\}|\\.|[^\]\\])+\]|[^\\()\[\]|?*+{}]", re.DOTALL
)
_TIMES = re.compile(r"([?*+]|\{(\d+)(,?)(\d*)\})?")


@dataclass(frozen=True)
class Element:
    """One repeated class, or a class that must (not) follow."""

    atom: str
    """The class as the pattern spells it, case folding included."""
    least: int = 1
    most: int = 1
    kind: int = CONSUME


@dataclass(frozen=True)
class Pattern:
    """Alternatives in their order, over classes of characters."""

    alternatives: list[list[tuple[int, int, int, int]]]
    """Of each its elements: (kinds of characters as bits, least, most, CONSUME…)."""
    block_of: NDArray[np.uint16]
    """Code point / BLOCK → block."""
    kind_of: NDArray[np.uint8]
    """Block · BLOCK + code point % BLOCK → kind of character, 0 to 63."""


def compile_pattern(text: str) -> Pattern:
    """The pattern as data; GoriError for what is not of that kind (groups that repeat, lazy repeats, look behinds)."""
    alternatives = [list(_sequence(a, text)) for a in _expanded(text)]
    atoms = sorted({e.atom for a in alternatives for e in a})
    held = sum(members(a).astype(np.int64) << i for i, a in enumerate(atoms))
    codes, kind = np.unique(held, return_inverse=True)
    if len(codes) > 64 or len(atoms) > 62:
        raise GoriError(f"the tokenizer's pattern tells {len(codes)} kinds of characters apart, 64 are the most")
    bits = {a: sum(1 << k for k, code in enumerate(codes.tolist()) if code >> i & 1) for i, a in enumerate(atoms)}
    blocks, block_of = np.unique(kind.reshape(-1, BLOCK).astype(np.uint8), axis=0, return_inverse=True)
    return Pattern(
        [[(bits[e.atom], e.least, e.most, e.kind) for e in a] for a in alternatives],
        block_of.reshape(-1).astype(np.uint16),
        blocks.reshape(-1),
    )


@cache
def members(atom: str) -> NDArray[np.bool_]:
    """`[0x110000]`: which characters the class holds; surrogates are none."""
    asked = np.ones(LAST, bool)
    asked[0xD800:0xE000] = False
    for first, end in UNIFORM:
        asked[first + 1 : end] = False
    points = np.flatnonzero(asked)
    split = pre_tokenizers.Split(tokenizers.Regex(atom), "removed")
    inside = np.ones(len(points), bool)
    for _, (begin, end) in split.pre_tokenize_str("".join(map(chr, points.tolist()))):
        inside[begin:end] = False
    out = np.zeros(LAST, bool)
    out[points[inside]] = True
    for first, end in UNIFORM:
        out[first:end] = out[first]
    return out


def _expanded(text: str) -> list[str]:
    """The alternatives, with those of a plain group written out: `(?:a|b)c` is `ac` and `bc`."""
    out = []
    for part in _cut(text):
        pieces: list[list[str]] = []
        for piece, group in _groups(part):
            pieces.append(_alternatives_of(piece, text) if group else [piece])
        out += ["".join(p) for p in product(*pieces)]
    return out


def _alternatives_of(group: str, text: str) -> list[str]:
    """Of `(?:…)` and `(?i:…)`, with the folding at each letter; look aheads stay whole."""
    if group.startswith(("(?!", "(?=")):
        return [group]
    folded = group.startswith("(?i:")
    if not folded and not group.startswith("(?:"):
        raise GoriError(f"{group!r} in the tokenizer's pattern {text!r} is a group that the C++ runner does not match")
    inner = _cut(group[4 if folded else 3 : -1])
    return [re.sub(r"(?<!\\)[A-Za-z]", lambda m: f"(?i:{m[0]})", i) for i in inner] if folded else inner


def _cut(text: str) -> list[str]:
    """At the bars outside of groups and classes."""
    out, depth, inside, i = [""], 0, False, 0
    while i < len(text):
        c = text[i : i + 2] if text[i] == "\\" else text[i]
        depth += (c == "(") - (c == ")") if not inside else 0
        inside = (inside or c == "[") and c != "]"
        if c == "|" and not depth and not inside:
            out.append("")
        else:
            out[-1] += c
        i += len(c)
    return out


def _groups(part: str) -> Iterator[tuple[str, bool]]:
    """Pieces outside of groups, and groups."""
    at = 0
    for m in re.finditer(r"(?<!\\)\((?:[^()\\]|\\.)*\)", part):
        if m.start() > at:
            yield part[at : m.start()], False
        yield m[0], True
        at = m.end()
    if at < len(part):
        yield part[at:], False


def _sequence(text: str, pattern: str) -> Iterator[Element]:
    at = 0
    while at < len(text):
        ahead = re.match(r"\(\?([!=])((?:[^()\\]|\\.)*)\)", text[at:])
        folded = re.match(r"\(\?i:[A-Za-z]\)", text[at:])
        if ahead:
            yield Element(ahead[2], kind=NOT_AHEAD if ahead[1] == "!" else AHEAD)
            at += ahead.end()
            continue
        atom = folded or _ATOM.match(text, at)
        if atom is None:
            raise GoriError(f"the C++ runner does not match {text[at:]!r} of the tokenizer's pattern {pattern!r}")
        at += len(atom[0])
        times = _TIMES.match(text, at)
        assert times is not None
        at = times.end()
        if times[1] and text[at : at + 1] in ("?", "+"):
            raise GoriError(f"the C++ runner does not match the repeat {times[1]}{text[at]!r} of {pattern!r}")
        yield Element(atom[0], *_bounds(times))


def _bounds(times: re.Match[str]) -> tuple[int, int]:
    if times[2] is not None:
        least = int(times[2])
        return least, int(times[4]) if times[4] else UNBOUNDED if times[3] else least
    return {None: (1, 1), "?": (0, 1), "*": (0, UNBOUNDED), "+": (1, UNBOUNDED)}[times[1]]
