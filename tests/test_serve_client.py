"""OpenAI's own client against `gori serve`, unchanged: chat with tools, a conversation, streams, models, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gori.runtime.caller import Caller
from serving import serving, write_student

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return write_student(tmp_path_factory.mktemp("client") / "toy", toy_tokenizer)


@pytest.fixture(scope="module")
def client(student: Path) -> Iterator[Any]:
    with (
        serving(student, key="sesame") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tools(toy: Path) -> list[Any]:
    return json.loads((toy / "tools.json").read_text(encoding="utf-8"))


USER = {"role": "user", "content": "서울역 가자"}


def test_a_chat_with_tools_and_its_results_sent_back(client: Any, tools: list[Any], student: Path) -> None:
    how = {"model": "toy", "tools": tools, "user": "driver", "metadata": {"trip": "1"}}
    first = client.chat.completions.create(messages=[USER], tool_choice="required", **how)
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    answer = Caller.open(student).call("서울역 가자", must_call=True)
    assert [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls] == [
        (c.name, dict(c.arguments)) for c in answer.calls or []
    ]
    assert first.usage.total_tokens == answer.prompt_tokens + len(answer.ids)
    results = [{"role": "tool", "tool_call_id": c.id, "content": "ok"} for c in choice.message.tool_calls[:1]]
    second = client.chat.completions.create(
        messages=[
            USER,
            choice.message.model_dump() | {"tool_calls": choice.message.model_dump()["tool_calls"][:1]},
            *results,
        ],
        **how,
    )
    assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", "")


def test_a_stream_holds_what_the_whole_answer_holds(client: Any) -> None:
    how: dict[str, Any] = {"model": "toy", "messages": [USER], "tool_choice": "required"}
    whole = client.chat.completions.create(**how)
    with client.chat.completions.stream(**how, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        last = stream.get_final_completion()
    shown = [[(c.function.name, c.function.arguments) for c in x.choices[0].message.tool_calls] for x in (whole, last)]
    assert shown[0] == shown[1]
    assert last.usage == whole.usage
    assert last.choices[0].finish_reason == "tool_calls"


def test_models_are_listed(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "gori"


def test_errors_are_the_clients_own(client: Any) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        create(model="gpt-4", messages=[USER])
    with pytest.raises(openai.BadRequestError, match="n is not supported") as refused:
        create(model="toy", messages=[USER], n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="'fly' is none of them"):
        create(model="toy", messages=[USER], tools=[{"type": "function", "function": {"name": "fly"}}])
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()
