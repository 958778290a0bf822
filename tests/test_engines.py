"""What every engine's session must do, whatever the format: the checkpoint's logits by prefill and by decode, at every
length of chunk and context, back to a prefix, beside another session, on two threads, and at the vocabulary's edges.

The tests of one format are in its own file. tflite-runtime needs the environment that docs/litert.md makes.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gori import quantized
from gori.errors import GoriError, MissingEngine
from gori.export import parity
from gori.export.golden import greedy
from gori.export.weights import Options, read_weights
from gori.runtime import tflite
from gori.runtime.eager import EagerSession, session_of
from gori.runtime.session import Session, Snapshot
from gori.targets import TARGETS
from students import CHUNK, CONTEXT, LLAMA3, Case, of, write_checkpoint


def missing_tflite() -> str:
    try:
        tflite.check()
    except MissingEngine as e:
        return str(e)
    return ""


SKIP = pytest.mark.skipif(bool(missing_tflite()), reason=missing_tflite() or "there")
NAMES = ("executorch", "litert", "tflite", "gguf", "coreml")
ENGINES = [pytest.param(n, marks=SKIP if n == "tflite" else ()) for n in NAMES]
THREADED = [pytest.param(n, marks=SKIP if n == "tflite" else ()) for n in ("litert", "tflite", "gguf")]
V = 200
CASES = {
    "float": Case(of("llama", layers=2, rope_scaling=LLAMA3), "float"),
    "integers": Case(of("qwen3", layers=2), "w8a8-channel"),
}
LENGTHS = {"chunk 1": (20, 1), "context is chunk + 1": (17, 16), "the smallest of all": (2, 1)}
CLOSE = {"float32": 1e-5, "float16": 1e-2}
"""Largest difference over the largest logit. Nothing is rounded in a float export: engines were 1.4e-6 off at most, and
3.1e-3 in float16."""

Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(target, case, context, chunk) → (checkpoint, directory with the engine's file), each made once."""
    root, found = tmp_path_factory.mktemp("engines"), dict[object, Path]()

    def once(name: str, case: str = "float", context: int = CONTEXT, chunk: int = CHUNK) -> tuple[Path, Path]:
        if case not in found:
            found[case] = write_checkpoint(CASES[case], root / case)
        source, key = found[case], (name, case, context, chunk)
        if key not in found:
            found[key] = root / "-".join(map(str, key))
            found[key].mkdir()
            writer = importlib.import_module(TARGETS[name].writer)
            writer.write(read_weights(source), found[key], Options(source, context, chunk, 1, (2, 3)))
            shutil.copyfile(source / "config.json", found[key] / "config.json")
        return source, found[key]

    return once


def opened(name: str, directory: Path, threads: int | None = None) -> Session:
    module, _, function = TARGETS[name].opener.partition(":")
    return getattr(importlib.import_module(module), function)(directory, threads)


def reference(name: str, source: Path, context: int = CONTEXT) -> EagerSession:
    return session_of(quantized.load(source, rounding=TARGETS[name].activations), source, context)


def assert_same(name: str, got: object, want: object) -> None:
    largest = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got, want, atol=CLOSE[TARGETS[name].arithmetic] * largest, rtol=0)


def tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ENGINES)
def test_prefill_and_decode_give_the_checkpoints_logits_within_its_noise_floor(
    name: str, case: str, made: Made
) -> None:
    source, out = made(name, case)
    prompts = parity.default_prompts(V, CONTEXT, CHUNK, seed=7)
    assert {len(p) for p in prompts} >= {1, CHUNK - 1, CHUNK, CHUNK + 1, CONTEXT}
    model = quantized.load(source, rounding=TARGETS[name].activations)
    found = parity.measure_parity(opened(name, out), model, prompts, TARGETS[name].arithmetic)
    assert found.met, parity.describe(found)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ENGINES)
