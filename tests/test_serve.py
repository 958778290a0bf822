"""`gori serve` over HTTP: what is answered is the caller's own answer, what is wrong is refused in OpenAI's form."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gori.calls import read_tools
from gori.runtime.caller import Caller
from gori.runtime.generate import picker
from gori.runtime.serve import Limits
from serving import ask, events, held, metric, said, serving, write_student

UTTERANCES = (
    "서울역 가자",
    "take me to Pier 39",
    "22도로 맞춰줘",
    "open it 20 percent",
    "하늘이 왜 파래?",
    "집 and 한강공원",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return write_student(tmp_path_factory.mktemp("serve") / "toy", toy_tokenizer)


@pytest.fixture(scope="module")
def url(student: Path) -> Iterator[str]:
    with serving(student) as url:
        yield url


@pytest.fixture(scope="module")
def caller(student: Path) -> Caller:
    return Caller.open(student)


def wanted(caller: Caller, text: str, **how: Any) -> list[tuple[str, str]]:
    """The caller's own answer as names and arguments' JSON."""
    calls = caller.call(text, **how).calls
    assert calls is not None
    return [(c.name, json.dumps(dict(c.arguments), ensure_ascii=False)) for c in calls]


def got(body: dict[str, Any]) -> list[tuple[str, str]]:
    message = body["choices"][0]["message"]
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]


def joined(chunks: list[Any]) -> list[tuple[str, str]]:
    """The calls that a client puts together of a stream's deltas."""
    out: list[list[str]] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            for delta in choice["delta"].get("tool_calls", []):
                if delta["index"] == len(out):
                    out.append([delta["function"]["name"], ""])
                out[delta["index"]][1] += delta["function"]["arguments"]
    return [(name, arguments) for name, arguments in out]


@pytest.mark.parametrize("text", UTTERANCES)
def test_an_answer_is_the_callers_whole_and_streamed(text: str, url: str, caller: Caller) -> None:
    status, _, body = ask(url, body=said(text))
    assert status == 200
    assert got(body) == wanted(caller, text)
    answer = caller.call(text)
    assert body["usage"]["completion_tokens"] == len(answer.ids)
    assert body["usage"]["prompt_tokens"] == answer.prompt_tokens
    assert body["choices"][0]["finish_reason"] == ("tool_calls" if answer.calls else "stop")
    assert [a["name"] for a in body["gori"]["alternatives"]] == [n for n, _ in answer.alternatives]
    chunks = events(ask(url, body=said(text, stream=True))[2])
    assert joined(chunks) == wanted(caller, text)
    assert chunks[-1]["choices"][0]["finish_reason"] == body["choices"][0]["finish_reason"]
    assert "usage" not in chunks[0]


def test_sampling_is_the_callers_with_the_same_seed(url: str, caller: Caller) -> None:
    how = {"seed": 5, "temperature": 1.5, "top_p": 0.9}
    body = ask(url, body=said("22도로 맞춰줘", **how))[2]
    assert got(body) == wanted(caller, "22도로 맞춰줘", pick=picker(5, 1.5, top_p=0.9))


def test_usage_of_a_stream_comes_when_it_is_asked_for(url: str) -> None:
    chunks = events(ask(url, body=said("서울역 가자", stream=True, stream_options={"include_usage": True}))[2])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == ask(url, body=said("서울역 가자"))[2]["usage"]
    assert all(c["usage"] is None for c in chunks[:-1])


@pytest.mark.parametrize("seed", range(4))
def test_tools_and_tool_choice_say_which_functions_may_be_called(seed: int, url: str, toy: Path) -> None:
    tools = {t["function"]["name"]: t for t in json.loads((toy / "tools.json").read_text(encoding="utf-8"))}
    hot = {"temperature": 2.0, "seed": seed}
    two = [tools["open_window"], {"type": "function", "function": {"name": "set_temperature"}}]
    names = {n for n, _ in got(ask(url, body=said("서울역 가자", tools=two, **hot))[2])}
    assert names <= {"open_window", "set_temperature"}
    assert got(ask(url, body=said("서울역 가자", tool_choice="required", **hot))[2])
    one = {"type": "function", "function": {"name": "navigate"}}
    calls = got(ask(url, body=said("22도", tool_choice=one, parallel_tool_calls=False, **hot))[2])
    assert [n for n, _ in calls] == ["navigate"]
    silent = ask(url, body=said("서울역 가자", tool_choice="none", **hot))[2]["choices"][0]
    assert (silent["message"]["content"], silent["finish_reason"]) == ("", "stop")
    assert "tool_calls" not in silent["message"]


