"""What a client asks: the body of POST /v1/chat/completions, read into turns and how to answer them.

Everything that the OpenAI API names is honoured, or known to change nothing, or refused by its name; nothing is
ignored. Knows nothing of HTTP, of queues or of sessions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gori.calls import Function, read_function, read_text
from gori.data import Turn
from gori.errors import GoriError, nearest
from gori.runtime.constrain import MOST_CALLS
from gori.runtime.serve_messages import read_messages
from gori.runtime.serve_refusal import Refusal

HONOURED = (
    "model", "messages", "tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options", "response_format",
    "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "stop",
)  # fmt: skip
HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
"""They say who asks and how it is billed, nothing about the answer."""
NEUTRAL: dict[str, Any] = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "store": False,
    "modalities": ["text"], "functions": [],
}  # fmt: skip
"""Fields that are not supported, each with the one value that asks for nothing."""
ANNOTATIONS = ("description", "title", "default", "examples", "$schema")
"""Of a schema: what says nothing about which values are allowed."""
MOST_STOPS, MOST_SEED = 4, 2**63


@dataclass(frozen=True)
class Model:
    """What is served, as far as a request has to fit it."""

    name: str
    functions: Mapping[str, Function]
    """What may be called; empty where the model does not speak calls."""
    words: bool
    """Whether it answers in words where nothing is called; else such an answer is empty."""
    most_bytes: int
    """Text of more bytes cannot fit the context, however it is cut into tokens."""


@dataclass(frozen=True)
class Request:
    """One question, complete and checked."""

    turns: tuple[Turn, ...]
    form: str = "calls"
    """`calls`: tool_calls · `object`: calls as JSON in the content · `arguments`: one call's arguments as JSON in the
    content · `words`: free text."""
    only: frozenset[str] | None = None
    """Functions that may be called; None: all."""
    must_call: bool = False
    most_calls: int = MOST_CALLS
    most_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_json_body(raw: bytes) -> dict[str, Any]:
    """The body as an object with every text in NFC; Refusal says what is wrong and where."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Refusal(f"the body is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}") from e
    try:
        body = read_text(json.loads(text, parse_constant=_no_constant), "the body")
    except json.JSONDecodeError as e:
        raise Refusal(f"the body is not JSON: {e.msg} at line {e.lineno} column {e.colno}") from e
    except RecursionError as e:
        raise Refusal("the body is nested too deeply: a request needs no more than a dozen levels") from e
    except (ValueError, GoriError) as e:
        raise Refusal(f"the body cannot be read: {e}") from e
    if not isinstance(body, dict):
        raise Refusal(f'the body is a JSON {type(body).__name__}, expected an object such as {{"messages": [...]}}')
    return body


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def read_request(raw: bytes, model: Model) -> Request:
    """The request in a body; Refusal for anything that is not understood, not allowed or not supported."""
    given = {k: v for k, v in read_json_body(raw).items() if v is not None}
    _check_fields(given, model)
    turns = read_messages(given.get("messages"), model.functions, model.most_bytes)
    named = _tools(given.get("tools"), model)
    only, must_call = _choice(given.get("tool_choice", "auto"), named, model, turns)
    form, only, must_call, most_calls = _form(given, only, must_call, model)
    stream = _flag(given, "stream", False)
    return Request(
        turns=turns,
        form=form,
        only=only,
        must_call=must_call,
        most_calls=most_calls,
        most_tokens=_most_tokens(given),
        temperature=_number(given, "temperature", 0.0, 0, 2),
        top_p=_top_p(given),
        seed=_seed(given),
        stop=_stop(given, form),
        stream=stream,
        include_usage=_include_usage(given, stream),
    )


def _check_fields(given: Mapping[str, Any], model: Model) -> None:
    for key, value in given.items():
        if key in NEUTRAL:
            if value != NEUTRAL[key] or isinstance(value, bool) != isinstance(NEUTRAL[key], bool):
                raise Refusal(f"{key} is not supported: leave it out, or give {json.dumps(NEUTRAL[key])}", key)
        elif key not in HONOURED and key not in HARMLESS:
            raise Refusal(f"no field {key[:40]!r} is supported{nearest(key, HONOURED)}", key)
    name = given.get("model", model.name)
    if name != model.name:
        message = f"the model {str(name)[:80]!r} does not exist here: this server has {model.name!r}"
        raise Refusal(message, "model", status=404, code="model_not_found")


# --- functions ---


def _tools(tools: Any, model: Model) -> frozenset[str] | None:
    """Names of the functions that were given, each one of the model's; None where none were."""
    if tools is None:
        return None
    if not model.functions:
        raise Refusal("this model was not trained on calls: leave tools out", "tools")
    if not isinstance(tools, list) or not tools:
        raise Refusal("tools must be a list of at least one function, or left out for all of the model's", "tools")
    names = [_tool(t, f"tools[{i}]", model) for i, t in enumerate(tools)]
    if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
        raise Refusal(f"tools names the function {twice!r} twice", "tools")
    return frozenset(names)


def _tool(tool: Any, where: str, model: Model) -> str:
    f = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(f, dict) or not isinstance(f.get("name"), str):
        raise Refusal(f'{where}: expected {{"type": "function", "function": {{"name": ...}}}}', where)
    name = f["name"]
    if name not in model.functions:
        known = nearest(name, model.functions)
        raise Refusal(
            f"{where}: functions are trained into this model, and {name[:80]!r} is none of them{known}", where
        )
    if f.get("parameters") is not None:  # by its name alone, it is the one that the model knows
        _check_schema(f["parameters"], name, where, model)
    return name


