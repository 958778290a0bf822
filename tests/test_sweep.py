"""`gori sweep` on a real, tiny student: exported to GGUF, run by llama.cpp, cut off, shared, failed, continued."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gori.artifact import read_manifest
from gori.calls import read_tools
from gori.data import read_conversations
from gori.quantize.journal import JOURNAL
from gori.runtime.evaluation import compare
from gori.runtime.session import open_session
from gori.tokenizer import copy_files
from students import Case, of, write_checkpoint

SPEEDS = {"rss_mib", "load_ms", "prefill_tps", "decode_tps"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    """A float student that knows the toy task's tokens and nothing else."""
    out = write_checkpoint(Case(of("qwen3", vocab_size=360), "float"), tmp_path_factory.mktemp("sweep") / "student")
    copy_files(toy_tokenizer, out)
    return out


def command(student: Path, toy: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(toy / "test.jsonl"), "--calibration", str(toy / "train.jsonl")]
    space = ["--target", "gguf", "--schemes", "w4a16-g32,w8a16-channel", "--methods", "rtn", "--embeddings", "matching"]
    return [sys.executable, "-m", "gori", "sweep", str(student), "--out", str(out), *data, *space, *more]


def start(*arguments: Any) -> subprocess.Popen[str]:
    """In a session of its own, so that a kill of the group reaches every process of it."""
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def events(out: Path) -> list[dict[str, Any]]:
    path = out / JOURNAL
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of table.json without what no two runs have in common."""
    rows = json.loads((out / "table.json").read_text())["rows"]
    for row in rows:
        row.pop("seconds")
        row["metrics"] = {k: v for k, v in row["metrics"].items() if k not in SPEEDS}
    return sorted(rows, key=lambda r: r["key"])


def check_once(out: Path) -> None:
    """Each candidate was finished once, and nothing of it made again afterwards."""
    finished = [e["key"] for e in events(out) if e["event"] in ("done", "failed")]
    assert len(finished) == len(set(finished)) == len(table(out))
    for e in (e for e in events(out) if e["event"] == "done"):
        assert all(
            read_manifest(d)["finished"] <= e["at"] for d in (out / "candidates" / e["key"]).iterdir() if d.is_dir()
        )
        after = [x["event"] for x in events(out) if x["key"] == e["key"] and x["at"] > e["at"]]
        assert "started" not in after


@pytest.fixture(scope="module")
def shared(student: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which two sweeps worked at once."""
    out = tmp_path_factory.mktemp("shared") / "sweep"
    both = [start(student, toy, out, "--workers", "1", "--rounds", "2") for _ in range(2)]
    for p in both:
        _, said = p.communicate(timeout=300)
        assert p.returncode == 0, said
    return out


def test_two_sweeps_at_once_share_the_work(shared: Path) -> None:
    check_once(shared)
    assert {r["state"] for r in table(shared)} == {"done"}
    speeds = [(e["key"], e["round"]) for e in events(shared) if e["event"] == "speed"]
    assert sorted(speeds) == sorted((r["key"], i) for r in table(shared) for i in range(2))
    rounds = [i for _, i in speeds]
    assert rounds == sorted(rounds)  # interleaved: every candidate once before any twice


def test_a_row_says_what_its_file_is(shared: Path, student: Path, toy: Path) -> None:
    (row,) = [r for r in json.loads((shared / "table.json").read_text())["rows"] if r["candidate"]["scheme"][1] == "4"]
    artifact, m = shared / row["artifact"], row["metrics"]
    assert m["size_bytes"] == (artifact / "model.gguf").stat().st_size
    assert open_session(artifact).info.engine == "llama.cpp"
    assert m["rows"] == len((toy / "test.jsonl").read_text().splitlines())
    assert all(m[name] > 0 for name in SPEEDS)
    rows = read_conversations(toy / "test.jsonl", read_tools(toy / "tools.json"))
    through_engine = compare(artifact, student, rows)
    # the reference there is the float student that rounds as llama.cpp does, here the float student itself
    assert m["kl_mean"] == pytest.approx(through_engine["kl_mean"], rel=0.05)
    assert m["answer_tokens"] == through_engine["answer_tokens"]


def test_the_report_is_there_in_three_forms(shared: Path) -> None:
    body = json.loads((shared / "table.json").read_text())
    with open(shared / "table.csv", newline="", encoding="utf-8-sig") as file:
        assert {r["key"] for r in csv.DictReader(file)} == {r["key"] for r in body["rows"]}
    assert "<svg" in (shared / "report.html").read_text()
    winner = json.loads((shared / "winner.json").read_text())
    assert winner["key"] == body["winner"]
    assert (shared / winner["artifact"] / "manifest.json").exists()


def cut_off(arguments: tuple[Any, ...], when: Callable[[], bool], whole_group: bool) -> None:
    """Start the sweep and kill it as soon as `when` holds: its driver alone, or all of its processes."""
    p = start(*arguments)
    try:
        while p.poll() is None and not when():
            time.sleep(0.02)
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL) if whole_group else p.kill()
    finally:
        p.communicate()