def test_greedy_tokens_are_the_eager_references_up_to_its_noise(name: str, case: str, made: Made) -> None:
    source, out = made(name, case)
    eager, session = reference(name, source), opened(name, out)
    for prompt in ([5], tokens(17), tokens(CHUNK, seed=4)):
        answer = greedy(session, prompt, ())
        assert len(set(answer)) > 1
        # the likeliest token of the reference behind the same tokens; of two that its own noise cannot tell apart,
        # either: which one is taken depends on the processor
        eager.reset()
        logits = eager.prefill(prompt)
        for token in answer:
            assert logits[token] >= logits.max() - 2 * CLOSE[TARGETS[name].arithmetic] * np.abs(logits).max()
            logits = eager.decode(token) if eager.length < CONTEXT else logits


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ENGINES)
def test_every_length_is_computed_to_the_last_row_and_one_more_is_refused(name: str, lengths: str, made: Made) -> None:
    context, chunk = LENGTHS[lengths]
    source, out = made(name, context=context, chunk=chunk)
    session, eager, ids = opened(name, out), reference(name, source, context), tokens(context)
    assert (session.info.context, session.info.chunk) == (context, chunk)
    want = [eager.decode(i) for i in ids]
    assert_same(name, session.prefill(ids), want[-1])
    with pytest.raises(GoriError, match=f"{context} tokens are in the context and 1 more exceed its {context}"):
        session.decode(7)
    session.reset()
    assert_same(name, [session.decode(i) for i in ids], want)
    session.restore(Snapshot(tuple(ids[: context // 2])))
    assert_same(name, session.prefill(ids[context // 2 :]), want[-1])


@pytest.mark.parametrize("name", ENGINES)
def test_a_prefill_in_pieces_is_the_prefill_of_the_whole(name: str, made: Made) -> None:
    source, out = made(name)
    session, ids = opened(name, out), tokens(CONTEXT)
    for start, end in ((0, 1), (1, 4), (4, 11), (11, 28), (28, 44)):
        logits = session.prefill(ids[start:end])
        assert_same(name, logits, reference(name, source).prefill(ids[:end]))


@pytest.mark.parametrize("name", ENGINES)
def test_a_restored_prefix_continues_as_before_even_after_it_was_overwritten(name: str, made: Made) -> None:
    session = opened(name, made(name)[1])
    session.prefill([5, 6, 7, 8])
    prefix = session.snapshot()
    want = session.decode(9)
    session.decode(10)
    session.restore(prefix)
    np.testing.assert_array_equal(session.decode(9), want)
    session.reset()
    other = session.prefill([11, 12, 13, 14, 9])
    assert np.abs(other - want).max() > 0.1  # the prefix matters
    session.restore(prefix)
    assert_same(name, session.decode(9), want)


@pytest.mark.parametrize("name", ENGINES)
def test_two_sessions_of_one_file_share_nothing(name: str, made: Made) -> None:
    out = made(name)[1]
    alone = opened(name, out)
    alone.prefill([5, 6, 7])
    want = alone.decode(8)
    one, two = opened(name, out), opened(name, out)
    one.prefill([5, 6, 7])
    two.prefill([100, 101, 102])
    np.testing.assert_array_equal(one.decode(8), want)
    assert np.abs(two.decode(8) - want).max() > 0.1
    two.restore(Snapshot((5, 6, 7)))
    assert_same(name, two.decode(8), want)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ENGINES)
def test_the_first_and_the_last_token_are_read_and_those_beyond_are_refused(name: str, case: str, made: Made) -> None:
    source, out = made(name, case)
    session, eager = opened(name, out), reference(name, source)
    for token in (0, V - 1):
        for s in (session, eager):
            s.reset()
        # one token: rounded inputs are alike, too
        want, got = eager.prefill([token]), session.prefill([token])
        assert got.shape == (V,)
        assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    session.reset()
    for token in (-1, V):
        with pytest.raises(GoriError, match=f"token id {token} is outside the vocabulary 0..{V - 1}"):
            session.prefill([5, token])
    assert session.length == 0


@pytest.mark.parametrize("name", THREADED)
def test_two_threads_compute_what_one_does(name: str, made: Made) -> None:
    out, ids = made(name)[1], tokens(30)
    one, two = opened(name, out, 1), opened(name, out, 2)
    assert (one.info.threads, two.info.threads) == (1, 2)
    assert_same(name, two.prefill(ids), one.prefill(ids))
    assert_same(name, two.decode(9), one.decode(9))


def test_two_threads_of_executorch_in_a_process_of_their_own_compute_what_one_does(made: Made, tmp_path: Path) -> None:
    out, ids = made("executorch")[1], tokens(30)
    code = (
        "import sys, numpy as np; from gori.runtime.session import open_session; "
        f"s = open_session({str(out)!r}, threads=2); assert s.info.threads == 2; "
        f"np.save({str(tmp_path / 'two.npy')!r}, [s.prefill({ids}), s.decode(9)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one = opened("executorch", out)
    assert_same("executorch", np.load(tmp_path / "two.npy"), [one.prefill(ids), one.decode(9)])
