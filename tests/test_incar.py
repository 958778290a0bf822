"""The built-in in-car corpus: calls fit the schema, values are said word for word, and no split leaks into another."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gori import incar
from gori.errors import GoriError
from gori.incar_text import LANGUAGES, line_words, native, sino, task, with_particle

TESTS = ("template", "value", "combination", "noisy", "none")
TOOLS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in incar.tools()}
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return incar.corpus(7, train=6000, dev=200, test=120)


def said(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def calls(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in row["messages"][1]["tool_calls"]]


def key(row: dict[str, Any]) -> str:
    return "".join(said(row).casefold().split())


def open_values(row: dict[str, Any]) -> list[str]:
    return [
        value
        for name, arguments in calls(row)
        for slot, value in arguments.items()
        if not {"enum", "pattern"} & set(TOOLS[name]["properties"][slot]) and isinstance(value, str)
    ]


def closed_pairs(row: dict[str, Any]) -> set[tuple[str, str]]:
    """Pairs of (parameter, value) of one function, written out, open values left aside."""
    pairs = set()
    for name, arguments in calls(row):
        closed = sorted(f"{name}.{slot}={value}" for slot, value in arguments.items() if value not in open_values(row))
        pairs |= {(a, b) for a in closed for b in closed if a < b}
    return pairs


def everything(rows: Rows) -> list[dict[str, Any]]:
    return [row for split in rows.values() for row in split]


def fits(value: Any, schema: dict[str, Any]) -> bool:
    kinds = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]) or (schema["type"] != "boolean" and isinstance(value, bool)):
        return False
    if "enum" in schema:
        return value in schema["enum"]
    if "pattern" in schema:
        return bool(re.fullmatch(schema["pattern"], value))
    return schema.get("minimum", float("-inf")) <= value <= schema["maximum"] if "maximum" in schema else True


def test_every_call_fits_its_schema_in_the_schemas_order(rows: Rows) -> None:
    for row in everything(rows):
        for name, arguments in calls(row):
            schema = TOOLS[name]
            assert list(arguments) == [slot for slot in schema["properties"] if slot in arguments]
            assert set(schema["required"]) <= set(arguments), said(row)
            assert all(fits(value, schema["properties"][slot]) for slot, value in arguments.items()), row


def test_open_values_stand_verbatim_after_a_space_or_at_the_start(rows: Rows) -> None:
    checked = 0
    for row in everything(rows):
        for value in open_values(row):
            assert re.search(r"(^|\s)" + re.escape(value), said(row)), row
            checked += 1
    assert checked > 1000


def test_a_whole_number_is_a_json_integer_and_half_degrees_are_not(rows: Rows) -> None:
    values = {a["temperature"] for row in rows["train"] for n, a in calls(row) if n == "SET_TEMPERATURE"}
    assert 22 in values
    assert {type(value) for value in values} == {int, float}
    assert not any(isinstance(value, float) and value.is_integer() for value in values)


@pytest.mark.parametrize("split", ["train", "dev", *TESTS])
def test_half_of_each_split_is_korean(rows: Rows, split: str) -> None:
    korean = [bool(re.search("[가-힣]", said(row))) for row in rows[split]]
    assert sum(korean) * 2 == len(korean)


def test_no_utterance_stands_twice_in_any_split(rows: Rows) -> None:
    keys = Counter(key(row) for row in everything(rows))
    assert max(keys.values()) == 1


def test_no_utterance_has_two_labels() -> None:
    sampler = incar.Sampler(task(), incar.Plan(), random.Random(3), held_lines=False)
    labels: dict[str, str] = {}
    for index in range(20000):
        language = LANGUAGES[index % 2]
        draft = sampler.none(language) if index % 20 < 2 else sampler.single(language)
        assert draft is not None
        text = incar.utterance(draft, sampler.rng, noise_share=0.5)
        label = json.dumps(draft.calls, ensure_ascii=False)
        assert labels.setdefault("".join(text.casefold().split()), label) == label, text


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_lines_are_new_arrangements_of_trained_words(seed: int) -> None:
    car, plan = task(), incar.make_plan(task(), seed)
    for language in LANGUAGES:
        lines = [(f.name, line) for f in (*car.functions.values(), car.none) for line in f.lines[language]]
        held = [(name, line) for name, line in lines if (name, language, line.text) in plan.lines]
        words = {
            word for name, line in lines if (name, language, line.text) not in plan.lines for word in line_words(line)
        }
        unknown = [line.text for name, line in held if name and not line_words(line) <= words]
        assert not unknown
        count = Counter(name for name, _ in held)
        assert all(count[name] >= 2 for name in car.functions)
        assert count[""] >= 25


def test_training_and_template_rows_come_from_disjoint_lines() -> None:
    plan = incar.make_plan(task(), 7)
    lines = {held: incar.Sampler(task(), plan, random.Random(0), held).lines for held in (False, True)}
    for owner, trained in lines[False].items():
        assert not {line.text for line in trained} & {line.text for line in lines[True][owner]}
        assert min(len(trained), len(lines[True][owner])) >= 2


def test_value_rows_have_values_and_half_of_them_words_that_training_never_shows(rows: Rows) -> None:
    seen = {value for row in rows["train"] for value in open_values(row)}
    words = {word for value in seen for word in value.split()}
    strict = 0
    for row in rows["value"]:
        values = open_values(row)
        assert values
        assert not seen & set(values)
        strict += not any(word in words for value in values for word in value.split())
    assert strict * 2 >= len(rows["value"])


def test_combination_rows_pair_known_values_or_functions_in_a_new_way(rows: Rows) -> None:
    pairs = {pair for row in rows["train"] for pair in closed_pairs(row)}
    shown = {f"{n}.{slot}={v}" for row in rows["train"] for n, a in calls(row) for slot, v in a.items()}
    orders = {tuple(name for name, _ in calls(row)) for row in rows["train"]}
    for row in rows["combination"]:
        if len(calls(row)) == 2:
            assert tuple(name for name, _ in calls(row)) not in orders
        else:
            assert closed_pairs(row) - pairs, row
            assert {side for pair in closed_pairs(row) for side in pair} <= shown
    assert sum(len(calls(row)) == 1 for row in rows["combination"]) > len(rows["combination"]) / 2


def test_held_pairs_and_orders_stand_in_no_other_split(rows: Rows) -> None:
    plan = incar.make_plan(task(), 7)
    held = {tuple(sorted((f"{n}.{a}={va}", f"{n}.{b}={vb}"))) for n, a, va, b, vb in plan.pairs}
    for row in (row for name, split in rows.items() if name != "combination" for row in split):
        assert not held & closed_pairs(row)
        assert tuple(name for name, _ in calls(row)) not in plan.orders


def test_training_has_every_function_in_both_languages_and_the_planned_shares(rows: Rows) -> None:
    count = Counter((name, index % 2) for index, row in enumerate(rows["train"]) for name, _ in calls(row))
    assert set(count) == {(name, language) for name in TOOLS for language in (0, 1)}
    lengths = Counter(len(calls(row)) for row in rows["train"])
    assert 0.045 < lengths[0] / len(rows["train"]) < 0.085
    assert 0.13 < lengths[2] / len(rows["train"]) < 0.22
    assert sum(len(calls(row)) == 2 for row in rows["noisy"]) < 0.2 * len(rows["noisy"])
    assert set(lengths) == {0, 1, 2}


def test_none_rows_have_no_call_and_template_rows_have_one_or_two(rows: Rows) -> None:
    assert not any(calls(row) for row in rows["none"])
    assert {len(calls(row)) for row in rows["template"]} == {1, 2}


def test_noise_changes_the_words_but_no_open_or_closed_value() -> None:
    rng = random.Random(5)
    sampler = incar.Sampler(task(), incar.Plan(), rng, held_lines=False)
    changed = 0
    for index in range(2000):
        draft = sampler.single(LANGUAGES[index % 2])
        assert draft is not None
        text = incar.utterance(draft, rng, noise_share=1.0)
        changed += text != incar.utterance(draft, rng, noise_share=0.0)
        for kind, words in draft.pieces:
            if kind in "oc":
                assert (words if kind == "o" else words.lower()) in (text if kind == "o" else text.lower())
    assert changed > 1960


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", ["place", "contact", "song", "artist", "playlist", "station", "town", "text", "note"])
def test_open_slots_have_ten_thousand_values(language: str, kind: str) -> None:
    rng, names = random.Random(1), task().names[language]
    values = {names.draw(kind, rng) for _ in range(16000)}
    assert len(values) >= 10000
    assert all(value == " ".join(value.split()) for value in values)


@pytest.mark.parametrize("particle", ["으로", "을", "이", "과", "이라고"])
def test_particles_follow_the_last_sound(particle: str) -> None:
    open_form = {"으로": "로", "을": "를", "이": "가", "과": "와", "이라고": "라고"}[particle]
    for word in ("강남역", "집", "민준", "30", "3", "100", "10"):
        assert with_particle(word, particle) == particle
    for word in ("학교", "카페", "22도", "5", "갈게", "2", "91.9"):
        assert with_particle(word, particle) == open_form
    for word in ("서울", "21", "에펠"):
        assert with_particle(word, particle) == ("로" if particle == "으로" else particle)


def test_korean_numbers_are_read_both_ways() -> None:
    assert [sino(number) for number in (0, 10, 22, 100, 125, 91.9)] == [
        "영",
        "십",
        "이십이",
        "백",
        "백이십오",
        "구십일 점 구",
    ]
    assert [native(number) for number in (1, 10, 20, 22)] == ["한", "열", "스무", "스물두"]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        incar.write(tmp_path / name, seed, train=300, dev=20, test=20)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted([*(f"{split}.jsonl" for split in ("train", "dev", *TESTS)), "tools.json"])
    one, again, two = ([(tmp_path / d / f).read_bytes() for f in files] for d in ("one", "again", "two"))
    assert one == again
    assert one != two
    assert json.loads((tmp_path / "one" / "tools.json").read_text(encoding="utf-8")) == incar.tools()


def test_asking_for_more_rows_than_there_are_is_refused() -> None:
    made = incar.Corpus(0)
    with pytest.raises(GoriError, match="ask for fewer"):
        made.fill("none", 5, lambda sampler, language: None)
