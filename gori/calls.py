"""Functions and calls: reading tool definitions, writing a call as tokens' text, reading it back.

A call is text of special tokens and values: `<|call:NAME|><|arg:NAME|> value…`, one special token for each function and
argument, each value after one space so that it has the same tokens as in the utterance. A list repeats its argument.
`<|none|>` says that no function fits. Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gori.artifact import read_json
from gori.errors import GoriError, nearest

USER, ASSISTANT, SYSTEM, TOOL = "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"
PAD, END, NONE = "<|pad|>", "<|end|>", "<|none|>"
MARKERS = (PAD, END, USER, ASSISTANT, SYSTEM, TOOL, NONE)
_PIECE = re.compile(r"<\|(call|arg):(.*?)\|>", re.DOTALL)
_SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
}


@dataclass(frozen=True)
class Function:
    """One callable function: its JSON schema, and the app that offers it where the file was a Gleo app schema."""

    name: str
    description: str
    properties: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...] = ()
    package: str | None = None


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def as_openai(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


def plain(call: Call) -> dict[str, Any]:
    """A call as the JSON that gori prints."""
    return {"name": call.name, "arguments": dict(call.arguments)}


def as_gleo(call: Call, functions: Mapping[str, Function]) -> dict[str, Any]:
    """A call as the action that Gleo makes an Android Intent of; without packageName where no app schema names one."""
    function = functions.get(call.name)
    package = {"packageName": function.package} if function and function.package else {}
    return {**package, "action": call.name, "actionParameters": dict(call.arguments)}


class CallError(GoriError):
    """A text that is not a call of the given functions."""


def read_tools(path: Path) -> dict[str, Function]:
    """Functions by name from a JSON file of OpenAI definitions or of Gleo app schemas (one, or a list)."""
    body = read_text(read_json(path), str(path))
    entries = body if isinstance(body, list) else [body]
    functions: dict[str, Function] = {}
    for i, entry in enumerate(entries):
        for f in _functions(entry, f"{path} entry {i}"):
            if f.name in functions:
                raise GoriError(f"{path} entry {i}: function {f.name!r} is defined twice")
            functions[f.name] = f
    if not functions:
        raise GoriError(f"{path} defines no function: give OpenAI function definitions or Gleo app schemas")
    return functions


def read_function(entry: Any, where: str) -> Function:
    """One function from the object under `function` of its OpenAI definition; GoriError names `where`."""
    (function,) = _functions({"function": entry}, where)
    return function


def _functions(entry: Any, where: str) -> list[Function]:
    if not isinstance(entry, dict):
        raise GoriError(f"{where}: expected an object, got {type(entry).__name__}")
    if "actionCalls" in entry:
        package = entry.get("packageName")
        if not isinstance(package, str):
            raise GoriError(f"{where}: a Gleo app schema needs a packageName")
        actions = entry["actionCalls"]
        if not isinstance(actions, list) or not all(isinstance(a, dict) for a in actions):
            raise GoriError(f"{where}: actionCalls must be a list of objects that hold a function")
        return [_function(a.get("function"), f"{where} actionCalls", package) for a in actions]
    return [_function(entry.get("function", entry), where, None)]


def _function(f: Any, where: str, package: str | None) -> Function:
    if not isinstance(f, dict) or not isinstance(f.get("name"), str) or not f["name"]:
        raise GoriError(f"{where}: expected a function with a name")
    schema = f.get("parameters") or {}
    if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
        raise GoriError(f"{where}: parameters of {f['name']} must be a JSON schema with properties")
    properties = {
        k: _property(s, f"{where}: argument {k!r} of {f['name']}") for k, s in schema.get("properties", {}).items()
    }
    required = schema.get("required", [])
    if not isinstance(required, list):
        raise GoriError(f"{where}: required of {f['name']} must be a list of argument names, got {required!r}")
    if missing := [r for r in required if r not in properties]:
        raise GoriError(f"{where}: {f['name']} requires {missing[0]!r}, which its properties lack")
    if "|>" in f["name"] + "".join(properties):
        raise GoriError(f"{where}: '|>' cannot stand in a name of {f['name']}: it closes a special token")
    return Function(f["name"], str(f.get("description", "")), properties, tuple(required), package)


def _property(schema: Any, where: str) -> dict[str, Any]:
    """An argument's schema with one known type: a union with null loses the null, no type at all is a string."""
    if not isinstance(schema, dict):
        raise GoriError(f"{where} has the schema {schema!r}, expected an object such as {{'type': 'string'}}")
    options = [o for o in schema.get("anyOf") or schema.get("oneOf") or [] if o != {"type": "null"}]
    if len(options) == 1 and isinstance(options[0], dict):
        schema = {**{k: v for k, v in schema.items() if k not in ("anyOf", "oneOf")}, **options[0]}
    named = schema.get("type", "string")
    kinds = [k for k in (named if isinstance(named, list) else [named]) if k != "null"]
    if len(kinds) != 1 or len(options) > 1 or kinds[0] not in (*_SCALARS, "array"):
        raise GoriError(f"{where} has no single type: write one of {', '.join(_SCALARS)}, array, got {schema}")
    plain = {**schema, "type": kinds[0]}
    if kinds[0] == "array":
        plain["items"] = _property(schema.get("items", {}), f"the items of {where}")
    _check_bounds(plain, where)
    return plain


