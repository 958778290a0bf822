"""The conversations of one recipe: tools, training, dev and test rows, and how an epoch's token ids are made of them.

Swapping values (a share of rows get other values of the same arguments, in utterance and call alike) teaches copying:
the words around a value stay, the value changes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gori.artifact import content_hash
from gori.calls import Call, Function, read_tools
from gori.data import Conversation, Example, Turn, encode, read_conversations
from gori.errors import GoriError
from gori.invent import Inventor
from gori.tokenizer import Tokenizer

OPEN_VALUES = 100
"""Different values that make an argument open: any words may fill it."""


@dataclass(frozen=True)
class Corpus:
    """Everything that is read from files, checked."""

    functions: dict[str, Function]
    train: list[Conversation]
    dev: list[Conversation]
    tests: dict[str, list[Conversation]]
    """Split name (its file's stem) → rows."""
    files: dict[str, Path]


def read(train: Path, dev: Path, tests: Sequence[Path], tools: Path) -> Corpus:
    """Read and check every file of a corpus."""
    functions = read_tools(tools)
    splits: dict[str, list[Conversation]] = {}
    for path in tests:
        if path.stem in splits:
            raise GoriError(f"two test files are named {path.stem!r}: rename one, results are told apart by it")
        splits[path.stem] = read_conversations(path, functions)
    files = {"train": train, "dev": dev, "tools": tools} | {f"test/{p.stem}": p for p in tests}
    return Corpus(functions, read_conversations(train, functions), read_conversations(dev, functions), splits, files)


def hashes(corpus: Corpus) -> dict[str, str]:
    return {k: content_hash(p) for k, p in sorted(corpus.files.items())}


def training_texts(rows: Sequence[Conversation]) -> list[str]:
    """What a tokenizer is trained on: each thing said and each string value, a space before it as in the template."""
    texts: list[str] = []
    for c in rows:
        texts += [f" {t.content}" for t in c.turns if t.content]
        for call in c.answer.calls or ():
            for value in call.arguments.values():
                values = value if isinstance(value, list) else [value]
                texts += [f" {v if isinstance(v, str) else json.dumps(v)}" for v in values]
    return texts


def epochs(
    rows: Sequence[Conversation],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    swap_values: float,
    invent_values: float = 0.0,
) -> Callable[[int], Sequence[Example]]:
    """Epoch number → its examples. A row longer than `max_tokens` is refused, not cut.

    `swap_values` of the rows get other values; of those, `invent_values` get invented ones where the argument is open.
    """
    made = spoken(rows, tokenizer, max_tokens, seed, swap_values, invent_values)
    if not swap_values:
        plain = [e for _, e in made(0)]
        return lambda _: plain
    return lambda epoch: [e for _, e in made(epoch)]


def spoken(
    rows: Sequence[Conversation],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    swap_values: float,
    invent_values: float = 0.0,
) -> Callable[[int], Sequence[tuple[Conversation, Example]]]:
    """As `epochs`, each example with the conversation that it was made of."""
    plain = [(c, encode(c, tokenizer)) for c in rows]
    for c, e in plain:
        if len(e.ids) > max_tokens:
            raise GoriError(
                f"a row has {len(e.ids)} tokens, the model's max_position is {max_tokens}: raise it or shorten "
                f"the row that begins {c.utterance[:40]!r}"
            )
    if not swap_values:
        return lambda _: plain
    pool = values_by_argument(rows)
    inventor = Inventor(tokenizer, [c.utterance for c in rows]) if invent_values else None

    def examples(epoch: int) -> Sequence[tuple[Conversation, Example]]:
        rng = np.random.default_rng([seed, 7919, epoch])
        draws = rng.random(len(rows))
        out = []
        for (c, e), draw in zip(plain, draws, strict=True):
            if draw < swap_values:
                invented = inventor if rng.random() < invent_values else None
                other = swap(c, pool, rng, invented)
                swapped = encode(other, tokenizer)
                c, e = (other, swapped) if len(swapped.ids) <= max_tokens else (c, e)
            out.append((c, e))
        return out

    return examples


def values_by_argument(rows: Sequence[Conversation]) -> dict[str, list[str]]:
    """Argument name → the distinct string values that stand verbatim in their utterances, in order of appearance."""
    pool: dict[str, dict[str, None]] = defaultdict(dict)
    for c in rows:
        for call in c.answer.calls or ():
            for name, value in call.arguments.items():
                if isinstance(value, str) and find_value(c.utterance, value):
                    pool[name][value] = None
    return {name: list(values) for name, values in pool.items()}


def find_value(utterance: str, value: str) -> re.Match[str] | None:
    """Where a value stands in an utterance, once and at a word's beginning (a Korean particle may follow it)."""
    found = list(re.finditer(rf"(?<!\S){re.escape(value)}(?![A-Za-z0-9])", utterance))
    return found[0] if len(found) == 1 else None


def _spans(utterance: str, calls: Sequence[Call]) -> list[tuple[int, str, tuple[int, int]]]:
    """(call, argument, where it stands) of each value that stands verbatim, numbers and the items of lists too."""
    found = []
    for i, call in enumerate(calls):
        for name, value in call.arguments.items():
            for v in value if isinstance(value, list) else [value]:
                if m := find_value(utterance, v if isinstance(v, str) else json.dumps(v)):
                    found.append((i, name, m.span()))
    return found


def swap(
    c: Conversation, pool: Mapping[str, Sequence[str]], rng: np.random.Generator, inventor: Inventor | None = None
) -> Conversation:
    """The same request with other values for the string arguments that stand verbatim in it: drawn from the pool, or
    invented for arguments that are open (at least OPEN_VALUES different values were said).

    A value whose words another argument shares stays: one text cannot follow two arguments.
    """
    utterance, calls = c.utterance, [Call(x.name, dict(x.arguments)) for x in c.answer.calls or ()]
    spans = _spans(utterance, calls)
    for i, name, (start, end) in sorted(spans, key=lambda s: s[2], reverse=True):  # from the right: places stay
        alone = sum(a < end and start < b for _, _, (a, b) in spans) == 1
        if alone and isinstance(calls[i].arguments[name], str) and len(pool.get(name, ())) > 1:
            value = pool[name][int(rng.integers(len(pool[name])))]
            if inventor and len(pool[name]) >= OPEN_VALUES:
                value = inventor.like(value, rng)
            calls[i] = replace(calls[i], arguments={**calls[i].arguments, name: value})
            utterance = utterance[:start] + value + utterance[end:]
    turns = [replace(t, content=utterance) if t.content == c.utterance else t for t in c.turns[:-1]]
    return Conversation((*turns, Turn("assistant", None, tuple(calls)) if c.answer.calls is not None else c.answer))
