"""What a model may say in a call, compiled to tokens: functions, their arguments, an automaton for each value.

The arrays that `compile_grammar` gives are what Python (gori/runtime/constrain.py) and C++ (runtime/cpp/grammar.cpp)
walk through; an exported artifact carries them in runner.bin. Values of few texts (enums, booleans, short ranges) are
spelled as the tokenizer spells them, so what follows from the first tokens is known without asking the model; open
values (text, other numbers, objects) may be spelled in any tokens. Knows nothing of sessions or of the model.

Sizes in comments: F functions, A arguments, S states of values, W of them wide (allowed tokens as a bit mask and a
table of bytes, in place of a list), M masks, E edges, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori import automata, tables, value_pattern
from gori.automata import DEAD, FRACTION_DIGITS, Automaton
from gori.calls import END, NONE, Function, read_tools
from gori.console import log
from gori.errors import GoriError
from gori.tokenizer import Tokenizer, eos_ids

FILE = "runner.bin"
COPIED = "x-copied"
"""Key of an argument's schema: true where its value has to stand in the utterance, character by character."""
REQUIRED, REPEATS, COPY, TEXT = 1, 2, 4, 8
"""Flags of an argument: it must be there; several values make a list; COPIED; its value is a JSON string."""
FEW = 1000
"""Values that are spelled out one by one."""
WIDE = 128
"""Allowed tokens in one state from which a mask is shorter than a list."""
NOWHERE = 0xFFFF

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Grammar:
    """See the head of this file."""

    arrays: dict[str, NDArray[Any]]
    """`functions [F·3]` token, first argument, arguments · `arguments [A·3]` token, first state, flags ·
    `edges_at [S-W+1]`, `edge_token [E]`, `edge_next [E]` · `accept [S]` · `finish [S]` tokens until a value can end ·
    `mask_of [W]` · `masks [M·⌈V/32⌉]` · `byte_class [256]` · `byte_next [W·classes]` · `marks` NONE, vocabulary, end
    marks … · `names`, `packages`: texts of functions and arguments, packages of functions."""

    @property
    def functions(self) -> NDArray[np.uint32]:
        return self.arrays["functions"].reshape(-1, 3)

    @property
    def arguments(self) -> NDArray[np.uint32]:
        return self.arrays["arguments"].reshape(-1, 3)


@dataclass
class _States:
    """States as they are made: those of lists, and whole wide automata, which are numbered before them at the end."""

    edges: list[dict[int, int]] = field(default_factory=list)
    accept: list[bool] = field(default_factory=list)
    wide: list[tuple[Automaton, NDArray[np.int32]]] = field(default_factory=list)

    def new(self) -> int:
        self.edges.append({})
        self.accept.append(False)
        return len(self.edges) - 1


def load_grammar(directory: Path) -> Grammar:
    """The grammar of a checkpoint or artifact: runner.bin's where there is one, else compiled from its tools and
    tokenizer."""
    path = directory / FILE
    if path.exists() and "functions" in (arrays := tables.load(path)):
        return Grammar(arrays)
    tools = directory / "tools.json"
    if not tools.exists():
        raise GoriError(f"{directory} has no tools.json: constrained calls need the functions that may be called")
    return compile_grammar(read_tools(tools), Tokenizer.load(directory), eos_ids(directory))


