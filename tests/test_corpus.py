"""Rows for training: swapped values stay consistent in utterance and call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gori import corpus
from gori.calls import Call
from gori.corpus import Corpus, epochs, find_value, swap, values_by_argument
from gori.data import Conversation, Turn, encode
from gori.errors import GoriError
from gori.invent import Inventor
from gori.tokenizer import Tokenizer

VALUES = ("서울역", "역", "서울역 광장", "집", "Main", "Main Street", "Street", "Pier 39", "39")
POOL = {"a": list(VALUES), "b": list(VALUES), "c": ["집"]}


def conversation(said: str, *calls: dict[str, object]) -> Conversation:
    return Conversation((Turn("user", said), Turn("assistant", None, tuple(Call("f", a) for a in calls))))


@st.composite
def requests(draw: st.DrawFn) -> Conversation:
    """Calls, and a sentence of some of their values and filler words; values may overlap or stand twice."""
    value = st.sampled_from(VALUES) | st.just(7) | st.lists(st.sampled_from(VALUES), min_size=2, max_size=2)
    calls = draw(
        st.lists(st.dictionaries(st.sampled_from("abc"), value, min_size=1, max_size=3), min_size=1, max_size=2)
    )
    said = [str(v) for c in calls for x in c.values() for v in (x if isinstance(x, list) else [x])]
    pieces = draw(st.lists(st.sampled_from([*said, "가자", "please"]), min_size=1, max_size=5, unique=True))
    ends = draw(st.lists(st.sampled_from(["", "로", "을", ","]), min_size=len(pieces), max_size=len(pieces)))
    return conversation(" ".join(p + e for p, e in zip(pieces, ends, strict=True)), *calls)


def standing(c: Conversation) -> list[tuple[int, str]]:
    """Which string arguments can be read off the utterance."""
    return [
        (i, name)
        for i, call in enumerate(c.answer.calls or ())
        for name, value in call.arguments.items()
        if isinstance(value, str) and value in c.utterance
    ]


@settings(max_examples=400)
@given(requests(), st.integers(0, 2**32 - 1))
def test_every_value_that_stood_in_the_utterance_stands_in_it_after_a_swap(c: Conversation, seed: int) -> None:
    swapped = swap(c, POOL, np.random.default_rng(seed))
    assert set(standing(c)) <= set(standing(swapped))
    for before, after in zip(c.answer.calls or (), swapped.answer.calls or (), strict=True):
        assert (after.name, list(after.arguments)) == (before.name, list(before.arguments))
        for name, value in before.arguments.items():
            if not isinstance(value, str) or name == "c":
                assert after.arguments[name] == value


@settings(max_examples=400)
@given(requests(), st.integers(0, 2**32 - 1))
def test_a_swap_changes_only_the_words_of_the_values_it_changed(c: Conversation, seed: int) -> None:
    swapped = swap(c, POOL, np.random.default_rng(seed))
    said, told = c.utterance, swapped.utterance
    changed = [
        (old, new)
        for x, y in zip(c.answer.calls or (), swapped.answer.calls or (), strict=True)
        for old, new in zip(x.arguments.values(), y.arguments.values(), strict=True)
        if old != new
    ]
    for old, _ in changed:
        said = said.replace(str(old), "", 1)
    if not changed:
        assert told == said
    assert len(told) - len(c.utterance) == sum(len(str(new)) - len(str(old)) for old, new in changed)


def test_a_plain_request_is_swapped_in_utterance_and_call_alike() -> None:
    seen = set()
    for seed in range(40):
        swapped = swap(conversation("서울역으로 가자", {"a": "서울역"}), POOL, np.random.default_rng(seed))
        value = (swapped.answer.calls or ())[0].arguments["a"]
        assert swapped.utterance == f"{value}으로 가자"
        seen.add(value)
    assert len(seen) > len(VALUES) // 2


@pytest.mark.parametrize(
    ("said", "value", "found"),
    [
        ("서울역으로 가자", "서울역", True), ("go to Main Street", "Main", True), ("go to Mainland", "Main", False),
        ("남서울역으로", "서울역", False), ("집 말고 집", "집", False), ("39번", "39", True), ("a.b", "a", True),
    ],
)  # fmt: skip
def test_a_value_is_found_once_and_at_a_words_beginning(said: str, value: str, found: bool) -> None:
    assert (find_value(said, value) is not None) == found


def test_only_values_that_stand_in_their_utterances_are_in_the_pool(toy_corpus: Corpus) -> None:
    pool = values_by_argument(toy_corpus.train)
    assert set(pool) == {"place", "zone"}
    assert "Pier 39" in pool["place"]
    assert pool["zone"] == ["rear"]


def test_an_epochs_examples_are_a_function_of_the_seed_and_the_epoch(toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    t = Tokenizer.load(toy_tokenizer)
    one, two = (epochs(toy_corpus.train, t, 99, 3, 0.5) for _ in range(2))
    assert one(4) == two(4)
    assert one(4) != one(5)
    plain = [encode(c, t) for c in toy_corpus.train]
    assert epochs(toy_corpus.train, t, 99, 3, 0.0)(4) == plain
    kept = sum(a == b for a, b in zip(one(4), plain, strict=True))
    assert len(plain) / 4 < kept < len(plain)


def test_a_row_longer_than_the_model_is_refused_not_cut(toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    with pytest.raises(GoriError, match=r"a row has \d+ tokens, the model's max_position is 5"):
        epochs(toy_corpus.train, Tokenizer.load(toy_tokenizer), 5, 0, 0.0)


def test_two_test_files_of_one_name_are_refused(toy: Path) -> None:
    with pytest.raises(GoriError, match="two test files are named 'test'"):
        corpus.read(toy / "train.jsonl", toy / "dev.jsonl", [toy / "test.jsonl"] * 2, toy / "tools.json")


ENDINGS = st.sampled_from(["역", "서울", "공원", "카페", "병원"])


@settings(max_examples=60)
@given(st.lists(ENDINGS | st.sampled_from(["Main", "street", "39", "FM", "a-b"]), min_size=1, max_size=4), st.data())
def test_an_invented_value_has_the_words_of_its_model(
    toy_tokenizer: Path, words: list[str], data: st.DataObject
) -> None:
    inventor = Inventor(Tokenizer.load(toy_tokenizer), ["서울역 강남 부산항 카페"])
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    made = inventor.like(" ".join(words), rng).split(" ")
    assert len(made) == len(words)
    for old, new in zip(words, made, strict=True):
        if "가" <= old[0] <= "힣":
            assert len(new) == len(old)
            assert all("가" <= c <= "힣" for c in new)
        elif old.isalpha():
            assert new.isalpha()
            assert new[0].isupper() == old[0].isupper()
        else:
            assert new == old


def test_an_invented_korean_value_keeps_what_its_particle_depends_on(toy_tokenizer: Path) -> None:
    inventor = Inventor(Tokenizer.load(toy_tokenizer), ["서울역 강남 부산항 카페 물 길"])
    rng = np.random.default_rng(0)
    for word, finals in (("카페", {0}), ("서울", {8}), ("서울역", set(range(1, 28)) - {8})):
        made = [inventor.like(word, rng) for _ in range(300)]
        kept = sum((ord(m[-1]) - ord("가")) % 28 in finals for m in made)
        assert kept > 280  # one draw in a hundred may keep its own end, or the search could be endless
        assert len(set(made)) > 50


def test_only_open_arguments_are_invented(toy_tokenizer: Path) -> None:
    inventor = Inventor(Tokenizer.load(toy_tokenizer), ["서울역 강남"])
    row = conversation("서울역 가자", {"a": "서울역"})
    few = {"a": ["서울역", "부산역"]}
    many = {"a": [f"{chr(ord('가') + i)}나다라마바" for i in range(corpus.OPEN_VALUES)]}
    got = {swap(row, few, np.random.default_rng(s), inventor).utterance for s in range(40)}
    assert got == {"서울역 가자", "부산역 가자"}
    assert not {swap(row, many, np.random.default_rng(s), inventor).utterance for s in range(40)} & {
        f"{v} 가자" for v in many["a"]
    }
