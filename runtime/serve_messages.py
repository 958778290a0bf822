"""The messages of a request, read into turns. Knows nothing of what is to be answered.

Calls in the history are held to the model's schemas as its own answers are: it has seen no others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gori.calls import Call, CallError, Function, check_call, read_text
from gori.data import Turn
from gori.errors import GoriError
from gori.runtime.serve_refusal import Refusal

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id"}
EMPTY = {"refusal", "annotations", "audio", "function_call", "reasoning_content"}
"""Fields of an answer that clients send back with it; they have to be empty."""


def read_messages(messages: Any, functions: Mapping[str, Function], most_bytes: int) -> tuple[Turn, ...]:
    """Turns of a conversation that waits for the assistant; Refusal names the message at fault. More text than
    `most_bytes` is refused before anything costly is done with it."""
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages must be a list of at least one message", "messages")
    turns: list[Turn] = []
    asked: set[str] = set()
    for i, m in enumerate(messages):
        turns.append(_turn(m, f"messages[{i}]", functions, asked))
    if turns[-1].role in ("assistant", "system"):
        where = f"messages[{len(turns) - 1}]"
        raise Refusal(f"{where}: the last message is the {turns[-1].role}'s: end with a user's or a tool's", where)
    length = sum(len((t.content or "").encode()) + sum(len(str(c.arguments)) for c in t.calls or ()) for t in turns)
    if length > most_bytes:
        message = f"messages hold {length} bytes of text, and the context at most {most_bytes}: shorten them"
        raise Refusal(message, "messages", code="context_length_exceeded")
    return tuple(turns)


def _turn(m: Any, where: str, functions: Mapping[str, Function], asked: set[str]) -> Turn:
    """One message; `asked` gathers the ids of calls, which tools' results refer to."""
    role = m.get("role") if isinstance(m, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        shown = json.dumps(role)[:40] if isinstance(m, dict) else type(m).__name__
        raise Refusal(f"{where}: the role is {shown}, expected one of {', '.join(ROLES)}", where)
    if unknown := next((k for k in m if k not in FIELDS and (k not in EMPTY or m[k])), None):
        raise Refusal(f"{where}: {unknown[:40]!r} is not supported in a message", where)
    content = _text(m.get("content"), where)
    if role == "assistant":
        return _assistant(m, content, where, functions, asked)
    if m.get("tool_calls"):
        raise Refusal(f"{where}: only an assistant's message has tool_calls", where)
    if role == "tool":
        of = m.get("tool_call_id")
        if not isinstance(of, str) or of not in asked:
            raise Refusal(f"{where}: tool_call_id {json.dumps(of)[:40]} is none of the calls before it", where)
    if not content:
        raise Refusal(f"{where}: a {role}'s message needs content", where)
    return Turn(ROLES[role], content)


def _text(content: Any, where: str) -> str:
    """Content as one text: a string, or parts that are all text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(f"{where}: content must be a text or a list of text parts, got {type(content).__name__}", where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Refusal(f"{where}: a part of the content is {str(kind)[:40]!r}, this model reads text alone", where)
    return "".join(part["text"] for part in content)


def _assistant(m: dict[str, Any], content: str, where: str, functions: Mapping[str, Function], asked: set[str]) -> Turn:
    calls = m.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Refusal(f"{where}: tool_calls must be a list, got {type(calls).__name__}", where)
    if calls and content:
        raise Refusal(f"{where}: this model says words or makes calls, not both in one message", where)
    if not calls and content:
        return Turn("assistant", content)
    for c in calls:
        if isinstance(c, dict) and isinstance(c.get("id"), str):
            asked.add(c["id"])
    return Turn("assistant", None, tuple(_call(c, f"{where}.tool_calls[{i}]", functions) for i, c in enumerate(calls)))


def _call(c: Any, where: str, functions: Mapping[str, Function]) -> Call:
    f = c.get("function") if isinstance(c, dict) else None
    if not isinstance(f, dict) or not isinstance(f.get("name"), str) or not isinstance(f.get("arguments"), str):
        expected = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
        raise Refusal(f"{where}: expected {expected}", where)
    try:
        arguments = read_text(json.loads(f["arguments"] or "{}"), where)
        if not isinstance(arguments, dict):
            raise ValueError(f"a {type(arguments).__name__} in place of an object")
        call = Call(f["name"], arguments)
        check_call(call, functions)
    except CallError as e:
        raise Refusal(f"{where}: {e}", where) from e
    except (ValueError, RecursionError, GoriError) as e:
        raise Refusal(f"{where}: arguments are not JSON ({e})", where) from e
    return call
