"""The grammar of calls in Python: whatever may be said parses and fits its schema, whatever fits may be said, and an
answer ends within its budget. Its automata against what they claim to accept."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runner_tools
from gori import automata
from gori.calls import Call, Function, parse, plain, read_tools, render
from gori.errors import GoriError
from gori.grammar import COPIED, compile_grammar, open_automaton
from gori.runtime.constrain import MOST_CALLS, Constraint, Vocabulary
from gori.tokenizer import Tokenizer, eos_ids
from runner_tools import FUNCTIONS, KINDS, SAID, vocabulary

Task = tuple[Vocabulary, Tokenizer, Mapping[str, Function]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = tmp_path_factory.mktemp("tools")
    functions = runner_tools.write(directory)
    return vocabulary(directory), Tokenizer.load(directory), functions


def schema() -> dict[str, Any]:
    """What an answer is, in JSON Schema: the independent reference."""
    options = []
    for name, (keys, required) in FUNCTIONS.items():
        given = {"type": "object", "properties": {k: KINDS[k] for k in keys}, "required": required}
        body = {"name": {"const": name}, "arguments": {**given, "additionalProperties": False}}
        options.append({"type": "object", "properties": body, "required": ["name", "arguments"]})
    return {"type": "array", "maxItems": MOST_CALLS, "items": {"oneOf": options}}


VALID = jsonschema.Draft202012Validator(schema())


def random_answer(words: Vocabulary, said: str, budget: int, rng: random.Random) -> list[int]:
    """Tokens of an answer that took what the grammar allowed by chance, the end mark among them."""
    constraint, ids = Constraint(words, said, budget), []
    while not constraint.done:
        listed, mask = constraint.allowed()
        options = listed + ([] if mask is None else np.flatnonzero(mask).tolist())
        assert options, f"nothing may follow {ids}"
        # mostly a special token where one may follow, or an answer would be one long text
        ids.append(rng.choice(listed if listed and rng.random() < 0.6 else options))
        constraint.advance(ids[-1])
    return ids


@pytest.mark.parametrize("budget", [2, 3, 4, 6, 9, 14, 30, 80, 250])
def test_whatever_may_be_said_parses_and_fits_its_schema_within_the_budget(budget: int, task: Task) -> None:
    words, tokenizer, functions = task
    rng = random.Random(budget)
    for n in range(320):
        said = SAID[n % len(SAID)]
        ids = random_answer(words, tokenizer.normalize(said), budget, rng)
        assert len(ids) <= budget
        assert ids[-1] in words.ends
        calls = parse(tokenizer.decode(ids[:-1]), functions)
        VALID.validate([plain(c) for c in calls])
        assert all(v in tokenizer.normalize(said) for v in copied_values(calls))


def copied_values(calls: list[Call]) -> list[str]:
    return [v for c in calls for k in ("copied", "copies") for v in _listed(c.arguments.get(k, []))]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_a_long_answer_reaches_every_function_and_every_argument(task: Task) -> None:
    words, tokenizer, functions = task
    rng, met = random.Random(1), set()
    for _ in range(150):
        ids = random_answer(words, "서울역 앞", 200, rng)
        for call in parse(tokenizer.decode(ids[:-1]), functions):
            met |= {(call.name, k) for k in call.arguments} | {(call.name, "")}
    assert met == {(n, k) for n, (keys, _) in FUNCTIONS.items() for k in [*keys, ""]}


def accepts(words: Vocabulary, tokenizer: Tokenizer, calls: list[Call], said: str = "") -> bool:
    constraint = Constraint(words, said, 4000)
    for token in [*tokenizer.encode_markup(render(calls)), words.ends[0]]:
        listed, mask = constraint.allowed()
        if token not in listed and not (mask is not None and mask[token]):
            return False
        constraint.advance(token)
    return constraint.done


# as a tokenizer in NFC gives it back, and as gori lets a value be
plain_text = st.text(st.characters(codec="utf-8", max_codepoint=0xD7A3, exclude_categories=("Mn", "Mc", "Cn", "Lo")))
hangul = st.text(st.sampled_from("서울역 앞으로ab<|>\"'\\{}"), max_size=12)
texts = (plain_text | hangul).map(str.strip).filter(lambda t: bool(t) and "<|" not in t and "|>" not in t)
decimals = st.integers(-(10**13), 10**13).map(lambda n: n / 1000).filter(lambda x: "e" not in repr(x))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**14), 10**14), decimals, hangul.filter(lambda t: "<|" not in t)
)
objects = st.dictionaries(
    hangul.filter(lambda t: "<|" not in t),
    leaves
    | st.lists(leaves, max_size=3)
    | st.dictionaries(st.sampled_from("ab"), leaves | st.lists(leaves, max_size=2)),
    max_size=3,
).filter(lambda o: "<|" not in json.dumps(o) and "|>" not in json.dumps(o))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "enum": st.sampled_from(KINDS["enum"]["enum"]),
    "few": st.integers(-3, 12),
    "level": st.sampled_from([1, 2, 30]),
    "degrees": st.integers(1600, 3000).map(lambda n: n / 100) | st.integers(16, 30),
    "fine": st.integers(-49, 75).map(lambda n: n / 100),
    "open_number": decimals | st.integers(-(10**15) + 1, 10**15 - 1),
    "count": st.integers(-(10**15) + 1, 10**15 - 1),
    "large": st.integers(-20, 123456),
    "below": st.integers(-(10**15) + 1, -8),
    "on": st.booleans(),
    "text": texts,
    "time": st.builds("{:02d}:{:02d}".format, st.integers(0, 23), st.integers(0, 59)),
    "plate": st.builds(
        "{:02d}{} {:04d}".format, st.integers(0, 999), st.sampled_from("가나하힣"), st.integers(0, 9999)
    ),
    "texts": st.lists(texts, min_size=1, max_size=3),
    "numbers": st.lists(st.integers(-9999, 5), min_size=1, max_size=3),
    "zones": st.lists(st.sampled_from(KINDS["zones"]["items"]["enum"]), min_size=1, max_size=4),
    "object": objects,
    "objects": st.lists(objects, min_size=1, max_size=2),
}


@st.composite
def calls_of_tools(draw: st.DrawFn) -> list[Call]:
    out = []
    for name in draw(st.lists(st.sampled_from([n for n in FUNCTIONS if n != "copying"]), max_size=3)):
        keys, required = FUNCTIONS[name]
        taken = [k for k in keys if k in VALUES and (k in required or draw(st.booleans()))]
        out.append(Call(name, {k: draw(VALUES[k]) for k in draw(st.permutations(taken))}))
    return out


@given(calls_of_tools())
def test_every_call_that_fits_its_schema_may_be_said(task: Task, calls: list[Call]) -> None:
    words, tokenizer, functions = task
    VALID.validate([plain(c) for c in calls])
    assert parse(render(calls), functions) == calls
    assert accepts(words, tokenizer, calls), render(calls)


@pytest.mark.parametrize(
    "call",
    [
        Call("strict", {"enum": "d"}),  # four required arguments are missing
        Call("all", {"enum": "passenger"}),
        Call("all", {"few": 13}),
        Call("all", {"degrees": 30.5}),
        Call("all", {"fine": -0.5}),
        Call("all", {"count": 1.5}),
        Call("all", {"below": -7}),
        Call("all", {"text": " a"}),
        Call("all", {"time": "24:00"}),
        Call("all", {"plate": "12가 34567"}),
        Call("all", {"copied": "부산"}),
        Call("all", {"object": [1]}),
        Call("nothing", {"few": 1}),
    ],
)
def test_a_call_that_does_not_fit_may_not_be_said(call: Call, task: Task) -> None:
    assert not accepts(*task[:2], [call], "서울역")


def test_a_copied_value_may_be_any_words_that_were_said(task: Task) -> None:
    words, tokenizer, _ = task
    said = "take me to 서울역 앞, please"
    for begin in range(len(said)):
        for end in range(begin + 1, len(said) + 1):
            value = said[begin:end]
            fits = value == value.strip()
            call = [Call("all", {"copied": value})]
            # the tokenizer's own cut of the value must lie in the utterance's bytes, and does
            assert accepts(words, tokenizer, call, said) is fits, value


def test_a_range_without_a_value_is_refused_with_the_argument(task: Task, tmp_path: Path) -> None:
    _, tokenizer, _ = task
    for bad in ({"minimum": 3, "maximum": 2}, {"minimum": 2.2, "maximum": 2.8}):
        body = [{"name": "all", "parameters": {"properties": {"few": {"type": "integer", **bad}}}}]
        (tmp_path / "tools.json").write_text(json.dumps(body))
        with pytest.raises(GoriError, match="few"):
            compile_grammar(read_tools(tmp_path / "tools.json"), tokenizer, [0])


# --- automata ---------------------------------------------------------------------------------------------------------


def is_text(raw: bytes) -> bool:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return False
    value = text[1:]
    return text[:1] == " " and bool(value) and value == value.strip() and "<|" not in value


@given(
    st.binary(max_size=6) | st.text(st.sampled_from(" a<|\u3000\xa0\u2028가\U0001f600\x85"), max_size=6).map(str.encode)
)
def test_text_is_utf8_that_strip_leaves_alone(raw: bytes) -> None:
    text = open_automaton("string")
    for candidate in (raw, b" " + raw):
        assert text.matches(candidate) is is_text(candidate), candidate


def test_text_takes_every_character_but_white_space_alone() -> None:
    text = open_automaton("string")
    for c in range(0, 0x110000, 3):
        raw = b" " + chr(c).encode("utf-8", "surrogatepass")
        assert text.matches(raw) is is_text(raw), hex(c)


BOUNDS = [None, "-1000", "-7", "-0.5", "0", "0.125", "3.25", "16", "99.5", "100", "1234"]


@pytest.mark.parametrize("low", BOUNDS)
def test_numbers_are_those_between_their_bounds(low: str | None) -> None:
    rng = random.Random(low)
    least = None if low is None else Decimal(low)
    for high in BOUNDS[1:]:
        if least is not None and Decimal(high) < least:
            continue
        whole = automata.number(least, Decimal(high), 0)
        for v in range(-1100, 1300, 1 if low in (None, "-7") else 7):
            assert whole.matches(f" {v}".encode()) is ((least is None or least <= v) and v <= Decimal(high)), (
                low,
                high,
                v,
            )
    fine = automata.number(least, Decimal("1234"), automata.FRACTION_DIGITS)
    for _ in range(3000):
        v = Decimal(rng.randint(-(10**7), 10**7)).scaleb(-rng.randint(0, 6))
        text = f"{v:f}"
        assert fine.matches(f" {text}".encode()) is ((least is None or least <= v) and v <= 1234), text


@given(st.text(st.sampled_from("0123456789-+.e "), max_size=8))
def test_whatever_a_number_takes_is_json(text: str) -> None:
    fine = open_automaton(("number", Decimal("-40.5"), Decimal("77")))
    if fine.matches(f" {text}".encode()):
        assert isinstance(value := json.loads(text), (int, float))
        assert text == text.strip()
        assert -40.5 <= value <= 77


@given(objects, st.integers(0, 200), st.sampled_from('{}[]",:0 \\n.'))
def test_whatever_an_object_takes_is_json(value: dict[str, Any], place: int, odd: str) -> None:
    whole, text = open_automaton("object"), json.dumps(value, ensure_ascii=False)
    assert whole.matches(f" {text}".encode())
    damaged = text[:place] + odd + text[place + 1 :]
    if whole.matches(f" {damaged}".encode()):
        assert isinstance(json.loads(damaged, parse_constant=pytest.fail), dict)


def test_an_object_is_no_deeper_than_it_says_and_has_no_special_tokens() -> None:
    whole = open_automaton("object")
    assert whole.matches(b' {"a": {"b": [1]}}')
    for bad in (b' {"a": {"b": [[1]]}}', b' {"a": "<|"}', b" [1]", b" {}{}", b'{"a": 1}', b' {"a":1}', b' {"a": NaN}'):
        assert not whole.matches(bad), bad


PATTERNS = [
    "^[0-2][0-9]:[0-5][0-9]$", "a", "^a", "b$", "^(ab|c)*$", "^a?b{2}c{1,3}$", "^[^a]+$", "^.{2,3}$", r"^\d+(\.\d+)?$",
    r"^\w+@\w+\.(com|kr)$", "^[가-나]+$", "^(?:a|b|)c$", r"^\(\d{3}\)$", "^[a-c-]$", "[^0-9]",
    "^é*b$", "^a|b$", r"^\w+\s\w+$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@given(st.text(st.sampled_from("abc가é:.@0129 ()-]kr\U0001f600"), max_size=6))
def test_a_pattern_is_found_where_python_finds_it(pattern: str, text: str) -> None:
    # of ASCII, as ECMAScript has these classes
    expected = bool(re.search(pattern, text, re.ASCII)) and is_text(f" {text}".encode())
    assert open_automaton(("pattern", pattern)).matches(f" {text}".encode()) is expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_pattern_takes_python_finds(pattern: str) -> None:
    a, rng = open_automaton(("pattern", pattern)), random.Random(pattern)
    for _ in range(100):
        state, raw = 0, bytearray()
        while not (a.accept[state] and (rng.random() < 0.3 or not (a.next[state] >= 0).any())) and len(raw) < 200:
            raw.append(rng.choice(np.flatnonzero(a.next[state] >= 0).tolist()))
            state = int(a.next[state, raw[-1]])
        if a.accept[state]:
            assert re.search(pattern, raw[1:].decode()), raw


@pytest.mark.parametrize(
    "pattern", ["(?=a)", r"(a)\1", "a**", "[a", "(a", "a)", r"\bword", "(a{900}){9}", "[^가]", "a{2,1", r"\S", "[]a]"]
)
def test_a_pattern_that_is_not_understood_is_said(
    pattern: str, task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = [{"name": "all", "parameters": {"properties": {"text": {"type": "string", "pattern": pattern}}}}]
    (tmp_path / "tools.json").write_text(json.dumps(body))
    compile_grammar(read_tools(tmp_path / "tools.json"), task[1], [0])
    assert "do not hold to its pattern" in capsys.readouterr().err


def test_every_state_of_an_automaton_is_reached_and_can_end() -> None:
    for a in (
        open_automaton("string"),
        open_automaton("object"),
        open_automaton(("number", Decimal("-3"), Decimal("40.25"))),
    ):
        reached, todo = {0}, [0]
        for state in todo:
            fresh = {int(s) for s in a.next[state] if s != automata.DEAD} - reached
            reached |= fresh
            todo += sorted(fresh)
        assert reached == set(range(len(a.next)))
        distance = np.where(a.accept, 0, math.inf)
        for _ in range(len(a.next)):
            distance = np.minimum(distance, 1 + np.append(distance, math.inf)[a.next].min(1))
        assert np.isfinite(distance).all()


def test_the_end_marks_are_those_of_the_checkpoint(task: Task, tmp_path: Path) -> None:
    words, tokenizer, functions = task
    tokenizer.save(tmp_path)
    assert words.ends == eos_ids(tmp_path)
    assert compile_grammar(functions, tokenizer, [7, 9]).arrays["marks"][2:].tolist() == [7, 9]


def test_a_copied_argument_that_is_no_open_text_is_refused(task: Task, tmp_path: Path) -> None:
    for bad in ({"type": "integer", COPIED: True}, {"type": "string", "enum": ["a"], COPIED: True}):
        body = [{"name": "all", "parameters": {"properties": {"few": bad}}}]
        (tmp_path / "tools.json").write_text(json.dumps(body))
        with pytest.raises(GoriError, match=COPIED):
            compile_grammar(read_tools(tmp_path / "tools.json"), task[1], [0])