def _check_bounds(schema: dict[str, Any], where: str) -> None:
    """Refuse a range or an enum that no value of the schema's own type can meet."""
    for key in ("minimum", "maximum"):
        if key in schema and (isinstance(schema[key], bool) or not isinstance(schema[key], (int, float))):
            raise GoriError(f"{where} has the {key} {schema[key]!r}, expected a number")
    if "enum" not in schema:
        return
    values = schema["enum"]
    if not isinstance(values, list) or not values:
        raise GoriError(f"{where} has the enum {values!r}, expected a list of the allowed values")
    schema["enum"] = [v for v in values if v is not None]
    for v in schema["enum"]:
        if not _fits(v, schema["type"]):
            raise GoriError(f"{where} allows {v!r} but is of type {schema['type']}: name the type that its enum has")


def _fits(value: Any, kind: str) -> bool:
    allowed = _SCALARS.get(kind)
    return allowed is None or (isinstance(value, allowed) and (kind == "boolean" or not isinstance(value, bool)))


def read_text(value: Any, where: str) -> Any:
    """Parsed JSON with every string in NFC, the form that the tokenizer gives back (macOS writes Hangul decomposed);
    half a surrogate pair, which JSON can spell and UTF-8 cannot, is refused."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise GoriError(f"{where}: {value[:40]!r} holds half a surrogate pair, which is no character: write it out")
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [read_text(v, where) for v in value]
    if isinstance(value, dict):
        return {read_text(k, where): read_text(v, where) for k, v in value.items()}
    return value


def special_tokens(functions: Mapping[str, Function]) -> list[str]:
    """Every special token of a set of functions, in a fixed order."""
    arguments = sorted({a for f in functions.values() for a in f.properties})
    return [*MARKERS, *(f"<|call:{n}|>" for n in sorted(functions)), *(f"<|arg:{a}|>" for a in arguments)]


def check_call(call: Call, functions: Mapping[str, Function]) -> None:
    """Raise CallError unless the function exists and every argument fits its schema (type, enum, range, required).

    A list of several values that each fit is taken too: the argument was said more than once.
    """
    f = functions.get(call.name)
    if f is None:
        raise CallError(f"function {call.name!r} is not among the tools{nearest(call.name, functions)}")
    for name in f.required:
        if name not in call.arguments:
            raise CallError(f"{call.name} lacks its required argument {name!r}")
    for name, value in call.arguments.items():
        if name not in f.properties:
            raise CallError(f"{call.name} has no argument {name!r}{nearest(name, f.properties)}")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise CallError(f"{call.name}: argument {name!r} is an empty list: leave it out")
        schema = f.properties[name]
        array = schema.get("type") == "array"
        if array != isinstance(value, list) and (array or len(values) == 1):
            shown = f"{json.dumps(value, ensure_ascii=False)}, its schema says {schema.get('type')}"
            raise CallError(
                f"{call.name}: argument {name!r} is {shown}: write {'a list' if array else 'the value itself'}"
            )
        item = schema.get("items", {}) if array else schema
        for v in values:
            _check_value(v, item, f"{call.name}: argument {name!r}")


def _check_value(value: Any, schema: Mapping[str, Any], where: str) -> None:
    kind = schema.get("type", "string")
    if not _fits(value, kind):
        raise CallError(f"{where} is {json.dumps(value, ensure_ascii=False)}, its schema says {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise CallError(f"{where} is {value}, which is no number in JSON")
    if "<|" in (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
        raise CallError(f"{where} holds '<|', which opens a special token: reword it")
    if isinstance(value, str) and value != value.strip():
        raise CallError(f"{where} begins or ends with white space: strip it")
    if "enum" in schema and value not in schema["enum"]:
        shown = ", ".join(map(str, schema["enum"]))
        raise CallError(f"{where} is {value!r}, allowed are {shown}")
    for key, sign in (("minimum", 1), ("maximum", -1)):
        if key in schema and isinstance(value, (int, float)) and sign * value < sign * schema[key]:
            raise CallError(f"{where} is {value}, its {key} is {schema[key]}")


def render(calls: Sequence[Call]) -> str:
    """Calls as the text that the chat template writes for an assistant's turn (without the end mark)."""
    return "".join(_render_call(c) for c in calls) if calls else NONE


