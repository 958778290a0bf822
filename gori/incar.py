"""The built-in task: in-car function calling in Korean and English, every row made by the project from a seed.

`incar.yaml` says what the car can do and how drivers ask for it, `incar_text` turns that into words; here rows are
drawn and divided into splits that do not leak. What a test file shows and training does not:

- `template`: template lines. They are chosen greedily so that every word of a held-out line still stands in a training
  line of that language: the split measures new arrangements of known words, not new words.
- `value`: names, titles and texts; for every second row even their single words.
- `combination`: pairs of closed values within a function, and ordered pairs of functions in one utterance.
- `noisy`: only new rows; training has the same kind of noise in a fifth of its rows.
- `none`: utterances that no function serves, from held-out template lines.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gori.errors import GoriError
from gori.incar_text import (
    LANGUAGES,
    Function,
    Line,
    Piece,
    Task,
    is_open,
    line_words,
    noisy,
    pick,
    source,
    task,
    tidy,
    with_particle,
)

TEST_SPLITS = ("template", "value", "combination", "noisy", "none")
NONE_SHARE, TWO_SHARE, TRAINING_TWO_SHARE, NOISE_SHARE = 0.06, 0.08, 0.2, 0.2
HELD_LINES, HELD_PAIRS, HELD_ORDERS = 0.18, 0.12, 0.1
JOINERS = {
    "ko": (" 그리고 ", ", 그리고 ", " 그다음에 "),
    "en": (" and ", " and ", " and then ", ", and ", ", then ", " and also "),
}
Pair = tuple[str, str, Any, str, Any]


@dataclass(frozen=True)
class Plan:
    """What training never shows."""

    lines: set[tuple[str, str, str]] = field(default_factory=set)
    """(function, language, template text)"""
    pairs: set[Pair] = field(default_factory=set)
    orders: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class Draft:
    """An utterance before noise, with its calls and the open values that stand in it."""

    language: str
    pieces: list[Piece]
    calls: list[tuple[str, dict[str, Any]]]
    opens: list[str]


def tools() -> list[dict[str, Any]]:
    """The car's functions as OpenAI function definitions."""
    spec = source()
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": entry["about"],
                "parameters": {
                    "type": "object",
                    "properties": {key: schema(param, spec) for key, param in entry["params"].items()},
                    "required": entry["required"],
                },
            },
        }
        for name, entry in spec["functions"].items()
    ]