def test_calls_come_as_json_where_response_format_asks_for_it(url: str, caller: Caller, toy: Path) -> None:
    text = "take me to Pier 39"
    body = ask(url, body=said(text, response_format={"type": "json_object"}))[2]
    found = json.loads(body["choices"][0]["message"]["content"])
    assert [(c["name"], c["arguments"]) for c in found["calls"]] == [
        (n, json.loads(a)) for n, a in wanted(caller, text)
    ]
    tools = {t["function"]["name"]: t["function"] for t in json.loads((toy / "tools.json").read_text(encoding="utf-8"))}
    schema = {"name": "open_window", "schema": tools["open_window"]["parameters"], "strict": True}
    for stream in (False, True):
        how = {"response_format": {"type": "json_schema", "json_schema": schema}, "stream": stream}
        answer = ask(url, body=said(text, **how))[2]
        if stream:
            content = "".join(c["choices"][0]["delta"].get("content") or "" for c in events(answer))
        else:
            content = answer["choices"][0]["message"]["content"]
        assert [("open_window", content)] == wanted(caller, text, only={"open_window"}, must_call=True, most_calls=1)


def test_a_model_of_words_answers_in_words_up_to_a_stop(student: Path) -> None:
    with serving(student, words=True) as url:
        how = {"tool_choice": "none", "max_tokens": 20}
        whole = ask(url, body=said("하늘이 왜 파래?", **how))[2]["choices"][0]
        text = whole["message"]["content"]
        assert len(text) > 3
        assert "<|" not in text
        stop = text[2:4]
        cut = ask(url, body=said("하늘이 왜 파래?", stop=stop, **how))[2]["choices"][0]
        assert cut["message"]["content"] == text[: text.index(stop)]
        assert cut["finish_reason"] == "stop"
        chunks = events(ask(url, body=said("하늘이 왜 파래?", stop=[stop], stream=True, **how))[2])
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text[: text.index(stop)]
        few = ask(url, body=said("하늘이 왜 파래?", tool_choice="none", max_completion_tokens=1))[2]
        assert few["usage"]["completion_tokens"] <= 1