def test_killed_at_every_stage_and_continued_it_comes_to_the_same_table(
    student: Path, toy: Path, tmp_path: Path, shared: Path
) -> None:
    out = tmp_path / "sweep"
    arguments = (student, toy, out, "--workers", "1", "--rounds", "2")

    def seen(kind: str, count: int) -> Callable[[], bool]:
        return lambda: sum(e["event"] == kind for e in events(out)) >= count

    cut_off(arguments, lambda: any(out.glob("quantized/*/manifest.json")), whole_group=False)
    cut_off(arguments, seen("done", 1), whole_group=True)
    cut_off(arguments, seen("speed", 1), whole_group=False)
    p = start(*arguments)
    _, said = p.communicate(timeout=300)
    assert p.returncode == 0, said
    check_once(out)
    assert table(out) == table(shared)


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_comes_to_the_same_table(
    student: Path, toy: Path, tmp_path: Path, shared: Path
) -> None:
    out, chance = tmp_path / "sweep", random.Random(7)
    arguments = (student, toy, out, "--workers", "2", "--rounds", "2")
    began = time.monotonic()
    p = start(student, toy, tmp_path / "whole", "--workers", "2", "--rounds", "2")
    p.communicate(timeout=600)
    takes_s = time.monotonic() - began
    for i in range(10):
        until = time.monotonic() + chance.uniform(0, takes_s)
        cut_off(arguments, lambda until=until: time.monotonic() > until, whole_group=i % 2 == 0)
    p = start(*arguments)
    _, said = p.communicate(timeout=600)
    assert p.returncode == 0, said
    check_once(out)
    assert table(out) == table(shared)


def test_a_failed_candidate_is_in_the_table_and_a_budget_that_none_fits_is_exit_3(
    student: Path, toy: Path, tmp_path: Path, shared: Path
) -> None:
    """Of a finished sweep the integers of one candidate are taken away, and something else lies in their place."""
    out = Path(shutil.copytree(shared, tmp_path / "sweep"))
    bad = next(r for r in table(out) if r["candidate"]["scheme"] == "w8a16-channel")
    shutil.rmtree(out / "candidates" / bad["key"])
    kept = [e for e in events(out) if e["key"] != bad["key"]]
    (out / JOURNAL).write_text("".join(json.dumps(e) + "\n" for e in kept))
    for directory in (out / "quantized").iterdir():
        if directory.is_dir() and read_manifest(directory)["name"] == "w8a16-channel":
            (directory / "manifest.json").unlink()
    p = start(student, toy, out, "--workers", "1", "--rounds", "2", "--budget", "size=1kB,kl=1", "--json")
    said, logged = p.communicate(timeout=300)
    assert p.returncode == 3
    body = json.loads(said)
    (failed,) = [r for r in body["rows"] if r["state"] == "failed"]
    assert failed["key"] == bad["key"]
    assert "holds files but no manifest.json of gori's" in failed["error"]
    assert body["winner"] is None
    assert not (out / "winner.json").exists()
    assert "none of 1 candidates fits size=1kB,kl=1; nearest: w4a16-g32" in logged.splitlines()[-1]
    assert failed["error"] in (out / "report.html").read_text().replace("&#39;", "'")


def test_other_rows_or_another_seed_are_other_candidates(
    student: Path, toy: Path, tmp_path: Path, shared: Path
) -> None:
    from gori.quantize.sweep_commands import prepared, read

    def keys(data: Path, **changes: Any) -> set[str]:
        options = {
            "targets": ("gguf",), "schemes": ("w4a16-g32",), "methods": ("rtn",), "embeddings": ("matching",),
            "bits_per_weight": (), "budget": None, "search": "grid", "seed": 0, "samples": None, "rows": 600,
            "data": (data,), "calibration": (toy / "train.jsonl",), **changes,
        }  # fmt: skip
        request = read({"student": student}, options)
        setting, _ = prepared(request, tmp_path / "sweep")
        return {setting.task(c).key for c in request.candidates}

    same = keys(toy / "test.jsonl")
    assert same < {r["key"] for r in table(shared)}
    assert not same & keys(toy / "dev.jsonl")
    assert not same & keys(toy / "test.jsonl", seed=1)
    assert not same & keys(toy / "test.jsonl", samples=8)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "coreml"], "Core ML does not run here"),
        (["--budget", "sise=1MB"], "did you mean 'size'"),
        (["--schemes", "w4a16-g31"], "is unknown"),
        (["--students"], "--students sizes the students of one recipe for a budget"),
        (["--students", "--dry-run"], "--dry-run goes with checkpoints"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(
    student: Path, toy: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    from click.testing import CliRunner

    from gori.errors import GoriError
    from gori.quantize.sweep_commands import sweep

    found = CliRunner().invoke(sweep, [str(student), "--out", str(tmp_path / "out"), *more])
    assert isinstance(found.exception, GoriError)
    assert said in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_candidates_and_makes_nothing(student: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from gori.quantize.sweep_commands import sweep

    arguments = [str(student), "--out", str(tmp_path / "out"), "--dry-run", "--json", "--schemes", "w4a8-g32,w4a16-g32"]
    found = CliRunner().invoke(sweep, arguments)
    body = json.loads(found.stdout)
    assert len(body["candidates"]) == 8
    assert list(body["left_out"]) == ["ExecuTorch (XNNPACK) does not hold w4a16-g32"]
    assert not (tmp_path / "out").exists()