def schema(param: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of one parameter."""
    about = {"description": param["about"]} if "about" in param else {}
    if "num" in param:
        numbers = spec["numbers"][param["num"]]
        kind = "integer" if isinstance(numbers["step"], int) else "number"
        return {"type": kind, "minimum": numbers["from"], "maximum": numbers["to"]}
    if "enum" in param:
        return {"type": "string", "enum": [*spec["lexicons"][param["enum"]], *param.get("more", [])]}
    if "clock" in param:
        return {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$", **about}
    return {"type": "string", **about} if is_open(param) else {"type": "boolean"}


def make_plan(car: Task, seed: int) -> Plan:
    """Draw what training never shows."""
    rng = random.Random(f"gori incar plan {seed}")
    plan = Plan()
    for language in LANGUAGES:
        hold_lines(car, language, plan, rng)
    for function in car.functions.values():
        plan.pairs.update(hold_pairs(function, plan, rng))
    plan.orders.update(pair for pair in itertools.permutations(car.functions, 2) if rng.random() < HELD_ORDERS)
    return plan


def hold_lines(car: Task, language: str, plan: Plan, rng: random.Random) -> None:
    """Hold out lines whose words, slots and fixed values stay in training lines, one of each function in turn."""
    owners = [*car.functions.values(), car.none]
    words = {(owner.name, line.text): line_words(line) for owner in owners for line in owner.lines[language]}
    count = Counter(word for tokens in words.values() for word in tokens)
    quota = {owner.name: max(2, round(HELD_LINES * len(owner.lines[language]))) for owner in owners}
    quota[""] = max(28, quota[""])
    for turn in range(max(quota.values())):
        for owner in owners:
            left = [line for line in owner.lines[language] if (owner.name, language, line.text) not in plan.lines]
            able = [line for line in left if turn < quota[owner.name] and (not owner.name or replaceable(line, left))]
            if able:
                keys = {
                    line.text: (sum(count[word] < 2 for word in words[owner.name, line.text]), rng.random())
                    for line in able
                }
                best = min(able, key=lambda line: keys[line.text])
                plan.lines.add((owner.name, language, best.text))
                count.subtract(words[owner.name, best.text])


def replaceable(line: Line, others: list[Line]) -> bool:
    """Whether other lines give every slot and fixed value that `line` gives."""
    given = [offers(other) for other in others if other is not line]
    return all(any(offer in offered or (offer[0], "") in offered for offered in given) for offer in offers(line))


def offers(line: Line) -> set[tuple[str, Any]]:
    return {*line.fixed.items(), *((slot, "") for slot in line.slots if slot not in line.fixed)}


def hold_pairs(function: Function, plan: Plan, rng: random.Random) -> list[Pair]:
    """Pairs of closed values to keep from training; each value keeps at least one partner."""
    reachable: set[Pair] = set()
    fixed: set[Pair] = set()
    for language in LANGUAGES:
        for line in function.lines[language]:
            if (function.name, language, line.text) not in plan.lines:
                reachable.update(line_pairs(function, line, language))
                fixed.update(closed_pairs(function, line.fixed))
    pairs = sorted(reachable - fixed, key=repr)
    partners = Counter(side for pair in reachable for side in sides(pair))
    held: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: rng.random()):
        if len(held) < max(1, HELD_PAIRS * len(pairs)) and all(partners[side] > 1 for side in sides(pair)):
            held.append(pair)
            partners.subtract(sides(pair))
    return held


def sides(pair: Pair) -> list[tuple[Any, ...]]:
    """Each value of the pair with the parameter that it is paired with."""
    _, one, a, two, b = pair
    return [(one, a, two), (two, b, one)]


def line_pairs(function: Function, line: Line, language: str) -> set[Pair]:
    """Every pair of closed values that the line can give."""
    closed = [
        key for key in function.params if not is_open(function.params[key]) and (key in line.slots or key in line.fixed)
    ]
    pairs: set[Pair] = set()
    for one, two in itertools.combinations(closed, 2):
        for a, b in itertools.product(*(line_values(function, line, language, key) for key in (one, two))):
            pairs.add((function.name, one, a, two, b))
    return pairs


def line_values(function: Function, line: Line, language: str, key: str) -> list[Any]:
    return [line.fixed[key]] if key in line.fixed else [value for value, _ in function.choices[language][key]]


def closed_pairs(function: Function, arguments: dict[str, Any]) -> list[Pair]:
    """The pairs of closed values in a call, in the schema's order."""
    closed = [key for key, param in function.params.items() if key in arguments and not is_open(param)]
    return [(function.name, a, arguments[a], b, arguments[b]) for a, b in itertools.combinations(closed, 2)]


class Sampler:
    """Draws utterances that keep to the plan, for row number `index`; `reserved` takes open values' reserved parts."""

    def __init__(
        self, car: Task, plan: Plan, rng: random.Random, held_lines: bool = False, weighted: bool = True
    ) -> None:
        self.car, self.plan, self.rng = car, plan, rng
        self.index, self.reserved = 0, False
        self.lines = {
            (owner.name, language): [
                line
                for line in owner.lines[language]
                if ((owner.name, language, line.text) in plan.lines) == held_lines
            ]
            for owner in (*car.functions.values(), car.none)
            for language in LANGUAGES
        }
        self.pool = [name for name, function in car.functions.items() for _ in range(round(10 * function.weight))]

    def any(self, language: str, two_share: float = TWO_SHARE) -> Draft | None:
        """A request of any kind or none; None where a draw did not succeed."""
        kind = self.rng.random()
        if kind < NONE_SHARE:
            return self.none(language)
        return self.two(language) if kind < NONE_SHARE + two_share else self.single(language)

    def training(self, language: str) -> Draft | None:
        """Two requests more often than drivers have them: how they part is learned from these rows alone."""
        return self.any(language, TRAINING_TWO_SHARE)

    def served(self, language: str) -> Draft | None:
        return self.two(language) if self.rng.random() < TWO_SHARE else self.single(language)

    def none(self, language: str) -> Draft:
        draft = self.clause(self.car.none, pick(self.rng, self.lines["", language]), language, "nodes")
        return Draft(language, draft.pieces, [], draft.opens)

    def single(self, language: str, held: bool = False) -> Draft | None:
        """One call; `held` asks for a pair of closed values that training never shows."""
        name = pick(self.rng, self.pool)
        draft = self.clause(self.car.functions[name], pick(self.rng, self.lines[name, language]), language, "nodes")
        return draft if self.shown(draft) != held else None

    def two(self, language: str, held: bool = False) -> Draft | None:
        """Two calls; `held` asks for an order of functions that training never shows."""
        one, two = pick(self.rng, self.pool), pick(self.rng, self.pool)
        firsts = [line for line in self.lines[one, language] if goes_first(line, language)]
        seconds = [line for line in self.lines[two, language] if line.joinable]
        if one == two or ((one, two) in self.plan.orders) != held or not firsts or not seconds:
            return None
        line = pick(self.rng, firsts)
        linked = line.text.endswith("<줘>") and self.rng.random() < 0.7
        first = self.clause(self.car.functions[one], line, language, "first" if linked else "nodes")
        second = self.clause(self.car.functions[two], pick(self.rng, seconds), language, "second")
        first.pieces[-1] = (first.pieces[-1][0], first.pieces[-1][1].rstrip("?"))
        joiner = " " if linked else pick(self.rng, JOINERS[language])
        pieces = tidy([*first.pieces, ("t", joiner), *second.pieces])
        draft = Draft(language, pieces, first.calls + second.calls, first.opens + second.opens)
        return draft if self.shown(draft) else None

    def shown(self, draft: Draft) -> bool:
        """Whether training may show every pair of closed values of the draft."""
        return not any(
            pair in self.plan.pairs
            for name, arguments in draft.calls
            for pair in closed_pairs(self.car.functions[name], arguments)
        )

    def clause(self, function: Function, line: Line, language: str, form: str) -> Draft:
        """One template line with its alternatives and slots filled in."""
        pieces: list[Piece] = []
        arguments, opens = dict(line.fixed), []
        for kind, value in getattr(line, form):
            if kind != "s":
                pieces.append(("t", value if kind == "t" else pick(self.rng, value)))
                continue
            slot, particle = value
            text = self.fill(function, line, slot, language, arguments)
            if is_open(function.params[slot]):
                opens.append(text)
            pieces.append(("o" if is_open(function.params[slot]) else "c", text))
            if particle:
                pieces.append(("p", with_particle(text, particle)))
        ordered = {key: arguments[key] for key in function.params if key in arguments}
        return Draft(language, tidy(pieces), [(function.name, ordered)], opens)

    def fill(self, function: Function, line: Line, slot: str, language: str, arguments: dict[str, Any]) -> str:
        """Draw the slot's value into `arguments` and return its surface form."""
        if is_open(function.params[slot]):
            arguments[slot] = self.car.names[language].draw(function.params[slot]["open"], self.rng, self.reserved)
            return str(arguments[slot])
        choices = function.choices[language][slot]
        if slot in line.fixed:
            choices = [choice for choice in choices if choice[0] == line.fixed[slot]]
        arguments[slot], forms = pick(self.rng, choices)
        return pick(self.rng, forms)


Draw = Callable[[Sampler, str], Draft | None]


def goes_first(line: Line, language: str) -> bool:
    """Whether another request may follow: not where it could be read as the end of a free text."""
    return line.joinable and not ("text" in line.slots and (language == "en" or line.nodes[-1][0] == "s"))


def utterance(draft: Draft, rng: random.Random, noise_share: float) -> str:
    """The draft's words: English begins with a capital, and some rows are heard badly."""
    pieces = list(draft.pieces)
    if draft.language == "en" and pieces[0][0] != "o":
        pieces[0] = (pieces[0][0], pieces[0][1][0].upper() + pieces[0][1][1:])
    if rng.random() < noise_share:
        pieces = tidy(noisy(pieces, draft.language, rng))
    return "".join(text for _, text in pieces)


def row(content: str, draft: Draft) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in draft.calls
    ]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "tool_calls": calls}]}


