"""Calls as text and back: a round trip over random schemas, refusals by name, and only CallError from nonsense."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.calls import (
    END,
    NONE,
    Call,
    CallError,
    Function,
    check_call,
    parse,
    read_tools,
    render,
    same_calls,
    special_tokens,
)
from gori.errors import GoriError

names = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=8)
texts = st.text(st.characters(codec="utf-8")).map(str.strip).filter(lambda s: "<|" not in s)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": texts
    | st.sampled_from(['"quoted"', "a < b", "<", "|>", "12", "true", "null", "22도", "it's", "줄\n바꿈"]),
    "integer": st.integers(-(10**12), 10**12),
    "number": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-1000, 1000),
    "boolean": st.booleans(),
}


@st.composite
def tools_and_calls(draw: st.DrawFn) -> tuple[dict[str, Function], list[Call]]:
    functions: dict[str, Function] = {}
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        kinds = draw(st.dictionaries(names, st.sampled_from([*SCALARS, "array"]), max_size=4))
        properties = {
            k: {"type": t, "items": {"type": "string"}} if t == "array" else {"type": t} for k, t in kinds.items()
        }
        functions[name] = Function(name, "", properties)
    chosen = draw(st.lists(st.sampled_from(sorted(functions)), max_size=3))
    return functions, [Call(n, draw(arguments(functions[n].properties))) for n in chosen]


@st.composite
def arguments(draw: st.DrawFn, properties: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []:
        kind = properties[name]["type"]
        if kind == "array":
            out[name] = draw(st.lists(SCALARS["string"], min_size=1, max_size=3))
        else:  # said once, or more than once
            out[name] = draw(SCALARS[kind] | st.lists(SCALARS[kind], min_size=2, max_size=3))
    return out


@given(tools_and_calls())
def test_what_is_rendered_is_parsed_to_the_same_calls(case: tuple[dict[str, Function], list[Call]]) -> None:
    functions, calls = case
    for c in calls:
        check_call(c, functions)
    back = parse(render(calls), functions)
    assert same_calls(back, calls)
    assert render(back) == render(calls)
    # the types come back too: 1 == True == 1.0 would hide an error
    assert [[type(v) for v in c.arguments.values()] for c in back] == [
        [type(v) for v in c.arguments.values()] for c in calls
    ]


@given(tools_and_calls())
def test_the_special_tokens_of_a_text_are_those_of_its_calls_and_no_more(
    case: tuple[dict[str, Function], list[Call]],
) -> None:
    functions, calls = case
    text = render(calls)
    wanted = sum(1 + sum(len(v) if isinstance(v, list) else 1 for v in c.arguments.values()) for c in calls)
    found = sum(text.count(token) for token in special_tokens(functions))
    assert found == (wanted if calls else 1)


TOOLS = {
    "go": Function(
        "go", "", {"place": {"type": "string"}, "fast": {"type": "boolean"}, "n": {"type": "integer"}}, ("place",)
    ),
    "warm": Function("warm", "", {"degrees": {"type": "number", "minimum": 16, "maximum": 30}}),
    "open": Function("open", "", {"zone": {"type": "string", "enum": ["front", "rear"]}}),
    "tell": Function("tell", "", {"to": {"type": "array", "items": {"type": "string"}}, "with": {"type": "object"}}),
}


@given(
    st.text()
    | st.lists(st.sampled_from([*special_tokens(TOOLS), " a", " 1", "{", " true", " [", "NaN", " "])).map("".join)
)
def test_any_other_text_raises_call_error_and_nothing_else(text: str) -> None:
    try:
        calls = parse(text, TOOLS)
    except CallError:
        return
    for c in calls:
        check_call(c, TOOLS)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "hello", NONE + NONE, END, "<|arg:place|> x", "<|call:go|>", "<|call:gone|><|arg:place|> x",
        "<|call:go|> x", "<|call:go|><|arg:place|> x<|arg:speed|> 1", "<|call:warm|><|arg:degrees|> warm",
        "<|call:warm|><|arg:degrees|> NaN", "<|call:warm|><|arg:degrees|> 1e999",
        "<|call:warm|><|arg:degrees|> " + "9" * 5000,
        "<|call:tell|><|arg:with|> " + "[" * 100_000, "<|call:go|><|arg:place|> x<|none|>",
        '<|call:tell|><|arg:with|> {"a": NaN}',
        "<|call:go|><|arg:place|> x ", "<|call:go|><|arg:place|>  x",
    ],
)  # fmt: skip
def test_malformed_texts_are_call_errors(text: str) -> None:
    with pytest.raises(CallError):
        parse(text, TOOLS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call("gp", {}), "function 'gp' is not among the tools: did you mean 'go'"),
        (Call("go", {}), "go lacks its required argument 'place'"),
        (Call("go", {"place": "x", "fats": True}), "go has no argument 'fats': did you mean 'fast'"),
        (Call("go", {"place": 3}), "argument 'place' is 3, its schema says string"),
        (Call("go", {"place": "x", "fast": 1}), "argument 'fast' is 1, its schema says boolean"),
        (Call("go", {"place": "x", "n": True}), "argument 'n' is true, its schema says integer"),
        (Call("go", {"place": "x", "n": 1.5}), "argument 'n' is 1.5, its schema says integer"),
        (Call("go", {"place": " x"}), "begins or ends with white space"),
        (Call("go", {"place": "a<|arg:n|> 1"}), "opens a special token"),
        (Call("go", {"place": []}), "is an empty list: leave it out"),
        (Call("go", {"place": ["x"]}), "write the value itself"),
        (Call("tell", {"to": "x"}), "write a list"),
        (Call("tell", {"with": {"a": "<|end|>"}}), "opens a special token"),
        (Call("warm", {"degrees": 15}), "is 15, its minimum is 16"),
        (Call("warm", {"degrees": 30.5}), "is 30.5, its maximum is 30"),
        (Call("warm", {"degrees": math.inf}), "is inf, which is no number"),
        (Call("open", {"zone": "left"}), "is 'left', allowed are front, rear"),
    ],
)
def test_a_call_that_breaks_its_schema_is_refused_by_name(call: Call, message: str) -> None:
    with pytest.raises(CallError, match=message.replace("(", r"\(")):
        check_call(call, TOOLS)


def test_a_call_is_equal_whatever_the_order_of_its_arguments_but_not_of_the_calls() -> None:
    a, b = Call("go", {"place": "x", "n": 1}), Call("go", {"n": 1, "place": "x"})
    assert same_calls([a], [b])
    other = Call("open", {})
    assert not same_calls([a, other], [other, a])
    assert not same_calls([a], [a, a])
    assert not same_calls([a], [Call("go", {"place": "x", "n": 2})])


def tools_file(tmp_path: Path, body: Any) -> Path:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def test_openai_definitions_are_read_wrapped_or_bare_one_or_many(tmp_path: Path) -> None:
    bare = {"name": "go", "description": "Drive.", "parameters": {"properties": {"place": {}}, "required": ["place"]}}
    for body in (bare, [bare], {"type": "function", "function": bare}, [{"type": "function", "function": bare}]):
        f = read_tools(tools_file(tmp_path, body))["go"]
        assert (f.description, f.required, f.package) == ("Drive.", ("place",), None)
        assert f.properties == {"place": {"type": "string"}}


def test_gleo_app_schemas_are_read_with_their_package(tmp_path: Path) -> None:
    def action(name: str) -> dict[str, Any]:
        return {"function": {"component": "x/.Y", "name": name, "description": "", "parameters": {"properties": {}}}}

    app = {"packageName": "com.example.car", "appDescription": "d", "invokeWord": "car", "version": "1"}
    found = read_tools(tools_file(tmp_path, [{**app, "actionCalls": [action("a"), action("b")]}]))
    assert {n: f.package for n, f in found.items()} == {"a": "com.example.car", "b": "com.example.car"}


def test_an_optional_argument_as_strict_schemas_write_it_is_a_plain_one(tmp_path: Path) -> None:
    properties = {
        "a": {"type": ["string", "null"], "enum": ["x", None]},
        "b": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
    }
    f = read_tools(tools_file(tmp_path, {"name": "go", "parameters": {"properties": properties}}))["go"]
    assert f.properties == {"a": {"type": "string", "enum": ["x"]}, "b": {"type": "integer", "minimum": 1}}
    assert parse("<|call:go|><|arg:a|> x<|arg:b|> 2", {"go": f}) == [Call("go", {"a": "x", "b": 2})]


def with_property(schema: Any) -> dict[str, Any]:
    return {"name": "go", "parameters": {"properties": {"a": schema}}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "defines no function"),
        ([3], "entry 0: expected an object, got int"),
        ({"name": ""}, "expected a function with a name"),
        ([{"name": "a"}, {"name": "a"}], "entry 1: function 'a' is defined twice"),
        ({"actionCalls": []}, "needs a packageName"),
        ({"packageName": "p", "actionCalls": 3}, "actionCalls must be a list"),
        ({"packageName": "p", "actionCalls": ["x"]}, "actionCalls must be a list"),
        ({"name": "a", "parameters": [1]}, "must be a JSON schema with properties"),
        ({"name": "a", "parameters": {"properties": []}}, "must be a JSON schema with properties"),
        ({"name": "a", "parameters": {"required": True}}, "must be a list of argument names"),
        ({"name": "a", "parameters": {"required": ["b"]}}, "requires 'b', which its properties lack"),
        ({"name": "a|>"}, "closes a special token"),
        (with_property("string"), "argument 'a' of go has the schema 'string', expected an object"),
        (with_property({"type": "str"}), "has no single type: write one of string, integer"),
        (with_property({"type": ["string", "integer"]}), "has no single type"),
        (with_property({"anyOf": [{"type": "string"}, {"type": "integer"}]}), "has no single type"),
        (with_property({"enum": [1, 2]}), "allows 1 but is of type string"),
        (with_property({"enum": "ab"}), "has the enum 'ab', expected a list"),
        (with_property({"type": "number", "minimum": "1"}), "has the minimum '1', expected a number"),
        (with_property({"description": "\ud800"}), "half a surrogate pair"),
    ],
)
def test_a_tools_file_that_cannot_be_used_is_refused_with_its_place(body: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(GoriError, match=message):
        read_tools(tools_file(tmp_path, body))


def test_decomposed_hangul_in_a_tools_file_is_composed(tmp_path: Path) -> None:
    f = read_tools(tools_file(tmp_path, with_property({"enum": [unicodedata.normalize("NFD", "운전석")]})))["go"]
    assert f.properties["a"]["enum"] == ["운전석"]