def test_after_a_tools_result_nothing_is_called_again(url: str, toy: Path) -> None:
    functions = read_tools(toy / "tools.json")
    assert "open_window" in functions
    call = {"id": "call_1", "type": "function", "function": {"name": "open_window", "arguments": '{"percent": 20}'}}
    messages = [
        {"role": "developer", "content": "You are a car."},
        {"role": "user", "content": [{"type": "text", "text": "open it 20 percent"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    status, _, body = ask(url, body={"messages": messages})
    assert (status, got(body)) == (200, [])
    status, _, body = ask(url, body={"messages": messages, "tool_choice": "required"})
    assert status == 200
    assert got(body)


BAD: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "not JSON"),
    "cut": (b'{"messages": [', 400, "not JSON: .* line 1 column"),
    "not UTF-8": (b'{"messages": "\xb0\xa1"}', 400, "byte 0xb0 at offset 14"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, 400, "nested too deeply"),
    "half a pair": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half a surrogate pair"),
    "a long number": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "cannot be read"),
    "not a number": (b'{"temperature": NaN}', 400, "NaN is no JSON"),
    "a list": (b"[]", 400, "expected an object"),
    "too large": (b" " * ((1 << 20) + 1), 413, "larger than 1048576 bytes"),
    "too long": (json.dumps(said("가나다 " * 20_000)).encode(), 400, "at most"),
    "too many tokens": (json.dumps(said("가나다라마바사 " * 22)).encode(), 400, "the context holds"),
    "no room": (json.dumps(said("hi", max_tokens=1)).encode(), 400, "allow 2 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_body_is_refused_in_one_sentence(case: str, url: str) -> None:
    raw, status, message = BAD[case]
    found, headers, body = ask(url, body=raw)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert re.search(message, body["error"]["message"]), body
    assert "Traceback" not in json.dumps(body)


def test_what_is_no_request_for_an_answer_is_refused(url: str) -> None:
    assert ask(url, "/v2")[0] == 404
    assert ask(url, "/v1/chat/completions")[0] == 405
    assert ask(url, "/healthz", said("hi"))[0] == 405
    assert ask(url, body=said("hi"), Content_Type="text/plain")[0] == 415
    assert ask(url, body=said("hi"), Content_Encoding="gzip")[0] == 415
    assert ask(url, body=said("hi", model="gpt-4"))[2]["error"]["code"] == "model_not_found"
    assert ask(url, "/v1/models/gpt-4")[0] == 404


def test_pages_of_others_may_not_ask(url: str) -> None:
    host = urlsplit(url).netloc
    assert ask(url, body=said("hi"), Origin="https://example.com")[0] == 403
    assert ask(url, body=said("hi"), Origin="null")[0] == 403
    assert ask(url, body=said("hi"), Host="example.com")[0] == 403
    assert ask(url, body=said("hi"), Host="[")[0] == 403
    assert ask(url, body=said("hi"), Origin=f"http://{host}")[0] == 200
    assert ask(url, body=said("hi"), Host="localhost:1")[0] == 200


def test_a_key_is_asked_for_where_one_is_set(student: Path) -> None:
    with serving(student, key="sesame") as url:
        for path in ("/", "/healthz"):
            assert ask(url, path)[0] == 200
        for path in ("/v1/models", "/metrics"):
            assert ask(url, path)[0] == 401
            assert ask(url, path, Authorization="Bearer sesame")[0] == 200
        status, headers, body = ask(url, body=said("hi"), Authorization="Bearer sesam")
        assert (status, headers["www-authenticate"], body["error"]["code"]) == (401, "Bearer", "invalid_api_key")
        assert ask(url, body=said("hi"), Authorization="Bearer sesame")[0] == 200


def test_models_health_and_metrics(url: str, caller: Caller) -> None:
    (model,) = ask(url, "/v1/models")[2]["data"]
    assert (model["id"], model["gori"]["functions"]) == ("toy", list(caller.functions))
    assert ask(url, "/v1/models/toy")[2] == model
    assert ask(url, "/healthz")[2] == {"status": "ok", "model": "toy"}
    before = metric(url, "gori_answer_seconds_count")
    ask(url, body=said("hi"))
    assert metric(url, "gori_answer_seconds_count") == before + 1
    text = ask(url, "/metrics")[2]
    assert 'gori_requests_total{path="/v1/chat/completions",status="200"}' in text
    counts = [int(x.split()[1]) for x in text.splitlines() if x.startswith("gori_answer_seconds_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] == before + 1


def waits(url: str, name: str, value: float) -> None:
    """Until a figure has this value."""
    end = time.monotonic() + 10
    while metric(url, name) != value:
        assert time.monotonic() < end, f"{name} is {metric(url, name)}, not {value}"
        time.sleep(0.01)


def in_background(url: str, count: int, replies: list[Any], **more: Any) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=lambda: replies.append(ask(url, body=said("서울역 가자", **more))))
        for _ in range(count)
    ]
    for t in threads:
        t.start()
    return threads


def test_a_full_queue_refuses_and_what_it_holds_is_answered(student: Path) -> None:
    caller = Caller.open(student)
    gate, _ = held(caller)
    replies: list[Any] = []
    with serving(student, callers=[caller], queue=2) as url:
        threads = in_background(url, 3, replies)
        waits(url, "gori_queue_waiting", 2)
        status, headers, body = ask(url, body=said("hi"))
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert ask(url, "/healthz")[0] == 200  # the event loop is free
        gate.set()
        for t in threads:
            t.join()
    assert [r[0] for r in replies] == [200, 200, 200]


def test_what_waits_or_runs_too_long_is_given_up_and_frees_its_place(student: Path) -> None:
    caller = Caller.open(student)
    gate, runs = held(caller)
    replies: list[Any] = []
    with serving(student, callers=[caller], limits=Limits(timeout_s=0.5)) as url:
        threads = in_background(url, 1, replies)
        waits(url, "gori_sessions_busy", 1)
        threads += in_background(url, 1, replies, stream=True)
        for t in threads:
            t.join()
        assert sorted(r[0] for r in replies) == [503, 504]
        assert {r[2]["error"]["code"] for r in replies} == {"timeout"}
        assert metric(url, "gori_queue_waiting") == 0
        gate.set()
        waits(url, "gori_sessions_busy", 0)
        assert runs() == 1  # the answer ended at its next token, and the other was never begun
        assert ask(url, body=said("서울역 가자"))[0] == 200


def raw_request(url: str, body: bytes, length: int | None = None) -> socket.socket:
    parts = urlsplit(url)
    out = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    out.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return out


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool, student: Path) -> None:
    caller = Caller.open(student)
    gate, runs = held(caller)
    body = json.dumps(said("서울역 가자", tool_choice="required", stream=stream)).encode()
    with serving(student, callers=[caller]) as url:
        first, second = raw_request(url, body), raw_request(url, body)
        waits(url, "gori_queue_waiting", 1)
        second.close()
        waits(url, "gori_queue_waiting", 0)
        first.close()
        time.sleep(0.1)
        gate.set()
        waits(url, "gori_sessions_busy", 0)
        assert runs() == 1
        assert 'status="499"} 2' in ask(url, "/metrics")[2]


def test_a_body_that_does_not_come_and_a_connection_that_says_nothing_are_closed(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gori.runtime.serve_http.Connection.idle_s", 0.3)
    with serving(student, limits=Limits(timeout_s=0.5)) as url:
        parts = urlsplit(url)
        with raw_request(url, b'{"messages"', 500) as half:
            assert half.recv(1000).startswith(b"HTTP/1.1 408")
        for drip in (b"", b"POST /v1/ch", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET"):
            with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as silent:
                silent.sendall(drip)
                while silent.recv(1000):
                    pass  # until the server closes it, else the time runs out


def test_an_engine_that_fails_is_the_servers_error_and_the_next_request_is_answered(student: Path) -> None:
    from gori.errors import GoriError

    caller = Caller.open(student)
    run = caller.session._run
    with serving(student, callers=[caller]) as url:

        def broken(ids: Any, start: int) -> Any:
            raise GoriError("model.pte does not run (out of memory): export it again")

        caller.session._run = broken  # type: ignore[method-assign]
        status, _, body = ask(url, body=said("서울역 가자"))
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "does not run" in body["error"]["message"]
        caller.session._run = run  # type: ignore[method-assign]
        assert ask(url, body=said("서울역 가자"))[0] == 200
