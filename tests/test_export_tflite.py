"""A .tflite for tflite-runtime 2.14 against the eager model, run in that runtime's own environment.

What runs it needs the environment that docs/litert.md makes; without it those tests are skipped, with the commands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gori import quantized
from gori.errors import GoriError, MissingEngine
from gori.export import litert, parity, tflite
from gori.export.build import export
from gori.export.contents import compare
from gori.export.litert_read import read
from gori.export.weights import Options, Weights, read_weights, wanted
from gori.runtime import tflite as runtime
from gori.runtime.eager import session_of
from gori.runtime.generate import generate
from gori.runtime.litert import open_litert
from gori.runtime.session import open_session
from gori.targets import TARGETS
from students import CHUNK, CONTEXT, LLAMA3, Case, of, write_checkpoint

ROW = TARGETS["tflite"]
CASES = {
    "qwen2, shared table": Case(of("qwen2"), "w8a8-channel"),
    "qwen3, tied but apart": Case(of("qwen3", layers=2), "w8a16-channel", "w8-g32"),
    "llama float, rope scaling, untied": Case(of("llama", rope_scaling=LLAMA3, tied=False), "float"),
}


def missing() -> str:
    try:
        runtime.interpreter()
    except MissingEngine as e:
        return str(e)
    return ""


needs_runtime = pytest.mark.skipif(bool(missing()), reason=missing() or "there")


def write(source: Path, out: Path) -> Weights:
    out.mkdir()
    weights = read_weights(source)
    tflite.write(weights, out, Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    return weights


@needs_runtime
@pytest.mark.parametrize("case", CASES)
def test_the_old_runtime_gives_the_checkpoints_logits_and_greedy_tokens(case: str, tmp_path: Path) -> None:
    source, out = write_checkpoint(CASES[case], tmp_path / "c"), tmp_path / "out"
    export("tflite", source, out, context=CONTEXT, chunk=CHUNK)
    session, model = open_session(out), quantized.load(source, rounding=ROW.activations)
    assert (session.info.engine, session.info.engine_version) == ("tflite-runtime", runtime.VERSION)
    found = parity.measure_parity(session, model, parity.default_prompts(200, CONTEXT, CHUNK, seed=7))
    assert found.met, parity.describe(found)
    answers = []
    for s in (session_of(model, source, CONTEXT), session):
        s.reset()
        answers.append(list(generate(s, list(range(20, 37)), (), max_new=24)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("table", ROW.tables)
@pytest.mark.parametrize("linears", ROW.linears)
def test_every_scheme_of_the_row_is_held_exactly(linears: str, table: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("llama"), linears, table), tmp_path / "c")
    weights = write(source, tmp_path / "out")
    assert compare(read(tmp_path / "out"), wanted(weights), "model.tflite") == len(wanted(weights))
    # LiteRT runs the file, too: what it computes is not particular to the old runtime
    prompts = [[i] for i in range(5)] + [list(range(40)), list(range(60, 77))]
    session = open_litert(tmp_path / "out" / "model.tflite", 1)
    found = parity.measure_parity(session, quantized.load(source, rounding=ROW.activations), prompts)
    assert found.met, parity.describe(found)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(CASES["qwen2, shared table"], tmp_path / "c")
    for name in ("a", "b"):
        write(source, tmp_path / name)
    a, b = ((tmp_path / name / "model.tflite").read_bytes() for name in ("a", "b"))
    assert a == b
    table = read_weights(source).integers["model.embed_tokens.weight"].q.numpy().tobytes()
    assert a.count(table) == 1


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8-channel", "w8a8-g32"])
def test_a_scheme_that_the_old_runtime_does_not_hold_is_refused(scheme: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("llama"), scheme), tmp_path / "c")
    with pytest.raises(GoriError, match=r"tflite-runtime 2.14 does not hold .*quantize with one of w8a8-channel"):
        export("tflite", source, tmp_path / "out")


def test_without_its_environment_the_commands_that_make_it_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(write_checkpoint(CASES["qwen2, shared table"], tmp_path / "c"), tmp_path / "out")
    monkeypatch.setenv(runtime.ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(MissingEngine, match=r"none is none: run `python3.11 -m venv .*==2.14.0 'numpy<2'`"):
        open_session(tmp_path / "out")
    with pytest.raises(MissingEngine):
        runtime.check()


def test_an_environment_without_the_runtime_is_refused_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(write_checkpoint(CASES["qwen2, shared table"], tmp_path / "c"), tmp_path / "out")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    monkeypatch.setenv(runtime.ENVIRONMENT, str(tmp_path / "venv"))
    with pytest.raises(MissingEngine, match=r"venv has no tflite-runtime 2.14.0 .ModuleNotFoundError: No module named"):
        open_session(tmp_path / "out")
    with pytest.raises(MissingEngine, match="venv has no tflite-runtime"):
        runtime.check()


@needs_runtime
def test_a_file_for_litert_is_refused_by_the_old_runtime_in_one_sentence(tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("llama"), "w4a8-g32"), tmp_path / "c")
    (tmp_path / "out").mkdir()
    litert.write(read_weights(source), tmp_path / "out", Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    with pytest.raises(
        GoriError, match=r"tflite-runtime 2.14 does not run .*export it again with --target tflite"
    ) as e:
        runtime.open_directory(tmp_path / "out", 1)
    assert "\n" not in str(e.value)


@needs_runtime
def test_with_its_environment_nothing_is_missing() -> None:
    runtime.check()


@needs_runtime
def test_a_worker_that_does_not_answer_in_time_is_ended(tmp_path: Path) -> None:
    write(write_checkpoint(CASES["qwen2, shared table"], tmp_path / "c"), tmp_path / "out")
    with pytest.raises(GoriError, match="did not answer within 0 s and was ended"):
        runtime.Worker(tmp_path / "out" / "model.tflite", 1, longest_s=0)


@needs_runtime
def test_a_worker_that_dies_is_reported_and_the_last_one_goes_with_its_session(tmp_path: Path) -> None:
    write(write_checkpoint(CASES["qwen2, shared table"], tmp_path / "c"), tmp_path / "out")
    session = runtime.open_directory(tmp_path / "out", 1)
    assert np.isfinite(session.prefill([5, 6, 7])).all()
    process = session._worker._process
    process.kill()
    with pytest.raises(GoriError, match=r"the process that runs .* is gone"):
        session.decode(8)
    other = runtime.open_directory(tmp_path / "out", 1)
    process = other._worker._process
    del other
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
