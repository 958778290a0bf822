"""A file's cost in a process of its own: what is counted, what is not, and what is not loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gori.runtime import measure
from gori.runtime.session import Logits, Session, SessionInfo

VOCABULARY, CONTEXT = 10, 40


class Scripted(Session):
    """An engine that takes a known time for each token of a call, once in a while far longer, and some memory."""

    def __init__(self, hold_mib: int = 0) -> None:
        super().__init__()
        facts = {"bos_id": None, "eos_ids": (), "threads": 1, "file_bytes": 1}
        self.info = SessionInfo("scripted", "1", "", VOCABULARY, CONTEXT, CONTEXT, **facts)  # type: ignore[arg-type]
        self.calls: list[int] = []
        self._held = np.ones(hold_mib * 2**17)

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        self.calls.append(len(ids))
        return np.zeros(VOCABULARY, dtype=np.float32)


def test_every_round_is_one_prompt_and_its_tokens_and_the_first_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    ticks = {"now": 0.0}

    def now() -> float:
        # between the two looks at the clock of one call pass 1 s, in the first round 100 s
        ticks["now"] += 1.0 if next(clock) >= 2 * 4 else 100.0
        return ticks["now"]

    monkeypatch.setattr(time, "perf_counter", now)
    session = Scripted()
    assert measure.times_ms(session, [1] * 20, [2, 3, 4], 5) == (1000.0, 3000.0)
    assert session.calls == [20, 1, 1, 1] * 6


def test_memory_is_what_came_after_the_library_and_the_prompt_fits_the_context(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "open_session", lambda path, threads: Scripted(hold_mib=64))
    monkeypatch.setattr(measure, "highest_mib", lambda: measure.resident_mib())  # the tests' own peak is higher
    found = measure.measure(tmp_path, 1)
    assert 60 < found["rss_mib"] < 80
    assert (found["prompt_tokens"], found["decode_tokens"]) == (CONTEXT // 2, CONTEXT // 2)


def test_it_runs_a_gguf_without_torch(artifact: Path) -> None:
    code = (
        "import sys\nfrom gori.runtime.measure import main\nmain(sys.argv[1:])\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine"] == "llama.cpp"
    assert 0 < found["rss_mib"] < found["peak_rss_mib"]
    assert found["rss_mib"] * 2**20 > (artifact / "model.gguf").stat().st_size
    assert min(found["load_ms"], found["prefill_tps"], found["decode_tps"]) > 0
