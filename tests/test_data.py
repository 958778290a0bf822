"""Conversations: every bad line is refused with its place, and batches are a pure function of the seed and the step."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.calls import Call, read_tools
from gori.data import Conversation, Example, Turn, as_messages, batches, bucketed, collate, read_conversations
from gori.errors import GoriError


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def row(**answer: Any) -> str:
    said = {"role": "user", "content": "서울역 가자"}
    return json.dumps({"messages": [said, {"role": "assistant", **answer}]}, ensure_ascii=False)


GOOD = row(tool_calls=[call("navigate", {"place": "서울역"})])


def read(toy: Path, tmp_path: Path, content: bytes | str) -> list[Conversation]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_conversations(path, read_tools(toy / "tools.json"))


BAD: dict[str, tuple[bytes | str, str]] = {
    "an empty file": ("", "rows.jsonl is empty: expected one conversation a line"),
    "white space alone": (" \n\n", "rows.jsonl is empty"),
    "a truncated line": (GOOD + "\n" + GOOD[:45], r"line 2 column 43: not JSON \(Unterminated string"),
    "no JSON": ("hello", r"line 1 column 1: not JSON \(Expecting value\)"),
    "bytes that are not UTF-8": (GOOD.encode() + b'\n{"\xea\xb0\x80\xff"', "line 2 column 4: byte 0xff is not UTF-8"),
    "a list": ("[]", r'line 1 column 1: expected \{"messages"'),
    "no messages": ('{"messages": []}', "with at least one message"),
    "nesting without end": ('{"messages": ' + "[" * 100_000, "line 1 column 1: JSON that cannot be read"),
    "a number without end": ('{"messages": ' + "9" * 5000 + "}", "line 1 column 1: JSON that cannot be read"),
    "half a surrogate": (row(content="x").replace('"x"', r'"\ud83d"'), "line 1: .* holds half a surrogate pair"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "message 0: a row ends with the assistant's"),
    "an unknown role": ('{"messages": [{"role": "bot", "content": "a"}]}', "message 0: role 'bot', expected one of"),
    "a role that is a list": ('{"messages": [{"role": ["user"]}]}', r"message 0: role \['user'\], expected one of"),
    "a message that is text": ('{"messages": ["a"]}', "message 0: role None"),
    "content that is a list": ('{"messages": [{"role": "user", "content": []}]}', "content must be a string, got list"),
    "a user who says nothing": ('{"messages": [{"role": "user", "content": ""}]}', "a user message needs content"),
    "content and calls": (row(content="a", tool_calls=[]), "has content or tool_calls, one of the two"),
    "neither content nor calls": (row(), "has content or tool_calls, one of the two"),
    "an answer of nothing": (row(content=""), "the assistant says nothing: give content, or an empty tool_calls list"),
    "calls that are no list": (row(tool_calls={}), "tool_calls must be a list, got dict"),
    "a call without a function": (row(tool_calls=[{}]), r"message 1 tool_calls\[0\]: expected"),
    "an unknown tool": (row(tool_calls=[call("navigat", {})]), "'navigat' is not among .* did you mean 'navigate'"),
    "an unknown argument": (row(tool_calls=[call("navigate", {"plaice": 1})]), "'plaice': did you mean 'place'"),
    "a value of another type": (row(tool_calls=[call("open_window", {"percent": "9"})]), '"9", its schema says int'),
    "arguments that are a list": (row(tool_calls=[call("navigate", [])]), "arguments must be an object, got list"),
    "arguments that are no JSON": (row(tool_calls=[call("navigate", "{")]), "arguments are a string that is not JSON"),
    "a special token in a value": (row(tool_calls=[call("navigate", {"place": "<|end|>"})]), "opens a special token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_in_one_sentence_with_its_place(case: str, toy: Path, tmp_path: Path) -> None:
    content, message = BAD[case]
    with pytest.raises(GoriError, match=message) as caught:
        read(toy, tmp_path, content)
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(toy: Path, tmp_path: Path) -> None:
    functions = read_tools(toy / "tools.json")
    with pytest.raises(GoriError, match=r"nowhere\.jsonl does not exist"):
        read_conversations(tmp_path / "nowhere.jsonl", functions)
    with pytest.raises(GoriError, match="cannot be read"):
        read_conversations(tmp_path, functions)


def test_blank_lines_windows_line_ends_and_a_line_separator_in_a_text_are_taken(toy: Path, tmp_path: Path) -> None:
    text = row(content="a\u2028b")
    rows = read(toy, tmp_path, f"{GOOD}\r\n\n{text}\n{GOOD}")
    assert [r.answer.content for r in rows] == [None, "a\u2028b", None]


def test_arguments_may_be_a_json_string_as_the_openai_api_sends_them(toy: Path, tmp_path: Path) -> None:
    rows = read(toy, tmp_path, row(tool_calls=[call("navigate", '{"place": "\\uc11c\\uc6b8\\uc5ed"}')]))
    assert rows[0].answer.calls == (Call("navigate", {"place": "서울역"}),)


def test_decomposed_hangul_is_composed_in_words_and_values(toy: Path, tmp_path: Path) -> None:
    import unicodedata

    rows = read(toy, tmp_path, unicodedata.normalize("NFD", GOOD))
    assert rows == read(toy, tmp_path, GOOD)


def test_no_function_fits_is_an_empty_list_of_calls_and_content_is_text(toy: Path, tmp_path: Path) -> None:
    rows = read(toy, tmp_path, row(tool_calls=[]) + "\n" + row(content="안녕"))
    assert [(r.answer.calls, r.answer.content) for r in rows] == [((), None), (None, "안녕")]
    assert [as_messages(r)[1].get("tool_calls") for r in rows] == [[], None]


@pytest.mark.parametrize(
    ("said", "language"), [("서울 가자", "ko"), ("go", "en"), ("play 아이유 now", "ko"), ("é", "en")]
)
def test_a_row_is_korean_where_the_user_writes_hangul(said: str, language: str) -> None:
    assert Conversation((Turn("user", said), Turn("assistant", "가"))).language == language


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120)


@given(lengths, st.integers(16, 200), st.integers(0, 5), st.integers(0, 3))
def test_every_row_stands_once_in_an_epoch_and_no_batch_exceeds_its_padded_tokens(
    sizes: list[int], batch_tokens: int, seed: int, epoch: int
) -> None:
    parts = bucketed(sizes, batch_tokens, seed, epoch)
    assert sorted(int(i) for p in parts for i in p) == list(range(len(sizes)))
    for p in parts:  # a row that is longer than the bound stands alone, never cut
        assert len(p) == 1 or len(p) * max(sizes[i] for i in p) <= batch_tokens


@given(lengths, st.integers(16, 200), st.integers(0, 5), st.integers(0, 12))
def test_batches_from_a_step_on_are_those_of_an_uncut_run(
    sizes: list[int], batch_tokens: int, seed: int, step: int
) -> None:
    def epoch(number: int) -> list[Example]:
        return [Example([number, i] * n, [True] * 2 * n) for i, n in enumerate(sizes)]

    whole = list(islice(batches(epoch, batch_tokens, seed), step + 3))
    assert list(islice(batches(epoch, batch_tokens, seed, first_step=step), 3)) == whole[step:]


def test_epochs_and_seeds_are_shuffled_each_in_their_own_way() -> None:
    sizes = [5 + i % 7 for i in range(100)]
    orders = {tuple(int(i) for p in bucketed(sizes, 64, s, e) for i in p) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


@given(st.lists(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5))
def test_a_batch_holds_its_rows_and_padding_that_is_neither_valid_nor_predicted(
    rows: list[list[tuple[int, bool]]],
) -> None:
    examples = [Example([t for t, _ in r], [p for _, p in r]) for r in rows]
    b = collate(examples, pad=0)
    assert b.ids.shape[1] == max(map(len, rows))
    for i, e in enumerate(examples):
        n = len(e.ids)
        assert b.ids[i, :n].tolist() == e.ids
        assert b.loss[i, :n].tolist() == e.loss
        assert b.valid[i].tolist() == [True] * n + [False] * (b.ids.shape[1] - n)
        assert not b.loss[i, n:].any()
        assert np.all(b.ids[i, n:] == 0)


def test_the_messages_of_errors_name_line_numbers_as_an_editor_counts_them(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(GoriError) as caught:
        read(toy, tmp_path, f"\n{GOOD}\n\n{{")
    assert re.search(r"line 4 column 2", str(caught.value))
