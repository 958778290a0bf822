"""Answers as OpenAI's bodies: one completion, or the chunks of a stream. Knows nothing of HTTP or of sessions.

A call's arguments are streamed argument by argument: what an argument is in JSON is known when its value has ended.
Joined, the pieces are the same bytes as in the body of an answer that is not streamed.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gori.calls import Call, Function, plain
from gori.runtime.caller import Answer
from gori.runtime.serve_request import Request


@dataclass
class Timed:
    """An answer, and what the server knows of it."""

    answer: Answer
    queue_ms: float
    engine: str
    cut: bool = False
    """A stop text ended it."""


def finish_reason(timed: Timed, form: str) -> str:
    """`tool_calls`, `stop`, or `length` where the tokens or the context ran out."""
    if not timed.answer.finished and not timed.cut:
        return "length"
    return "tool_calls" if form == "calls" and timed.answer.calls else "stop"


def usage(answer: Answer) -> dict[str, int]:
    """Tokens of the prompt and of the answer, the end mark not counted."""
    read, said = answer.prompt_tokens, len(answer.ids)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def extension(timed: Timed) -> dict[str, Any]:
    """What OpenAI's form has no place for, under `gori`."""
    a = timed.answer
    return {
        "engine": timed.engine,
        "latency_ms": round(a.total_ms, 2),
        "first_token_ms": round(a.first_token_ms, 2),
        "queue_ms": round(timed.queue_ms, 2),
        "forced_tokens": a.forced_tokens,
        "alternatives": [{"name": n, "probability": float(f"{p:.4g}")} for n, p in a.alternatives],
    }


def content_of(answer: Answer, form: str) -> str:
    """The content of a message that has no tool_calls; empty where the answer is that no function fits."""
    calls = answer.calls or []
    if form == "object":
        return json.dumps({"calls": [plain(c) for c in calls]}, ensure_ascii=False)
    if form == "arguments":
        assert len(calls) == 1, answer.text
        return arguments_of(calls[0])
    return answer.text if form == "words" else ""


def arguments_of(call: Call) -> str:
    """A call's arguments as the JSON text that OpenAI's form wants."""
    return json.dumps(dict(call.arguments), ensure_ascii=False)


def _id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Head:
    """What all chunks of one answer share."""

    model: str
    id: str = field(default_factory=lambda: _id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def completion(head: Head, asked: Request, timed: Timed) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    if asked.form == "calls" and timed.answer.calls:
        message["tool_calls"] = [
            {"id": _id("call_"), "type": "function", "function": {"name": c.name, "arguments": arguments_of(c)}}
            for c in timed.answer.calls
        ]
    else:
        message["content"] = content_of(timed.answer, asked.form)
    reason = finish_reason(timed, asked.form)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    body = head.body("chat.completion", [choice])
    return body | {"usage": usage(timed.answer), "gori": extension(timed)}


class Chunks:
    """The bodies of a stream, in order: `open`, `text` for each piece that the model says, `close`."""

    def __init__(self, head: Head, asked: Request, functions: Mapping[str, Function]) -> None:
        self.head, self.asked = head, asked
        self._calls = CallStream(functions) if asked.form == "calls" else None

    def open(self) -> Iterator[dict[str, Any]]:
        yield self._chunk({"role": "assistant", "content": "" if self.asked.form == "words" else None})

    def text(self, piece: str) -> Iterator[dict[str, Any]]:
        if self._calls is not None:
            yield from map(self._chunk, self._calls.push(piece))
        elif self.asked.form == "words":
            yield self._chunk({"content": piece})

    def close(self, timed: Timed) -> Iterator[dict[str, Any]]:
        if self._calls is not None:
            yield from map(self._chunk, self._calls.close())
        if self.asked.form in ("object", "arguments") or (self._calls and not timed.answer.calls):
            yield self._chunk({"content": content_of(timed.answer, self.asked.form)})
        last = self._chunk({}, finish_reason(timed, self.asked.form))
        yield last | {"gori": extension(timed)}
        if self.asked.include_usage:
            yield self.head.body("chat.completion.chunk", []) | {"usage": usage(timed.answer)}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        none = {"usage": None} if self.asked.include_usage else {}
        return self.head.body("chat.completion.chunk", [choice]) | none


class CallStream:
    """The text of calls as it arrives, a special token or a piece of a value at a time → deltas of tool_calls."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self.functions = functions
        self.calls = 0
        self._name, self._argument = "", ""
        self._values: list[str] = []
        self._arguments = 0

    def push(self, piece: str) -> Iterator[dict[str, Any]]:
        """Deltas that this piece completes, perhaps none."""
        if piece.startswith("<|call:"):
            yield from self.close()
            self._name, self._arguments = piece[len("<|call:") : -len("|>")], 0
            self.calls += 1
            begun = {"name": self._name, "arguments": ""}
            yield self._delta({"id": _id("call_"), "type": "function", "function": begun})
        elif piece.startswith("<|arg:"):
            name = piece[len("<|arg:") : -len("|>")]
            if name != self._argument:
                yield from self._end_argument()
            self._argument = name
            self._values.append("")
        elif self._values:
            self._values[-1] += piece

    def close(self) -> Iterator[dict[str, Any]]:
        """End the call that is open, if one is."""
        yield from self._end_argument()
        if self._name:
            yield self._delta({"function": {"arguments": "}" if self._arguments else "{}"}})
        self._name = ""

    def _end_argument(self) -> Iterator[dict[str, Any]]:
        if self._values:
            schema = self.functions[self._name].properties[self._argument]
            array = schema.get("type") == "array"
            text = (schema.get("items", {}) if array else schema).get("type", "string") == "string"
            values = [v.removeprefix(" ") if text else json.loads(v) for v in self._values]
            value = json.dumps(values if array else values[0], ensure_ascii=False)
            before = ", " if self._arguments else "{"
            self._arguments += 1
            name = json.dumps(self._argument, ensure_ascii=False)
            yield self._delta({"function": {"arguments": f"{before}{name}: {value}"}})
        self._argument, self._values = "", []

    def _delta(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.calls - 1, **call}]}


class Stopper:
    """Words as they arrive, up to the first stop text; holds back what could be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop, self.held, self.found = stop, "", False

    def push(self, piece: str) -> str:
        """What may be shown of all that was said so far and not shown yet."""
        if self.found:
            return ""
        self.held += piece
        places = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if places:
            self.found = True
            return self.held[: min(places)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def close(self) -> str:
        """What was held back and is no stop text."""
        return "" if self.found else self.held