def _check_schema(schema: Any, name: str, where: str, model: Model) -> None:
    """Refuse a schema that allows other values than the one that the model was trained on."""
    try:
        given, known = read_function({"name": name, "parameters": schema}, where), model.functions[name]
    except GoriError as e:
        raise Refusal(str(e), where) from e
    ours, theirs = _bare(known.properties), _bare(given.properties)
    differ = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
    if set(given.required) != set(known.required):
        differ.append("required")
    if differ:
        raise Refusal(
            f"{where}: {name} was trained with another schema ({', '.join(map(repr, differ[:5]))} differ): "
            "send the artifact's own, or the name alone",
            where,
        )


def _bare(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Schemas by name without what says nothing about values."""
    out: dict[str, Any] = {}
    for name, schema in schemas.items():
        bare = {k: v for k, v in schema.items() if k not in ANNOTATIONS}
        if isinstance(bare.get("items"), dict):
            bare["items"] = _bare({"items": bare["items"]})["items"]
        out[name] = bare
    return out


def _choice(
    choice: Any, named: frozenset[str] | None, model: Model, turns: tuple[Turn, ...]
) -> tuple[frozenset[str] | None, bool]:
    """Which functions may be called, and whether one must be."""
    if choice == "none" or not model.functions:
        if choice not in ("none", "auto"):
            raise Refusal("this model was not trained on calls: leave tool_choice out", "tool_choice")
        return frozenset(), False
    if choice == "auto":
        # no student is trained to go on after a tool's result: it would make the same call again
        return (frozenset(), False) if turns[-1].role == "tool" else (named, False)
    if choice == "required":
        return named, True
    f = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = f.get("name") if isinstance(f, dict) else None
    if not isinstance(name, str):
        expected = 'auto, none, required or {"type": "function", "function": {"name": ...}}'
        raise Refusal(f"tool_choice is {json.dumps(choice)[:80]}, expected {expected}", "tool_choice")
    allowed = model.functions if named is None else named
    if name not in allowed:
        message = f"tool_choice names {name[:80]!r}, which is not among the tools{nearest(name, allowed)}"
        raise Refusal(message, "tool_choice")
    return frozenset([name]), True


def _form(
    given: Mapping[str, Any], only: frozenset[str] | None, must_call: bool, model: Model
) -> tuple[str, frozenset[str] | None, bool, int]:
    """How the answer is written, and what that asks of it."""
    most = MOST_CALLS if _flag(given, "parallel_tool_calls", True) else 1
    wanted = given.get("response_format", {"type": "text"})
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    silent = only is not None and not only
    if kind == "text":
        return ("words" if silent and model.words else "calls"), only, must_call, most
    if kind not in ("json_object", "json_schema"):
        message = f"response_format is {json.dumps(wanted)[:80]}, expected the type text, json_object or json_schema"
        raise Refusal(message, "response_format")
    if silent:
        raise Refusal("the JSON of this model is its calls: response_format needs functions to call", "response_format")
    if kind == "json_object":
        return "object", only, must_call, most
    name = _schema_name(wanted, only, model)
    return "arguments", frozenset([name]), True, 1


def _schema_name(wanted: Mapping[str, Any], only: frozenset[str] | None, model: Model) -> str:
    """The function whose arguments a json_schema describes: any other schema cannot be honoured."""
    body = wanted.get("json_schema")
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(name, str) or not isinstance(body.get("schema"), dict):
        raise Refusal("response_format: json_schema needs a name and a schema", "response_format")
    allowed = model.functions if only is None else only
    if name not in allowed:
        known = nearest(name, allowed)
        message = f"response_format: a schema has to be the parameters of a function by its name, {name[:80]!r} is none"
        raise Refusal(message + known, "response_format")
    _check_schema(body["schema"], name, "response_format", model)
    return name


# --- numbers and flags ---


def _flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise Refusal(f"{key} is {json.dumps(value)[:80]}, expected true or false", key)
    return value


def _number(given: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise Refusal(f"{key} is {json.dumps(value)[:80]}, allowed is a number from {least:g} to {most:g}", key)
    return float(value)


def _top_p(given: Mapping[str, Any]) -> float:
    value = _number(given, "top_p", 1.0, 0, 1)
    return max(value, 1e-9)  # 0 asks for the likeliest token alone, which so small a share holds too


def _integer(given: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < most:
        raise Refusal(f"{key} is {json.dumps(value)[:80]}, allowed is a whole number from {least}", key)
    return value


def _seed(given: Mapping[str, Any]) -> int | None:
    value = _integer(given, "seed", -MOST_SEED, MOST_SEED)
    return None if value is None else value % MOST_SEED


def _most_tokens(given: Mapping[str, Any]) -> int | None:
    found = [n for k in ("max_completion_tokens", "max_tokens") if (n := _integer(given, k, 1, 1 << 31)) is not None]
    if len(set(found)) > 1:
        raise Refusal("max_tokens and max_completion_tokens differ: give one of the two", "max_tokens")
    return found[0] if found else None


def _stop(given: Mapping[str, Any], form: str) -> tuple[str, ...]:
    stop = given.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise Refusal(f"stop must be a text or up to {MOST_STOPS} texts, none of them empty", "stop")
    if texts and form != "words":
        raise Refusal("stop cuts words, and this answer is calls: leave it out", "stop")
    return tuple(texts)


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise Refusal("stream_options needs stream: true", "stream_options")
    if not isinstance(options, dict):
        raise Refusal("stream_options must be an object; it knows include_usage alone", "stream_options")
    if unknown := sorted(set(options) - {"include_usage"}):
        raise Refusal(f"stream_options knows include_usage alone, not {unknown[0][:40]!r}", "stream_options")
    return _flag(options, "include_usage", False)