def _render_call(call: Call) -> str:
    parts = [f"<|call:{call.name}|>"]
    for name, value in call.arguments.items():
        values = value if isinstance(value, list) else [value]
        parts += [f"<|arg:{name}|> {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for v in values]
    return "".join(parts)


def parse(text: str, functions: Mapping[str, Function]) -> list[Call]:
    """The inverse of `render`, checked against the schemas; raises CallError on any other text."""
    if text == NONE:
        return []
    pieces = _PIECE.split(text)
    if pieces[0] or len(pieces) < 4 or pieces[1] != "call":
        raise CallError(f"not a call: {text[:80]!r}")
    found: list[tuple[str, dict[str, Any]]] = []
    for kind, name, value in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if kind == "call":
            if value:
                raise CallError(f"text after the function {name}: {value[:40]!r}")
            found.append((name, {}))
        else:
            _add_argument(found[-1], name, value, functions)
    calls = [Call(n, a) for n, a in found]
    for c in calls:
        check_call(c, functions)
    return calls


def _add_argument(call: tuple[str, dict[str, Any]], name: str, text: str, functions: Mapping[str, Function]) -> None:
    function, arguments = call
    schema = functions[function].properties.get(name, {}) if function in functions else {}
    array = schema.get("type") == "array"
    value = _read_value(text.removeprefix(" "), schema.get("items", {}) if array else schema, name)
    if name in arguments:
        known = arguments[name]
        arguments[name] = [*(known if isinstance(known, list) else [known]), value]
    else:
        arguments[name] = [value] if array else value


def _read_value(text: str, schema: Mapping[str, Any], name: str) -> Any:
    if schema.get("type", "string") == "string":
        return text
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:  # not JSON, NaN, a number of thousands of digits, endless nesting
        raise CallError(f"argument {name!r} is {text[:80]!r}, its schema says {schema['type']}") from e


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def same_calls(a: Sequence[Call], b: Sequence[Call]) -> bool:
    """Exact match: the same functions in the same order with equal arguments, whatever the arguments' order."""
    return len(a) == len(b) and all(
        x.name == y.name and dict(x.arguments) == dict(y.arguments) for x, y in zip(a, b, strict=True)
    )
