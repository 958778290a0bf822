"""The journal of a sweep: no whole line is ever lost, whatever byte its writer died at and whoever writes beside it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.errors import GoriError
from gori.quantize.journal import JOURNAL, Journal, State, held

EVENTS = st.tuples(st.sampled_from(["started", "done", "failed", "retry", "speed"]), st.sampled_from("abc"))


def lines(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / JOURNAL).read_bytes().split(b"\n") if line]


def replayed(events: list[dict[str, object]]) -> State:
    state = State()
    for e in events:
        state.take(e)
    return state


@given(st.lists(EVENTS, max_size=8), st.data())
def test_a_line_torn_at_any_byte_is_mended_and_no_other_is_touched(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str]], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    journal = Journal(directory)
    for kind, key in events:
        journal.append(kind, key, text="한 줄\n둘")
    before = (directory / JOURNAL).read_bytes() if events else b""
    whole = json.dumps({"event": "done", "key": "torn", "text": "반쪽"}, ensure_ascii=False).encode()
    cut = data.draw(st.integers(0, len(whole)))
    with open(directory / JOURNAL, "ab") as file:
        file.write(whole[:cut])
    after = Journal(directory)
    assert "torn" not in after.refresh().finished  # a reader leaves it: its writer may be at work
    assert after.append("started", "next")
    kept = (directory / JOURNAL).read_bytes()
    assert kept.startswith(before)
    assert [e["key"] for e in lines(directory)[len(before.splitlines()) :]] == [
        *(["torn"] * (cut == len(whole))),
        "next",
    ]
    assert Journal(directory).refresh() == after.state


def test_zeros_that_a_power_cut_leaves_behind_are_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("done", "a", metrics={})
    with open(journal.path, "ab") as file:
        file.write(bytes(40))
    journal.append("started", "b")
    assert [e["key"] for e in lines(tmp_path)] == ["a", "b"]


@given(st.lists(EVENTS, max_size=20))
def test_what_two_open_journals_know_is_what_the_file_says(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str]]
) -> None:
    directory = tmp_path_factory.mktemp("two")
    journals = (Journal(directory), Journal(directory))
    finished: dict[str, str] = {}
    for i, (kind, key) in enumerate(events):
        written = journals[i % 2].append(kind, key)
        if kind in ("done", "failed"):
            assert written == (key not in finished)
            finished.setdefault(key, kind)
        elif kind == "retry":
            assert written == (finished.get(key) == "failed")
            if written:
                del finished[key]
        else:
            assert written
    states = [j.refresh() for j in journals]
    assert states[0] == states[1]
    assert {k: e["event"] for k, e in states[0].finished.items()} == finished
    if events:
        assert states[0] == replayed(lines(directory))


WRITER = """
import sys
from pathlib import Path
from gori.quantize.journal import Journal
journal = Journal(Path(sys.argv[1]))
for i in range(int(sys.argv[3])):
    journal.append("speed", sys.argv[2], number=i, filler="x" * 3000)
    print(i, flush=True)
"""


def writer(directory: Path, key: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(directory), key, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_whole_lines_between_each_other(tmp_path: Path) -> None:
    writers = [writer(tmp_path, key, 40) for key in "ab"]
    for w in writers:
        w.communicate(timeout=60)
        assert w.returncode == 0
    state = Journal(tmp_path).refresh()
    assert {k: [e["number"] for e in es] for k, es in state.speeds.items()} == {k: list(range(40)) for k in "ab"}


def test_what_append_returned_from_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(5)
    for round_ in range(4):
        w = writer(tmp_path, str(round_), 10**6)
        assert w.stdout is not None
        w.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        w.kill()
        said = w.stdout.read().split()
        w.wait()
        w.stdout.close()
        kept = [e["number"] for e in Journal(tmp_path).refresh().speeds[str(round_)]]
        last = int(said[-1]) if said else 0
        assert kept[: last + 1] == list(range(last + 1))
        assert len(kept) <= last + 2  # one more may have been written before it was said
        assert Journal(tmp_path).append("started", f"after {round_}")


def test_a_line_that_is_no_event_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"event": "done", "key": "a"}\nhello\n{"event": "done", "key": "b"}\n')
    with pytest.raises(GoriError, match="byte 30 holds a line that is not JSON"):
        Journal(tmp_path).refresh()
    (tmp_path / JOURNAL).write_bytes(b"[1]\n")
    with pytest.raises(GoriError, match="without event and key"):
        Journal(tmp_path).append("done", "a")


def test_a_figure_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Journal(tmp_path).append("done", "a", metrics={"kl_mean": float("nan")})
    assert lines(tmp_path) == []


def test_a_lock_is_free_as_soon_as_its_holder_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom gori.quantize.journal import held\n"
        "with held(Path(sys.argv[1]), wait=True):\n print('got', flush=True)\n time.sleep(60)"
    )
    lock = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    with held(lock, wait=False) as got:
        assert not got
    with held(lock, wait=False, shared=True) as got:
        assert not got
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with held(lock, wait=False) as got:
        assert got
    with held(lock, wait=False, shared=True) as first, held(lock, wait=False, shared=True) as second:
        assert first
        assert second
