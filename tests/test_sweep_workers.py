"""A sweep's driver and its processes: what dies, fails or is elsewhere at work; nothing finished runs again."""

from __future__ import annotations

import collections
import threading
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import METHODS, candidate, run, setting

from gori.errors import GoriError
from gori.quantize.budget import parse
from gori.quantize.journal import Journal, held
from gori.quantize.schemes import SCHEMES
from gori.quantize.search import grid, optuna
from gori.quantize.sweep import Sweep, measure_speeds
from gori.quantize.workers import MACHINE, Local


def swept(out: Path, methods: tuple[str, ...], workers: int = 2, **more: Any) -> Sweep:
    """A whole sweep over methods of sweep_runs."""
    engine = Local(run, workers)
    try:
        sweep = Sweep(setting(out), Journal(out), engine, **more)
        sweep.run(grid([candidate(m) for m in methods]))
    finally:
        engine.close()
    return sweep


def by_method(sweep: Sweep) -> dict[str, dict[str, Any]]:
    return {r["candidate"]["method"]: r for r in sweep.rows()}


def ran(out: Path) -> collections.Counter[str]:
    return collections.Counter(line.split()[0] for line in (out / "ran.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return swept(tmp_path_factory.mktemp("sweep"), METHODS)


def test_a_candidate_that_fails_is_a_row_with_its_error_and_ends_nothing(everything: Sweep) -> None:
    errors = {m: r["error"] for m, r in by_method(everything).items()}
    assert errors == {
        "plain": None,
        "slow": None,
        "noisy": None,
        "gori-error": "group size 32 does not divide 100: choose another",
        "bug": "ZeroDivisionError: float division by zero (more in its log.txt)",
        "killed": "its process ended by signal SIGKILL: not enough memory? try fewer --workers",
        "exits": "its process ended by exit code 7",
        "nan": "its kl_mean is nan: it computes nothing",
    }
    assert {r["state"] for m, r in by_method(everything).items() if errors[m]} == {"failed"}
    assert ran(everything.setting.out) == collections.Counter(METHODS)


def test_what_a_candidate_says_is_in_its_log(everything: Sweep) -> None:
    logs = {t.candidate.method: (t.directory / "log.txt").read_text() for t in everything.tasks.values()}
    assert logs["noisy"] == "said by native code\n"
    assert "ZeroDivisionError" in logs["bug"]
    assert "Traceback" in logs["bug"]


def test_a_second_sweep_runs_nothing_and_only_retry_failed_runs_what_failed(everything: Sweep) -> None:
    out = everything.setting.out
    assert by_method(swept(out, METHODS)) == by_method(everything)
    assert ran(out) == collections.Counter(METHODS)
    again = swept(out, ("plain", "gori-error"), workers=1, retry_failed=True)
    assert again.journal.state.started[everything.setting.task(candidate("gori-error")).key] == 2
    assert ran(out) == collections.Counter([*METHODS, "gori-error"])


def test_a_candidate_that_another_process_has_is_waited_for(tmp_path: Path) -> None:
    task = setting(tmp_path).task(candidate("plain"))
    other = Journal(tmp_path)
    free = threading.Event()

    def hold() -> None:
        with held(task.lock, wait=True):
            held_now.set()
            free.wait(20)
            other.append("done", task.key, metrics={"size_bytes": 1}, seconds=2.0, artifact="elsewhere")

    held_now = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held_now.wait(20)
    seen: list[int] = []

    def show(rows: list[Any], running: list[Any]) -> None:
        seen.append(len(running))
        if rows and seen[-1] == 0:  # all but the held one are finished, and nothing is at work
            free.set()

    sweep = swept(tmp_path, ("plain", "slow"), workers=1, show=show)
    thread.join()
    assert by_method(sweep)["plain"]["artifact"] == "elsewhere"
    assert ran(tmp_path) == {"slow": 1}


def test_two_drivers_share_the_work(tmp_path: Path) -> None:
    methods = ("plain", "slow", "noisy", "gori-error")
    found: list[Sweep] = []
    threads = [threading.Thread(target=lambda: found.append(swept(tmp_path, methods, workers=1))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert by_method(found[0]) == by_method(found[1])
    assert set(by_method(found[0])) == set(methods)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert sum('"event": "done"' in line or '"event": "failed"' in line for line in lines) == len(methods)


def test_optuna_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    some = [candidate("plain", s) for s in list(SCHEMES)[:20]]

    def until(rows: list[Any], running: list[Any]) -> None:
        if len(rows) > 8:  # in the second generation
            raise KeyboardInterrupt

    def searched(out: Path, show: Any) -> list[str]:
        engine = Local(run, 1)
        try:
            sweep = Sweep(setting(out), Journal(out), engine, show)
            sweep.run(optuna(some, 12, 5, parse("kl=0.05"), "tpe"))
        finally:
            engine.close()
        return list(sweep.tasks)

    whole = searched(tmp_path / "whole", lambda rows, running: None)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", until)
    assert searched(tmp_path / "cut", lambda rows, running: None) == whole
    assert len(set(whole)) == len(whole) == 12
    assert ran(tmp_path / "cut")["plain"] in (12, 13)  # the one that was at work may have begun twice


def test_keys_differ_by_all_that_decides_and_integers_are_shared_between_targets(tmp_path: Path) -> None:
    import dataclasses

    base = setting(tmp_path)
    c = candidate("plain")
    others = [
        base.task(dataclasses.replace(c, **{k: v}))
        for k, v in (("scheme", "w8a16-g32"), ("method", "slow"), ("embedding", "float"), ("target", "litert"))
    ]
    others += [
        dataclasses.replace(base, **{k: v}).task(c)
        for k, v in (("hashes", {"student": "x"}), ("data", {"test": "x"}), ("samples", 17), ("seed", 1))
    ]
    keys = [base.task(c).key, *(t.key for t in others)]
    assert len(set(keys)) == len(keys)
    assert [t.candidate.target for t in others if t.integers_key == base.task(c).integers_key] == ["litert"]
    moved = dataclasses.replace(base, students={"renamed": Path("b")}, hashes={"renamed": "hash"})
    assert moved.task(dataclasses.replace(c, student="renamed")).key == keys[0]


def test_speeds_are_interleaved_medians_of_this_machine_and_continue(everything: Sweep) -> None:
    sweep = swept(everything.setting.out, ("plain", "noisy", "gori-error"))
    asked: list[str] = []

    def measure(artifact: Path, threads: int) -> dict[str, Any]:
        asked.append(artifact.parent.name)
        if len(asked) == 3:
            raise GoriError("engine gone")
        return {"rss_mib": None, "load_ms": 1.0, "prefill_tps": 10.0, "decode_tps": float(len(asked))}

    keys = [k for k, t in sweep.tasks.items() if t.candidate.method != "gori-error"]
    sweep.journal.append("speed", keys[0], machine="another", threads=1, decode_tps=1e9)
    measure_speeds(sweep, measure, "here", 1, 3)
    assert asked == [*keys, *keys, *keys]
    rows = {r["key"]: r["metrics"] for r in sweep.with_speeds("here", 1)}
    assert rows[keys[0]]["decode_tps"] == 3.0  # of 1 and 5: the error is no round
    assert rows[keys[1]]["decode_tps"] == 4.0
    assert rows[keys[0]]["speed_rounds"] == 2
    assert rows[keys[1]]["rss_mib"] is None
    measure_speeds(sweep, measure, "here", 1, 4)
    assert asked[6:] == keys
    assert "decode_tps" not in sweep.rows()[0]["metrics"]  # a search never sees them


def test_nobody_measures_while_a_candidate_is_worked_on(everything: Sweep) -> None:
    sweep = swept(everything.setting.out, ("plain",))
    begun, measured = threading.Event(), threading.Event()

    def measure(artifact: Path, threads: int) -> dict[str, Any]:
        begun.set()
        return dict.fromkeys(("rss_mib", "load_ms", "prefill_tps", "decode_tps"), 1.0)

    def measure_all() -> None:
        measure_speeds(sweep, measure, "there", 1, 1)
        measured.set()

    with held(everything.setting.out / MACHINE, wait=True, shared=True):
        thread = threading.Thread(target=measure_all)
        thread.start()
        assert not begun.wait(0.3)
    thread.join(20)
    assert measured.is_set()
