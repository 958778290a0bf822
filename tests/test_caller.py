"""Answers of a model through session, tokenizer and grammar: an untrained model's calls fit, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gori.calls import Call, as_gleo, check_call, read_tools, render
from gori.data import Turn
from gori.errors import GoriError
from gori.runtime.caller import Caller
from gori.runtime.generate import picker
from gori.runtime.session import Session, SessionInfo, open_session


@pytest.fixture(scope="module")
def caller(artifact: Path) -> Caller:
    return Caller.open(artifact)


@settings(max_examples=60)
@given(st.text(max_size=20), st.one_of(st.none(), st.integers(0, 99)), st.integers(2, 40))
def test_whatever_is_said_the_answer_is_a_list_of_calls_that_fit(
    caller: Caller, said: str, seed: int | None, most: int
) -> None:
    assume(len(caller.tokenizer.encode(f" {said}")) < 44)
    answer = caller.call(said, most=most, pick=picker(seed, temperature=2.0))
    assert answer.finished
    assert len(answer.ids) < most
    assert answer.calls is not None
    for call in answer.calls:
        check_call(call, caller.functions)
    assert render(answer.calls) == answer.text or any(
        isinstance(v, float) for c in answer.calls for v in c.arguments.values()
    )


def test_free_text_of_an_untrained_model_is_no_call(caller: Caller) -> None:
    pieces: list[str] = []
    answer = caller.call("서울역 가자", constrained=False, most=12, on_text=pieces.append)
    assert answer.calls is None
    assert len(answer.ids) == 12
    assert not answer.finished
    assert "".join(pieces) == answer.text


class Scripted(Session):
    """Logits that ask for the tokens of a script, one for each call of the engine; keeps what it was given."""

    def __init__(self, script: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        self.info = SessionInfo("scripted", "1", "-", vocab_size, 128, 64, None, (), 1, 0)
        self.script, self.given = list(script), []

    def _run(self, ids: Sequence[int], start: int) -> np.ndarray:
        self.given.append(list(ids))
        logits = np.zeros(self.info.vocab_size, np.float32)
        logits[self.script.pop(0)] = 1
        return logits


def test_tokens_without_a_choice_are_read_with_what_follows(caller: Caller, artifact: Path) -> None:
    tokenizer = caller.tokenizer
    ids = tokenizer.encode_markup("<|call:open_window|><|arg:child_lock|> true")
    true = tokenizer.encode(" true")
    # what a model must be asked: the function, the argument, the first token by which true is not false, and the end
    session = Scripted([ids[0], ids[1], true[0], caller.ends[0]], caller.tokenizer.vocab_size)
    scripted = Caller(session, tokenizer, artifact, caller.functions)
    answer = scripted.call("잠가줘")
    assert answer.calls == [Call("open_window", {"child_lock": True})]
    assert answer.forced_tokens == len(true) - 1
    assert session.given[1:] == [[ids[0]], [ids[1]], true]
    assert answer.alternatives[0][0] == "open_window"


def test_a_system_text_stands_before_the_utterance_and_is_read_once(
    caller: Caller, artifact: Path, tmp_path: Path
) -> None:
    told = Path(shutil.copytree(artifact, tmp_path / "told"))
    (told / "system.txt").write_text("car", encoding="utf-8")
    with_text = Caller.open(told)
    spoken = (Turn("system", "car"), Turn("user", "가자"))
    first = with_text.call("가자")
    assert first.ids == caller.answer(spoken).ids
    assert first.prompt_tokens > caller.call("가자").prompt_tokens
    with_text.call("문 열어")
    assert with_text.call("가자").ids == first.ids


def test_an_answer_is_cancelled_between_tokens(caller: Caller) -> None:
    asked: list[int] = []
    answer = caller.call("가자", constrained=False, cancelled=lambda: len(asked) == 3 or bool(asked.append(1)))
    assert len(answer.ids) == 4
    assert not answer.finished


def test_a_prompt_that_leaves_no_room_is_refused_with_its_length(caller: Caller) -> None:
    with pytest.raises(GoriError, match="the prompt has 453 tokens, the context holds 48: shorten it"):
        caller.call("a b " * 150)


def test_a_tokenizer_without_the_tools_special_tokens_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    tools = [{"type": "function", "function": {"name": "fly", "parameters": {}}}]
    (other / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    with pytest.raises(GoriError, match="not trained on calls of its tools"):
        Caller.open(other).call("날아")


def test_gleo_takes_the_package_of_the_app_that_offers_the_function(tmp_path: Path) -> None:
    app = {"packageName": "com.example.todo", "actionCalls": [{"function": {"name": "ADD_REMINDER", "parameters": {}}}]}
    (tmp_path / "tools.json").write_text(json.dumps(app), encoding="utf-8")
    call = Call("ADD_REMINDER", {"title": "회의"})
    assert as_gleo(call, read_tools(tmp_path / "tools.json")) == {
        "packageName": "com.example.todo",
        "action": "ADD_REMINDER",
        "actionParameters": {"title": "회의"},
    }
    assert as_gleo(call, {}) == {"action": "ADD_REMINDER", "actionParameters": {"title": "회의"}}


def test_eight_bit_keys_and_values_are_llama_cpps_alone(
    artifact: Path, caller: Caller, gori: Callable[..., object], tmp_path: Path
) -> None:
    ids = list(range(8, 40))
    plain, packed = (open_session(artifact, kv=kv).prefill(ids) for kv in ("float32", "q8_0"))
    difference = float(np.abs(plain - packed).max())
    assert 0 < difference < 0.2 * float(plain.std())
    np.testing.assert_array_equal(plain, open_session(artifact).prefill(ids))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(GoriError, match=r"eager keeps keys and values in float32 alone: --kv is of \.gguf files"):
        open_session(checkpoint, kv="q8_0")
