"""`gori bench`: rounds in turn, ratios of what was measured together, bytes that a step reads, threads that pay.

Time is scripted where a number is asserted; a real engine in real processes shows that the parts meet.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from gori.errors import GoriError
from gori.runtime import bench, bench_round, bench_threads
from gori.runtime.bench_report import text
from gori.runtime.session import Logits, Session, SessionInfo
from gori.runtime.step_bytes import StepBytes, step_bytes
from students import Case, of, write_checkpoint

CONTEXT, VOCABULARY = 40, 10


def measured(**changes: Any) -> bench.Round:
    """A round as a process prints it."""
    facts = {"engine": "e", "engine_version": "1", "threads": 1, "file_bytes": 9, "context": 40, "stand_in": False}
    sizes = {"load_ms": 8.0, "rss_mib": 4.0, "peak_rss_mib": 40.0}
    times = {"prefill_ms": {"8": [2.0]}, "first_token_ms": [3.0], "decode_ms": [1.0]}
    rest = {"prompt_skipped": [], "first_token_prompt": 8, "decode_tokens": 4}
    return {**facts, **sizes, **times, **rest, **changes}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reads 2 GB/s with one thread and 3 with two."""
    rates = {"1": 2.0, "2": 3.0}
    monkeypatch.setattr(
        bench, "bandwidth", lambda n: {"buffer_bytes": 1, "gb_per_s": {k: rates[k] for k in map(str, n)}}
    )


def of_speeds(label: str, times_ms: Sequence[float], said: list[str], path: Path | None = None) -> bench.Entry:
    """An entry whose decode takes the next time in each round, and everything else in proportion."""
    left = iter(times_ms)

    def measure() -> bench.Round:
        said.append(label)
        t = next(left)
        return measured(decode_ms=[t, t, 100.0], prefill_ms={"8": [2 * t]}, first_token_ms=[3 * t], load_ms=8 * t)

    return bench.Entry(label, measure, path)