class Corpus:
    """The splits as they grow: no utterance stands twice, and what training showed is remembered."""

    def __init__(self, seed: int) -> None:
        self.seed, self.car = seed, task()
        self.plan = make_plan(self.car, seed)
        self.splits: dict[str, list[dict[str, Any]]] = {}
        self.seen: set[str] = set()
        self.values: set[str] = set()
        self.words: set[str] = set()
        self.shown: set[tuple[str, str, Any]] = set()

    def fill(
        self, name: str, count: int, draw: Draw, noise_share: float = 0.0, held_lines: bool = False
    ) -> list[Draft]:
        """Add a split of `count` rows, Korean and English in turn; `draw` gives None to be asked again."""
        sampler = Sampler(self.car, self.plan, random.Random(f"gori incar {name} {self.seed}"), held_lines)
        rows, drafts = self.splits.setdefault(name, []), []
        for _ in range(1000 * count + 100_000):
            if len(rows) == count:
                return drafts
            sampler.index = len(rows)
            draft = draw(sampler, LANGUAGES[len(rows) % 2])
            content = utterance(draft, sampler.rng, noise_share) if draft else ""
            key = "".join(content.casefold().split())
            if draft and key not in self.seen:
                self.seen.add(key)
                rows.append(row(content, draft))
                drafts.append(draft)
        raise GoriError(
            f"the in-car task has only {len(rows)} different {name} rows, {count} were asked for: ask for fewer"
        )

    def remember(self, drafts: list[Draft]) -> None:
        for draft in drafts:
            self.values.update(draft.opens)
            self.words.update(word for value in draft.opens for word in value.split())
            self.shown.update((name, key, value) for name, arguments in draft.calls for key, value in arguments.items())

    def unseen_values(self, sampler: Sampler, language: str) -> Draft | None:
        """A row whose open values, and in every second pair of rows their words, training does not have."""
        sampler.reserved = sampler.index // 2 % 2 == 1
        draft = sampler.served(language)
        if draft is None or not draft.opens or any(value in self.values for value in draft.opens):
            return None
        known = any(word in self.words for value in draft.opens for word in value.split())
        return None if sampler.reserved and known else draft

    def unseen_combination(self, sampler: Sampler, language: str) -> Draft | None:
        """A row with a pair of known closed values, or an order of known functions, that training does not have."""
        if sampler.index % 10 >= 7:
            return sampler.two(language, held=True)
        draft = sampler.single(language, held=True)
        if draft is None:
            return None
        ((name, arguments),) = draft.calls
        closed = [(name, key, value) for key, value in arguments.items() if value not in draft.opens]
        return draft if self.shown.issuperset(closed) else None


def corpus(seed: int, train: int = 30000, dev: int = 400, test: int = 300) -> dict[str, list[dict[str, Any]]]:
    """Rows of every split: `train` and `dev` rows as named, `test` rows in each test split.

    Same arguments, same rows. Half of each split is Korean, half English. Raises GoriError where the task has too few
    different utterances.
    """
    made = Corpus(seed)
    made.remember(made.fill("train", train, Sampler.training, NOISE_SHARE))
    made.fill("dev", dev, Sampler.any, NOISE_SHARE)
    made.fill("template", test, Sampler.served, held_lines=True)
    made.fill("value", test, made.unseen_values)
    made.fill("combination", test, made.unseen_combination)
    made.fill("noisy", test, Sampler.any, noise_share=1.0)
    made.fill("none", test, Sampler.none, held_lines=True)
    return made.splits


def write(out: Path, seed: int, train: int = 30000, dev: int = 400, test: int = 300) -> None:
    """Write `tools.json` and one JSON Lines file per split into `out`. Same arguments, same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tools.json").write_text(json.dumps(tools(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name, rows in corpus(seed, train, dev, test).items():
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
