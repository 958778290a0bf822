"""What the C interface promises, on a student that test_runner.py exported: answers, refusals, damaged files, misuse.

Run by that file in a process of its own: libgori and ExecuTorch's Python module register the same kernels, and
ExecuTorch ends a process that holds both.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gori.calls import read_tools
from gori.tokenizer import Tokenizer
from runner_probe import (
    ARGUMENT,
    CALLS,
    CANCELLED,
    CAPACITY_STATUS,
    ENGINE,
    FILE,
    GLEO,
    INTERNAL,
    LOOKUP_ALWAYS,
    LOOKUP_MEASURED,
    LOOKUP_NEVER,
    NO_CALL,
    OK,
    TEXT,
    TOO_LONG,
    CallOptions,
    Facts,
    Library,
    OnText,
    Options,
    Result,
    Runner,
    RunnerError,
    build,
)
from students import CHUNK, CONTEXT

CASES = Path(os.environ["GORI_RUNNER_CASES"])
"""et/ an artifact, other/ runner.bin of another model, answers.json: what Python answered."""
PYTHON: list[dict[str, Any]] = json.loads((CASES / "answers.json").read_text())
SAID = list(dict.fromkeys(row["said"] for row in PYTHON))


@pytest.fixture(scope="module")
def et() -> Path:
    return CASES / "et"


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(build(tests=True))


@pytest.fixture
def copy(et: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("model.pte", "runner.bin"):
        shutil.copyfile(et / name, out / name)
    return out


def test_the_answers_are_those_of_python(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        for row in PYTHON:
            text, result = runner.call(row["said"], most=row["most"])
            assert json.loads(text) == row["calls"], row
            assert result.answer_tokens == len(row["ids"]) + 1
            assert (result.prompt_tokens, result.forced_tokens) == (row["prompt"], row["forced"])


def test_guesses_change_no_answer(library: Library) -> None:
    texts, guessed, confirmed = [], [], []
    for lookup in (LOOKUP_NEVER, LOOKUP_ALWAYS, LOOKUP_MEASURED):
        with Runner(library, CASES / "copying", lookup=lookup) as runner:
            answers = [runner.call(said, temperature=t, seed=n) for n in range(5) for said in SAID for t in (0.0, 1.5)]
        texts.append([text for text, _ in answers])
        guessed.append(sum(r.guessed_tokens for _, r in answers))
        confirmed.append(sum(r.confirmed_tokens for _, r in answers))
    assert texts[0] == texts[1] == texts[2]
    assert guessed[0] == 0 < confirmed[1] < guessed[1]


def test_free_text_is_pythons_without_its_special_tokens(et: Path, library: Library) -> None:
    tokenizer = Tokenizer.load(et)
    with Runner(library, et) as runner:
        for row in PYTHON:
            spoken = b"".join(tokenizer.piece(t) for t in row["free"])
            text, result = runner.call(row["said"], form=TEXT, most=row["most"])
            assert text == spoken.decode(errors="replace")
            assert result.answer_tokens == len(row["free"]) + row["free_finished"]


def test_pieces_of_a_stream_are_whole_characters_and_make_the_answer(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        for said in SAID:
            pieces: list[str] = []
            on_text = OnText(lambda _, at, n, into=pieces: into.append(at[:n].decode()) or 0)
            result = Result(ctypes.sizeof(Result))
            how = CallOptions(ctypes.sizeof(CallOptions), form=TEXT, most=25)
            status = library.c.gori_stream(
                runner.handle, said.encode(), ctypes.byref(how), on_text, None, ctypes.byref(result)
            )
            library.check(status)
            assert "".join(pieces) == runner.call(said, form=TEXT, most=25)[0]


def test_sampled_answers_are_valid_and_repeat_with_their_seed(et: Path, library: Library) -> None:
    functions = read_tools(et / "tools.json")
    with Runner(library, et) as runner:
        found = set()
        for seed in range(60):
            how = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "seed": seed, "most": 36}
            text, _ = runner.call("서울역 가자", **how)
            assert runner.call("서울역 가자", **how)[0] == text
            for call in json.loads(text):
                jsonschema.validate(call["arguments"], {"properties": dict(functions[call["name"]].properties)})
            found.add(text)
        assert len(found) > 20


def test_the_gleo_form_names_actions(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        for said in SAID:
            calls = json.loads(runner.call(said, form=CALLS)[0])
            actions = json.loads(runner.call(said, form=GLEO)[0])
            assert actions == [{"action": c["name"], "actionParameters": c["arguments"]} for c in calls]


def test_a_prompt_that_leaves_no_room_is_refused_and_the_handle_goes_on(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        before = runner.call("서울역 가자")[0]
        with pytest.raises(RunnerError, match="shorten the utterance") as refused:
            runner.call("가나다" * 4000)
        assert refused.value.status == TOO_LONG
        assert runner.call("서울역 가자")[0] == before


def test_a_prefix_gives_the_same_answers_and_another_models_is_refused(et: Path, copy: Path, library: Library) -> None:
    prefix = copy / "prefix.bin"
    with Runner(library, copy) as runner:
        expected = [runner.call(s)[0] for s in SAID]
        library.check(library.c.gori_save_prefix(runner.handle, str(prefix).encode()))
    with Runner(library, copy) as runner:
        assert [runner.call(s)[0] for s in SAID] == expected
    whole = bytearray((copy / "model.pte").read_bytes())
    whole[len(whole) // 32 * 20] ^= 1
    (copy / "model.pte").write_bytes(whole)
    with pytest.raises(RunnerError, match=r"another model\.pte"):
        Runner(library, copy)
    with Runner(library, copy, use_prefix=0) as runner:
        assert len([runner.call(s) for s in SAID]) == len(expected)
    with Runner(library, et) as runner, pytest.raises(RunnerError, match="cannot write"):
        library.check(library.c.gori_save_prefix(runner.handle, b"/nowhere/prefix.bin"))


def test_a_damaged_prefix_is_refused_or_read_but_crashes_nothing(copy: Path, library: Library) -> None:
    prefix = copy / "prefix.bin"
    with Runner(library, copy) as runner:
        library.check(library.c.gori_save_prefix(runner.handle, str(prefix).encode()))
    whole, rng, statuses = prefix.read_bytes(), random.Random(0), set()
    for n in range(40):
        raw = bytearray(whole[: rng.randrange(len(whole))] if n % 2 else whole)
        for _ in range(rng.choice((1, 50))):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        prefix.write_bytes(raw)
        try:
            with Runner(library, copy) as runner:
                json.loads(runner.call("서울역", temperature=1.0, top_p=0.9)[0])
        except RunnerError as e:
            statuses.add(e.status)
    assert statuses == {FILE}


def test_a_damaged_runner_bin_never_crashes(copy: Path, library: Library) -> None:
    path = copy / "runner.bin"
    whole, rng = path.read_bytes(), random.Random(1)
    statuses: list[int] = []
    for n in range(80):
        raw = bytearray(whole[: rng.randrange(len(whole))] if n % 4 == 0 else whole)
        for _ in range(rng.choice((1, 30, 300))):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            with Runner(library, copy) as runner:
                for said in SAID[:4]:
                    runner.call(said, temperature=float(n % 2))
        except RunnerError as e:
            statuses.append(e.status)
        except UnicodeDecodeError:
            continue  # a token's bytes were damaged: the answer is wrong, and nothing was read past an end
    assert set(statuses) <= {FILE, ENGINE, TOO_LONG, NO_CALL, INTERNAL}
    assert statuses.count(FILE) > 20


@pytest.mark.parametrize("name", ["model.pte", "runner.bin"])
def test_a_missing_or_empty_file_is_named(name: str, copy: Path, library: Library) -> None:
    (copy / name).write_bytes(b"")
    with pytest.raises(RunnerError, match=name.replace(".", r"\.")):
        Runner(library, copy)
    (copy / name).unlink()
    with pytest.raises(RunnerError, match=name.replace(".", r"\.")):
        Runner(library, copy)
    with pytest.raises(RunnerError, match="nowhere"):
        Runner(library, copy / "nowhere")


def test_a_cut_program_is_refused(copy: Path, library: Library) -> None:
    whole = (copy / "model.pte").read_bytes()
    for part in (1, 8, 100, len(whole) // 3, len(whole) - 100):
        (copy / "model.pte").write_bytes(whole[:part])
        with pytest.raises(RunnerError) as refused:
            Runner(library, copy)
        assert refused.value.status == ENGINE


def test_the_program_of_another_model_is_refused(copy: Path, library: Library) -> None:
    shutil.copyfile(CASES / "other" / "runner.bin", copy / "runner.bin")
    with pytest.raises(RunnerError, match="two models"):
        Runner(library, copy)


def test_what_callers_do_wrong_is_said_and_harms_nothing(et: Path, library: Library) -> None:
    c, null = library.c, ctypes.c_void_p()
    with Runner(library, et) as runner:
        buffer = ctypes.create_string_buffer(64)
        good = lambda: Result(ctypes.sizeof(Result), ctypes.cast(buffer, ctypes.c_char_p), 64)  # noqa: E731
        wrong = {
            "no path": c.gori_open(None, None, ctypes.byref(null)),
            "no handle": c.gori_call(None, b"a", None, ctypes.byref(good())),
            "no utterance": c.gori_call(runner.handle, None, None, ctypes.byref(good())),
            "no result": c.gori_call(runner.handle, b"a", None, None),
            "a result without its size": c.gori_call(runner.handle, b"a", None, ctypes.byref(Result())),
            "no buffer": c.gori_call(runner.handle, b"a", None, ctypes.byref(Result(ctypes.sizeof(Result)))),
            "options without their size": c.gori_call(
                runner.handle, b"a", ctypes.byref(CallOptions()), ctypes.byref(good())
            ),
            "open options without their size": c.gori_open(b"x", ctypes.byref(Options()), ctypes.byref(null)),
            "no callback": c.gori_stream(runner.handle, b"a", None, None, None, ctypes.byref(good())),
            "no facts": c.gori_describe(runner.handle, None),
            "no count": c.gori_tokens(runner.handle, b"a", ctypes.c_size_t(1), None, ctypes.c_size_t(0), None),
            "no file": c.gori_save_prefix(runner.handle, None),
        }
        assert {k: v for k, v in wrong.items() if v != ARGUMENT} == {}
        wrong_options: tuple[dict[str, Any], ...] = (
            {"form": 3},
            {"form": -1},
            {"most": -1},
            {"most": 1},
            {"temperature": -1.0},
            {"top_p": 1.5},
            {"top_k": -2},
        )
        for bad in wrong_options:
            with pytest.raises(RunnerError) as refused:
                runner.call("a", **bad)
            assert refused.value.status == ARGUMENT
        with pytest.raises(RunnerError) as refused:
            runner.call("a", temperature=float("nan"))
        assert refused.value.status == ARGUMENT
        assert runner.call("서울역 가자")[0].startswith("[")
        assert library.c.gori_error() == b""
    c.gori_close(None)
    c.gori_cancel(None)


def test_a_small_buffer_says_what_is_needed(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        whole, needed = runner.call("서울역 가자", most=40)
        with pytest.raises(RunnerError) as refused:
            runner.call("서울역 가자", capacity=needed.length, most=40)
        assert refused.value.status == CAPACITY_STATUS
        assert runner.call("서울역 가자", capacity=needed.length + 1, most=40)[0] == whole
        count = ctypes.c_size_t()
        ids = (ctypes.c_uint32 * 1)()
        size, room = ctypes.c_size_t(9), ctypes.c_size_t(1)
        status = library.c.gori_tokens(runner.handle, b"a b c d e", size, ids, room, ctypes.byref(count))
        assert (status, count.value) == (CAPACITY_STATUS, len(runner.tokens(b"a b c d e")))


def test_a_callback_that_says_so_ends_the_answer(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        pieces: list[bytes] = []
        stop = OnText(lambda _, at, n: pieces.append(at[:n]) or 1)
        how, result = CallOptions(ctypes.sizeof(CallOptions), form=TEXT, most=40), Result(ctypes.sizeof(Result))
        status = library.c.gori_stream(runner.handle, b"Pier 39", ctypes.byref(how), stop, None, ctypes.byref(result))
        assert (status, len(pieces)) in ((CANCELLED, 1), (OK, 0))
        assert runner.call("Pier 39")[0].startswith("[")


def test_facts_are_the_artifacts(et: Path, library: Library) -> None:
    with Runner(library, et) as runner:
        facts = Facts(ctypes.sizeof(Facts))
        library.check(library.c.gori_describe(runner.handle, ctypes.byref(facts)))
        assert (facts.vocabulary, facts.context, facts.chunk) == (360, CONTEXT, CHUNK)
        assert (facts.functions, facts.threads, facts.prefix_tokens) == (3, 1, 1)


def test_a_pool_of_another_size_is_refused(et: Path, library: Library) -> None:
    with Runner(library, et), pytest.raises(RunnerError, match="use that many"):
        Runner(library, et, threads=3)
