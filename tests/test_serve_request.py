"""Bodies of requests: each field of OpenAI's API is honoured, known to change nothing, or refused by its name."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.calls import Call, Function, read_tools, render
from gori.data import Turn
from gori.runtime.serve_refusal import Refusal
from gori.runtime.serve_reply import CallStream, Stopper, arguments_of
from gori.runtime.serve_request import HARMLESS, HONOURED, NEUTRAL, Model, Request, read_request


@pytest.fixture(scope="module")
def functions(toy: Path) -> dict[str, Function]:
    return read_tools(toy / "tools.json")


@pytest.fixture(scope="module")
def tools(toy: Path) -> dict[str, Any]:
    return {t["function"]["name"]: t["function"] for t in json.loads((toy / "tools.json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def model(functions: dict[str, Function]) -> Model:
    return Model("toy", functions, False, 1000)


HI = {"role": "user", "content": "hi"}


def read(model: Model, /, **more: Any) -> Request:
    return read_request(json.dumps({"messages": [HI], **more}).encode(), model)


def test_a_request_of_one_message_asks_greedily_for_calls_of_all_functions(model: Model) -> None:
    assert read(model) == Request(turns=(Turn("user", "hi"),))


def test_fields_that_ask_for_nothing_are_accepted(model: Model) -> None:
    assert read(model, **NEUTRAL, **dict.fromkeys(HARMLESS, "x")) == read(model)
    assert read(model, **dict.fromkeys((*HONOURED[2:], *NEUTRAL, *HARMLESS))) == read(model)  # null is no value


# every parameter of the API reference that is not honoured, with a value that asks for something
ELSE = {
    "audio": {"voice": "x", "format": "wav"}, "frequency_penalty": 0.5, "function_call": "auto",
    "functions": [{"name": "f"}], "logit_bias": {"5": 1}, "logprobs": True, "modalities": ["audio"], "n": 2,
    "prediction": {"type": "content"}, "presence_penalty": 1, "reasoning_effort": "low", "store": True,
    "top_logprobs": 3, "verbosity": "low", "web_search_options": {},
}  # fmt: skip


@pytest.mark.parametrize("field", ELSE)
def test_a_field_that_cannot_be_honoured_is_refused_by_its_name(field: str, model: Model) -> None:
    with pytest.raises(Refusal, match=field) as e:
        read(model, **{field: ELSE[field]})
    assert (e.value.param, e.value.status) == (field, 400)


def call(name: str, arguments: str, **more: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


NAMED = {"type": "function", "function": {"name": "navigate"}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "at least one message"),
    ({"messages": "hi"}, "at least one message"),
    ({"messages": [5]}, r"messages\[0\]: the role is int"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "expected one of system, developer, user"),
    ({"messages": [{"role": "user"}]}, "needs content"),
    ({"messages": [{"role": "user", "content": 5}]}, "got int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url', this model reads text"),
    ({"messages": [{**HI, "weight": 1}]}, "'weight' is not supported"),
    ({"messages": [{**HI, "tool_calls": [call("navigate", "{}")]}]}, "only an assistant's"),
    ({"messages": [HI, {"role": "assistant", "content": "hi"}]}, "last message is the assistant's"),
    ({"messages": [{"role": "system", "content": "hi"}]}, "last message is the system's"),
    ({"messages": [HI, {"role": "tool", "content": "x", "tool_call_id": "y"}]}, "none of the calls before"),
    ({"messages": [{"role": "assistant", "tool_calls": [call("fly", "{}")]}, HI]}, "'fly' is not among"),
    ({"messages": [{"role": "assistant", "tool_calls": [call("navigate", "{")]}, HI]}, "arguments are not JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [call("navigate", "[]")]}, HI]}, "list in place of an object"),
    ({"messages": [{"role": "assistant", "tool_calls": [call("navigate", '{"place": "\\ud800"}')]}, HI]}, "surrogate"),
    ({"messages": [{"role": "assistant", "tool_calls": [5]}, HI]}, "expected"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}, HI]}, "must be a list, got int"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [call("navigate", "{}")]}, HI]}, "not both"),
    ({"messages": [{"role": "user", "content": "a" * 1001}]}, "1001 bytes of text, and the context at most 1000"),
    ({"tools": []}, "at least one function"),
    ({"tools": [NAMED, NAMED]}, "'navigate' twice"),
    ({"tools": [{"type": "function"}]}, r"tools\[0\]: expected"),
    ({"tools": [{"type": "function", "function": {"name": "navigat"}}]}, "did you mean 'navigate'"),
    ({"tool_choice": "always"}, "expected auto, none, required"),
    ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "'fly', which is not among the tools"),
    ({"tools": [NAMED], "tool_choice": {"type": "function", "function": {"name": "open_window"}}}, "not among"),
    ({"stream": 1}, "stream is 1, expected true or false"),
    ({"stream_options": {"include_usage": True}}, "needs stream: true"),
    ({"stream": True, "stream_options": {"obfuscate": True}}, "include_usage alone, not 'obfuscate'"),
    ({"stream": True, "stream_options": 1}, "include_usage alone"),
    ({"temperature": 3}, "a number from 0 to 2"),
    ({"temperature": True}, "a number from 0 to 2"),
    ({"top_p": -0.1}, "a number from 0 to 1"),
    ({"seed": 1.5}, "a whole number"),
    ({"max_tokens": 0}, "a whole number from 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
    ({"stop": "x"}, "this answer is calls"),
    ({"stop": ["a", "b", "c", "d", "e"], "tool_choice": "none"}, "up to 4"),
    ({"response_format": "json"}, "expected the type text, json_object or json_schema"),
    ({"response_format": {"type": "json_object"}, "tool_choice": "none"}, "needs functions"),
    ({"response_format": {"type": "json_schema"}}, "needs a name and a schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "'x' is none"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "navigate", "schema": {}}}}, "another schema"),
    ({"model": 5}, "does not exist here"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_wrong_value_is_refused_with_what_is_allowed(fields: dict[str, Any], message: str, model: Model) -> None:
    with pytest.raises(Refusal, match=message):
        read(model, **fields)


def test_a_tool_may_be_the_artifacts_own_or_its_name_but_no_other_schema(model: Model, tools: dict[str, Any]) -> None:
    own = {"type": "function", "function": {**tools["open_window"], "description": "other words", "strict": True}}
    by_name = {"type": "function", "function": {"name": "open_window"}}
    assert read(model, tools=[own]) == read(model, tools=[by_name])
    assert read(model, tools=[own]).only == frozenset(["open_window"])
    other = json.loads(json.dumps(own))
    other["function"]["parameters"]["properties"]["percent"]["maximum"] = 50
    with pytest.raises(Refusal, match="trained with another schema \\('percent' differ\\)"):
        read(model, tools=[other])
    other = json.loads(json.dumps(own))
    other["function"]["parameters"]["required"] = ["percent"]
    with pytest.raises(Refusal, match="'required' differ"):
        read(model, tools=[other])


def test_a_model_without_calls_answers_in_words_and_refuses_tools() -> None:
    plain = Model("plain", {}, True, 1000)
    assert read(plain, stop="x").form == "words"
    for fields in ({"tools": [NAMED]}, {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(Refusal):
            read(plain, **fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*HONOURED, *NEUTRAL]), JSON, max_size=4), st.booleans())
def test_no_value_of_any_field_is_more_than_refused(fields: dict[str, Any], proper: bool) -> None:
    functions = {"f": Function("f", "", {"x": {"type": "string"}})}
    body = {"messages": [HI], **fields} if proper else fields
    raw = json.dumps(body).encode()
    with contextlib.suppress(Refusal):
        assert read_request(raw, Model("m", functions, False, 99)).turns


@given(st.binary(max_size=60))
def test_no_bytes_are_more_than_refused(raw: bytes) -> None:
    with pytest.raises(Refusal):
        read_request(raw, Model("m", {}, True, 99))


VALUE = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12).filter(
    lambda s: s == s.strip() and s
)
CALLS = st.lists(
    st.builds(
        Call,
        st.just("f"),
        st.fixed_dictionaries(
            {},
            optional={
                "text": VALUE,
                "many": st.lists(VALUE, min_size=1, max_size=3),
                "whole": st.integers(),
                "number": st.floats(allow_nan=False, allow_infinity=False),
                "flag": st.booleans(),
                "numbers": st.lists(st.integers(), min_size=1, max_size=3),
            },
        ),
    ),
    min_size=1,
    max_size=4,
)
KINDS = {"text": "string", "whole": "integer", "number": "number", "flag": "boolean"}
SCHEMAS: dict[str, Any] = {k: {"type": v} for k, v in KINDS.items()} | {
    "many": {"type": "array", "items": {"type": "string"}},
    "numbers": {"type": "array", "items": {"type": "integer"}},
}


@given(CALLS, st.integers(1, 4))
def test_deltas_of_a_stream_join_to_the_calls_however_their_text_is_cut(calls: list[Call], size: int) -> None:
    stream, out = CallStream({"f": Function("f", "", SCHEMAS)}), []
    for piece in pieces(render(calls), size):
        out += list(stream.push(piece))
    out += list(stream.close())
    joined = [""] * len(calls)
    for delta in out:
        (part,) = delta["tool_calls"]
        joined[part["index"]] += part["function"]["arguments"]
    assert joined == [arguments_of(c) for c in calls]
    assert sum("name" in d["tool_calls"][0]["function"] for d in out) == len(calls)


def pieces(text: str, size: int) -> list[str]:
    """Special tokens whole, as a model says them, and the text between them in pieces."""
    out: list[str] = []
    for part in re.split(r"(<\|(?:call|arg):\w+\|>)", text):
        out += [part] if part.startswith("<|") else [part[i : i + size] for i in range(0, len(part), size)]
    return [p for p in out if p]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.integers(1, 5))
def test_words_end_before_the_first_stop_text_however_they_arrive(text: str, stop: list[str], size: int) -> None:
    stopper = Stopper(tuple(stop))
    shown = "".join(stopper.push(text[i : i + size]) for i in range(0, len(text), size)) + stopper.close()
    assert text.startswith(shown)
    assert not any(t in shown for t in stop)
    assert stopper.found == any(t in text for t in stop)
    assert any(text.startswith(shown + t) for t in stop) if stopper.found else shown == text
