"""Servers for the tests of `gori serve`: a small random student of the toy task behind real HTTP, in a thread."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from gori import checkpoint
from gori.model import Decoder, ModelConfig
from gori.runtime.caller import Caller
from gori.runtime.serve import Limits, application
from gori.runtime.serve_http import http_server, listen, url_of
from gori.runtime.serve_line import Line
from gori.tokenizer import copy_files

CONTEXT = 160


def write_student(out: Path, tokenizer: Path) -> Path:
    """A random checkpoint with the toy task's tokenizer and tools."""
    out.mkdir(parents=True, exist_ok=True)
    cfg = ModelConfig(
        kind="qwen3", vocab_size=360, hidden_size=64, layers=1, heads=2, kv_heads=1, head_dim=32, intermediate_size=96,
        max_position=CONTEXT, init_std=0.3,
    )  # fmt: skip
    checkpoint.save(Decoder(cfg).initialise(torch.Generator().manual_seed(0)), out)
    copy_files(tokenizer, out)
    return out


@contextmanager
def serving(
    student: Path,
    *,
    callers: list[Caller] | None = None,
    queue: int = 16,
    limits: Limits | None = None,
    key: str | None = None,
    words: bool = False,
) -> Iterator[str]:
    """A server's URL while it runs."""
    limits = limits or Limits()
    line = Line(callers or [Caller.open(student)], queue, "toy", words)
    with listen("127.0.0.1", 0) as bound:
        server = http_server(application(line, limits, key), limits.timeout_s)
        thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
        thread.start()
        try:
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def held(caller: Caller) -> tuple[threading.Event, Callable[[], int]]:
    """Make an engine wait before each run until the event is set; and how often it ran or waited."""
    gate, run, begun = threading.Event(), caller.session._run, []

    def slow(ids: Any, start: int) -> Any:
        begun.append(start)
        assert gate.wait(20)
        return run(ids, start)

    caller.session._run = slow  # type: ignore[method-assign]
    return gate, lambda: len(begun)


Reply = tuple[int, dict[str, str], Any]


def ask(url: str, path: str = "/v1/chat/completions", body: Any = None, **headers: str) -> Reply:
    """Status, headers and body of one request: a POST where there is a body, which may be raw bytes."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request("GET" if raw is None else "POST", path, raw, given)
        response = connection.getresponse()
        text = response.read().decode()
        kind = response.headers.get("content-type", "")
        return response.status, dict(response.headers.items()), json.loads(text) if "json" in kind else text
    finally:
        connection.close()


def said(text: str, **more: Any) -> dict[str, Any]:
    """The body of a request with one utterance."""
    return {"messages": [{"role": "user", "content": text}], **more}


def events(text: str) -> list[Any]:
    """The bodies of a stream of server-sent events, which has to end with [DONE]."""
    parts = [p.removeprefix("data: ") for p in text.split("\n\n") if p]
    assert parts[-1] == "[DONE]", text[-300:]
    return [json.loads(p) for p in parts[:-1]]


def metric(url: str, name: str) -> float:
    """One figure of /metrics."""
    line = next(x for x in ask(url, "/metrics")[2].splitlines() if x.startswith(f"{name} "))
    return float(line.split()[1])