def test_artifacts_take_turns_and_a_ratio_is_of_one_round(quiet: None) -> None:
    """What slows a round for both of them leaves no trace in the ratio, though the medians are of different rounds."""
    said: list[str] = []
    slow, fast = (4.0, 40.0, 8.0), (2.0, 16.0, 2.0)
    body = bench.compare([of_speeds("a", slow, said), of_speeds("b", fast, said)], 3)
    assert said == ["a", "b"] * 3
    a, b = body["artifacts"]
    assert "against_first" not in a
    assert (a["decode"]["p50_ms"], b["decode"]["p50_ms"]) == (8.0, 2.0)
    assert (b["decode"]["low_ms"], b["decode"]["high_ms"], b["decode"]["p95_ms"]) == (2.0, 16.0, 100.0)
    expected = {"median": 2.5, "low": 2.0, "high": 4.0, "best": 2.0}
    found = b["against_first"]
    assert [found[k] for k in ("decode", "first_token", "load")] == [expected] * 3
    assert found["prefill"] == {"8": expected}
    assert found["rss"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert a["prefill"]["8"]["tokens_per_second"] == 8 / 16.0 * 1e3


def test_what_only_one_of_them_has_is_not_compared(quiet: None) -> None:
    short = measured(prefill_ms={}, prompt_skipped=[8], rss_mib=None, peak_rss_mib=None, load_ms=None)
    entries = [bench.Entry("a", measured), bench.Entry("b", lambda: {**short, "first_token_ms": []})]
    body = bench.compare(entries, 2)
    found = body["artifacts"][1]["against_first"]
    assert (found["prefill"], found["rss"], found["load"], found["first_token"]) == ({}, None, None, None)
    lines = text(body).splitlines()
    assert "B: prompts of 8 tokens exceed the context of 40 and were not measured" in lines
    assert next(line for line in lines if line.startswith("memory")).split() == ["memory", "4.0", "MiB", "–", "–"]


def test_the_share_of_bandwidth_is_of_the_same_round_and_as_many_threads(
    quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "step_bytes", lambda _: StepBytes(1_000_000, 500_000, 100_000))
    entry = bench.Entry("a", lambda: measured(threads=2), Path())
    found = bench.compare([entry], 1)
    # 8 tokens, then 4: a step sees 9 to 12, 10.5 on average; 1.5 MB + 1.05 MB in 1 ms
    assert found["artifacts"][0]["step"]["bytes"] == 2_550_000
    assert found["artifacts"][0]["step"]["gb_per_s"] == 2.55
    assert found["artifacts"][0]["step"]["of_bandwidth"]["median"] == 0.85  # of 3 GB/s
    assert found["bandwidth"]["gb_per_s"] == {"1": 2.0, "2": 3.0}
    assert "A: a step reads 2.55 MB, 2.55 GB/s: 85% of it (85%–85%)" in text(found)


CASES = {
    "a table that is the head": Case(of("llama", layers=2), "w4a8-g32"),
    "a head of its own": Case(of("qwen3", layers=2, tied=False), "w4a8-g32", "w8-channel"),
    "mixed": Case(of("qwen2", kv_heads=4), "w8a8-channel", "w4-g32", {"down_proj": "w4a8-g64"}),
    "float": Case(of("llama", heads=4, kv_heads=1), "float"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_steps_bytes_are_those_of_the_tensors_on_disk_and_of_the_eager_models_cache(
    name: str, tmp_path: Path
) -> None:
    import torch

    from gori.model import KVCache

    case = CASES[name]
    found = step_bytes(write_checkpoint(case, tmp_path / "c"))
    assert isinstance(found, StepBytes)
    sizes: dict[str, int] = {}
    with safe_open(tmp_path / "c" / "model.safetensors", "np") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            name_of = key.removesuffix(".q").removesuffix(".scale")
            sizes[name_of] = sizes.get(name_of, 0) + file.get_tensor(key).nbytes
    table, head = sizes["model.embed_tokens.weight"], sizes.get("lm_head.weight")
    layers = sum(n for k, n in sizes.items() if k.endswith("_proj.weight"))
    assert found.linears == layers + (table if head is None else head)
    assert found.embedding_row == table // case.cfg.vocab_size
    cache = KVCache(case.cfg, batch=1, max_len=1)
    cache.append(0, *[torch.zeros(1, case.cfg.kv_heads, 1, case.cfg.head_dim)] * 2)
    assert found.cache_per_token == sum(t.nbytes for t in vars(cache).values() if hasattr(t, "nbytes"))


def test_a_step_of_unknown_size_says_why(tmp_path: Path) -> None:
    found = step_bytes(tmp_path / "model.gguf")
    assert found == "no config.json lies beside it"
    (tmp_path / "config.json").write_text('{"num_experts": 8}')
    assert "a mixture of 8 experts" in str(step_bytes(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(GoriError, match="lacks 'intermediate_size': export the model again"):
        step_bytes(tmp_path)


class Scripted(Session):
    """An engine that notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        facts = {"bos_id": None, "eos_ids": (), "threads": 1, "file_bytes": 1}
        self.info = SessionInfo("scripted", "1", "", VOCABULARY, CONTEXT, CONTEXT, **facts)  # type: ignore[arg-type]
        self.calls: list[tuple[int, int]] = []

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        self.calls.append((start, len(ids)))
        return np.zeros(VOCABULARY, dtype=np.float32)


def test_a_round_times_each_prompt_and_an_answer_after_one_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_round, "LONG_ENOUGH_S", 0.0)
    session = Scripted()
    found = bench_round.time_session(session, [8, 40], 6, 3)
    answer = [(0, 6), (6, 1), (7, 1), (8, 1)]
    assert session.calls == [(0, 8)] * 3 + [(0, 40)] * 3 + answer * 3
    assert {n: len(times) for n, times in found["prefill_ms"].items()} == {"8": 2, "40": 2}
    assert (len(found["first_token_ms"]), len(found["decode_ms"])) == (2, 6)


def test_what_is_quick_is_repeated_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = itertools.count(0.0, 0.2)
    monkeypatch.setattr(bench_round.time, "perf_counter", lambda: next(clock))
    assert len(bench_round.repeated(lambda: 1)) == bench_round.FEWEST + 1
    monkeypatch.setattr(bench_round.time, "perf_counter", lambda: 0.0)
    assert len(bench_round.repeated(lambda: 1)) == bench_round.MOST


@pytest.mark.parametrize(
    ("call_ms", "chosen"),
    [
        ({1: 10.0, 2: 6.0, 3: 5.0, 4: 7.0}, 3),
        ({1: 10.0, 2: 9.8, 3: 11.0, 4: 12.0}, 1),
        ({1: 30.0, 2: 10.2, 3: 10.0, 4: 10.1}, 2),
    ],
)
def test_the_fewest_threads_are_chosen_that_are_as_good_as_the_fastest(
    call_ms: dict[int, float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def one(path: Path, threads: int | None, prompts: Sequence[int], decoded: int) -> bench.Round:
        assert threads is not None
        asked.append(threads)
        share = call_ms[threads] / 2
        return measured(first_token_ms=[share], decode_ms=[share / decoded] * decoded)

    monkeypatch.setattr(bench_threads, "cores", lambda: 4)
    found = bench_threads.choose(Path(), one)
    assert found["chosen"] == chosen
    assert found["call_ms"] == {str(n): pytest.approx(t) for n, t in call_ms.items()}
    assert asked == [1, 2, 3, 4] * bench_threads.ROUNDS


@given(st.integers(1, 300))
def test_every_machine_tries_one_thread_and_all(most: int) -> None:
    found = bench_threads.counts(most)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, most)
    assert set(range(1, min(most, 4) + 1)) <= set(found)
    # no gap wider than twofold
    assert all(b <= 2 * a for a, b in itertools.pairwise(found))


def run_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_files_are_measured_in_processes_of_their_own(
    artifact: Path, copy: Path, gori: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    options = ("--rounds", 2, "--prompt", 8, "--prompt", 500, "--decode", 4)
    body = run_json(gori("bench", artifact, "--against", copy / "model.gguf", "--threads", 1, *options, "--json"))
    assert body["rounds"] == 2
    one, other = body["artifacts"]
    assert (one["path"], other["path"]) == (str(artifact), str(copy / "model.gguf"))
    for a in (one, other):
        assert (a["engine"], a["threads"], a["prompt_skipped"], a["decode_tokens"]) == ("llama.cpp", 1, [500], 4)
        assert list(a["prefill"]) == ["8"]
        assert min(a["decode"]["p50_ms"], a["first_token"]["p50_ms"], a["load_ms"], a["prefill"]["8"]["p50_ms"]) > 0
        # had the two shared a process, the second would have found its memory taken already
        assert a["rss_mib"] * 2**20 > a["file_bytes"]
    assert set(other["against_first"]) == {"prefill", "decode", "first_token", "load", "rss"}
    assert 0.5 < other["against_first"]["rss"]["median"] < 2
    assert body["bandwidth"]["gb_per_s"]["1"] > 0


def test_auto_says_what_it_measured_and_uses_it(
    artifact: Path, gori: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    body = run_json(gori("bench", artifact, "--threads", "auto", "--rounds", 1, "--prompt", 8, "--decode", 2, "--json"))
    (found,) = body["artifacts"]
    choice = found["thread_choice"]
    assert list(choice["call_ms"]) == [str(n) for n in bench_threads.counts(body["cores"])]
    assert found["threads"] == choice["chosen"]


@pytest.mark.slow
def test_litert_lm_times_its_own_bundle(toy_tokenizer: Path, tmp_path: Path) -> None:
    from gori.export.build import export

    source = write_checkpoint(Case(of("qwen3", vocab_size=360, max_position=96), "w4a8-g32"), tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(toy_tokenizer / name, source / name)
    export("litert", source, tmp_path / "out", context=96, chunk=32)
    found = bench.one_round(tmp_path / "out" / "model.litertlm", 1, [8, 500], 4)
    assert (found["engine"], list(found["prefill_ms"]), found["prompt_skipped"]) == ("LiteRT-LM", ["8"], [500])
    assert 1 <= found["decode_tokens"] <= 4
    assert min(found["load_ms"], *found["prefill_ms"]["8"], *found["first_token_ms"], *found["decode_ms"]) > 0
    assert bench.entry(tmp_path / "out" / "model.litertlm", 1, [8], 4).path is not None


def test_what_cannot_be_run_is_refused_before_anything_is_measured(
    artifact: Path, copy: Path, tmp_path: Path, gori: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = gori("bench", artifact, "--against", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"gori: {tmp_path / 'nowhere'} is nothing that gori runs")
    shutil.copyfile(copy / "config.json", copy / "model.gguf")
    done = gori("bench", copy)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"gori: {copy} could not be measured: {copy}/model.gguf is not a GGUF"
    )
    assert gori("bench", artifact, "--threads", "0").returncode == 2