def speaks_calls(functions: Mapping[str, Function], tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the special tokens of these functions: it does if gori trained it on them."""
    return tokenizer.has(NONE) and all(tokenizer.has(f"<|call:{name}|>") for name in functions)


def compile_grammar(functions: Mapping[str, Function], tokenizer: Tokenizer, ends: Sequence[int]) -> Grammar:
    """The grammar of calls of `functions`. Raises GoriError where the tokenizer lacks a special token, and for an
    argument of which no value can be said."""
    states = _States()
    compiler = _Values(tokenizer, states)
    rows, arguments, names = [], [], []
    for f in functions.values():
        rows.append((tokenizer.id(f"<|call:{f.name}|>"), len(arguments), len(f.properties)))
        for name, schema in f.properties.items():
            array = schema.get("type") == "array"
            item = schema.get("items", {}) if array else schema
            text = item.get("type", "string") == "string"
            copied = bool(schema.get(COPIED) or item.get(COPIED))
            if copied and (not text or "enum" in item or "pattern" in item):
                raise GoriError(f"{f.name}: argument {name!r} is {COPIED}, which only open text can be: remove it")
            flags = REQUIRED * (name in f.required) | REPEATS * array | COPY * copied | TEXT * text
            start = compiler.start(item, f"{f.name}: argument {name!r}")
            arguments.append((tokenizer.id(f"<|arg:{name}|>"), start, flags))
            names.append(name)
    out = _numbered(states, tokenizer, np.array(arguments, np.int64).reshape(-1, 3))
    out |= {
        "functions": np.array(rows, np.uint32),
        "marks": np.array([tokenizer.id(NONE), tokenizer.vocab_size, *(ends or [tokenizer.id(END)])], np.uint32),
    }
    out |= tables.strings([*functions, *names], "names")
    out |= tables.strings([f.package or "" for f in functions.values()], "packages")
    return Grammar(out)


class _Values:
    """Automata of values; equal schemas share one."""

    def __init__(self, tokenizer: Tokenizer, states: _States) -> None:
        self.tokenizer, self.states = tokenizer, states
        self.matrix, self.lengths = piece_matrix(tokenizer)
        self.known: dict[Any, int] = {}

    def start(self, schema: Schema, where: str) -> int:
        """The first state of a schema's values: 0… of lists, -1, -2, … of wide automata."""
        kind = schema.get("type", "string")
        texts = few_texts(schema)
        if texts is not None:
            texts = [t for t in texts if "<|" not in t and t == t.strip() and t]
            if not texts:
                raise GoriError(f"{where} allows no value that can be said: mend its enum or its range")
            key: Any = tuple(texts)
        else:
            key = (kind, *bounds(schema)) if kind in ("integer", "number") else kind
            if kind == "string" and "pattern" in schema:
                key = held_pattern(schema["pattern"], where)
        if key not in self.known:
            self.known[key] = self._spelled(texts) if texts is not None else self._open(key, where)
        return self.known[key]

    def _spelled(self, texts: Sequence[str]) -> int:
        root = self.states.new()
        for text in texts:
            at = root
            for token in self.tokenizer.encode(f" {text}"):
                edges = self.states.edges[at]
                if token not in edges:
                    edges[token] = self.states.new()
                at = edges[token]
            self.states.accept[at] = True
        return root

    def _open(self, key: Any, where: str) -> int:
        automaton = open_automaton(key)
        if not automaton.accept.any():
            raise GoriError(f"{where} allows no value that can be said: mend its range or pattern")
        steps = token_steps(automaton, self.matrix, self.lengths)
        if (steps != DEAD).sum(1).max() > WIDE:
            self.states.wide.append((automaton, steps))
            return -len(self.states.wide)
        made = {0: self.states.new()}
        todo = [0]
        for state in todo:
            here = made[state]
            self.states.accept[here] = bool(automaton.accept[state])
            for token in np.flatnonzero(steps[state] != DEAD).tolist():
                after = int(steps[state, token])
                if after not in made:
                    made[after] = self.states.new()
                    todo.append(after)
                self.states.edges[here][token] = made[after]
        return made[0]


def few_texts(schema: Schema) -> list[str] | None:
    """Every value of a schema as text, if there are few."""
    kind = schema.get("type", "string")
    if "enum" in schema:
        return [automata.spelled(v) for v in schema["enum"]]
    if kind == "boolean":
        return ["true", "false"]
    low, high = bounds(schema)
    if kind == "integer" and low is not None and high is not None and high - low < FEW:
        return [str(v) for v in range(int(low.to_integral_value("ROUND_CEILING")), int(high // 1) + 1)]
    return None


def bounds(schema: Schema) -> tuple[Decimal | None, Decimal | None]:
    """The lowest and highest value of a number's schema; an exclusive bound is one last digit inside."""
    step = Decimal(1) if schema.get("type") == "integer" else Decimal(1).scaleb(-FRACTION_DIGITS)
    out: list[Decimal | None] = []
    for key, sign in (("inimum", 1), ("aximum", -1)):
        inclusive = [Decimal(str(schema[k])) for k in ("m" + key,) if k in schema]
        exclusive = [Decimal(str(schema[k])) + sign * step for k in ("exclusiveM" + key,) if k in schema]
        found = [v * sign for v in inclusive + exclusive]
        out.append(max(found) * sign if found else None)
    low, high = out
    if low is not None and high is not None and high < low:
        return low, low - 1  # nothing lies between; the caller finds no value and says where
    return low, high


def held_pattern(pattern: str, where: str) -> Any:
    """The key of text with a pattern; of any text, and a line that says so, where the pattern is not understood."""
    key = ("pattern", pattern)
    try:
        open_automaton(key)
    except GoriError as e:
        log(f"{where}: constrained calls do not hold to its pattern {pattern!r}: {e}")
        return "string"
    return key


@cache
def open_automaton(key: Any) -> Automaton:
    """The automaton of text, of objects, of text in which a pattern is found: ("pattern", it), or of numbers:
    ("integer" or "number", lowest, highest)."""
    if key == "string":
        return automata.text()
    if key == "object":
        return automata.json_object()
    if key[0] == "pattern":
        return value_pattern.matching(key[1])
    kind, low, high = key
    return automata.number(low, high, FRACTION_DIGITS if kind == "number" else 0)


def piece_matrix(tokenizer: Tokenizer) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The bytes of each token `[V, longest]` and how many they are; 0 for a special token, which is no text."""
    pieces = tokenizer.pieces
    lengths = np.array([len(p) for p in pieces], np.int32)
    matrix = np.zeros((len(pieces), max(1, int(lengths.max()))), np.uint8)
    for row, piece in zip(matrix, pieces, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    return matrix, lengths


def token_steps(a: Automaton, matrix: NDArray[np.uint8], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """`[states, V]`: the state after a token's bytes, or DEAD."""
    table = np.concatenate([a.next, np.full((1, 256), DEAD, np.int32)])
    out = np.empty((len(a.next), len(matrix)), np.int32)
    for state in range(len(a.next)):
        at = np.where(lengths > 0, state, DEAD)
        for place in range(matrix.shape[1]):
            more = np.flatnonzero((lengths > place) & (at != DEAD))
            if not more.size:
                break
            at[more] = table[at[more], matrix[more, place]]
        out[state] = at
    return out


def _numbered(states: _States, tokenizer: Tokenizer, arguments: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The arrays of every state: wide ones first, then lists."""
    at = np.cumsum([0, *(len(a.next) for a, _ in states.wide)])
    wide, vocab = int(at[-1]), tokenizer.vocab_size
    starts = arguments[:, 1]
    firsts = np.array([0, *at[:-1]])  # of automaton n, by -n
    arguments = arguments.copy()
    arguments[:, 1] = np.where(starts < 0, firsts[np.maximum(-starts, 0)], starts + wide)
    accept = np.concatenate([*(a.accept for a, _ in states.wide), np.array(states.accept, bool)])
    if len(accept) >= NOWHERE:
        raise GoriError(f"the tools' values need {len(accept)} states, {NOWHERE - 1} are the most: shorten the enums")
    tokens = [t for edges in states.edges for t in edges]
    after = [n + wide for edges in states.edges for n in edges.values()]
    allowed = np.zeros((wide, -(-vocab // 32) * 32), bool)
    byte_next = np.full((wide, 256), NOWHERE, np.uint16)
    for first, (a, steps) in zip(at, states.wide, strict=False):
        allowed[first : first + len(steps), :vocab] = steps != DEAD
        byte_next[first : first + len(steps)] = np.where(a.next == DEAD, NOWHERE, a.next + first)
    masks, mask_of = np.unique(np.packbits(allowed, axis=1, bitorder="little"), axis=0, return_inverse=True)
    columns, byte_class = np.unique(byte_next, axis=1, return_inverse=True)
    edges_at = np.cumsum([0, *map(len, states.edges)])
    return {
        "arguments": arguments.astype(np.uint32),
        "edges_at": edges_at.astype(np.uint32),
        "edge_token": np.array(tokens, np.uint32),
        "edge_next": np.array(after, np.uint16),
        "accept": accept.astype(np.uint8),
        "finish": _finish(accept, [s + f for f, (_, s) in zip(at, states.wide, strict=False)], edges_at, after),
        "mask_of": mask_of.reshape(-1).astype(np.uint16),
        "masks": masks.reshape(-1).view("<u4"),
        "byte_class": byte_class.reshape(-1).astype(np.uint8),
        "byte_next": columns.astype(np.uint16),
    }


def _finish(
    accept: NDArray[np.bool_], wide: list[NDArray[np.int32]], edges_at: NDArray[np.int64], after: list[int]
) -> NDArray[np.uint16]:
    """Tokens from each state to the nearest one that ends a value. `wide` are states after tokens, counted from the
    first wide one (below it: DEAD)."""
    finish = np.where(accept, 0, NOWHERE).astype(np.int64)
    follows = np.array(after, np.int64)
    while True:
        more, row = finish.copy(), 0
        first = 0
        for steps in wide:
            for s in steps:
                there = s[s >= first]
                if there.size:
                    more[row] = min(more[row], 1 + finish[there].min())
                row += 1
            first = row
        for i in range(len(edges_at) - 1):
            there = follows[edges_at[i] : edges_at[i + 1]]
            if there.size:
                more[row + i] = min(more[row + i], 1 + finish[there].min())
        if (more == finish).all():
            return finish.astype(np.uint16)
        finish = more
