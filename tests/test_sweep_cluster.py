"""`gori sweep --engine ray`: two nodes of a local cluster come to the table of one machine, also after a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import candidate, setting

from gori.artifact import content_hash
from gori.cluster import check_same
from gori.errors import GoriError
from gori.quantize import cluster
from gori.tokenizer import copy_files
from students import Case, of, write_checkpoint

SPEEDS = {"rss_mib", "load_ms", "prefill_tps", "decode_tps", "speed_rounds"}


def test_a_directory_arrives_as_it_was_sent(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "한글.bin").write_bytes(bytes(range(256)))
    archive = cluster.packed({".": source})
    arrived = cluster.unpacked(archive, tmp_path / "there" / "student")
    assert content_hash(arrived) == content_hash(source)
    (arrived / "deep" / "mark").touch()
    assert (cluster.unpacked(archive, arrived) / "deep" / "mark").exists()  # not unpacked again


def test_what_comes_back_replaces_the_remains_of_a_cut_off_run_but_no_integers(tmp_path: Path) -> None:
    task = setting(tmp_path / "out").task(candidate("rtn"))
    sent = {}
    for name in ("candidate", "quantized"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("new")
        sent[name] = tmp_path / name
    integers = task.out / "quantized" / task.integers_key
    for place in (task.directory, integers):
        place.mkdir(parents=True)
        (place / "old").touch()
    cluster.unpack_result(cluster.packed(sent), task)
    assert [p.name for p in task.directory.iterdir()] == ["file"]
    assert [p.name for p in integers.iterdir()] == ["old"]
    assert sorted(p.name for p in task.out.iterdir()) == ["candidates", "quantized"]


def test_an_archive_that_leaves_its_directory_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        cluster.unpacked(out.getvalue(), tmp_path / "there")
    assert not (tmp_path / "outside").exists()


def test_a_node_with_another_library_is_refused_by_name() -> None:
    with pytest.raises(GoriError, match=r"node 10\.0\.0\.2 has torch 2\.12, this machine 2\.13"):
        check_same({"python": "3.11", "torch": "2.12"}, {"python": "3.11", "torch": "2.13"}, "10.0.0.2")
    with pytest.raises(GoriError, match="has gguf not at all"):
        check_same({}, {"gguf": "0.19.0"}, "a")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes that runs in a process of its own."""
    helper = Path(__file__).with_name("ray_cluster.py")
    running = subprocess.Popen(
        [sys.executable, str(helper)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    found = running.stdout.readline().strip()
    if not found:
        pytest.fail(running.communicate()[1])
    yield found
    running.communicate()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    out = write_checkpoint(Case(of("qwen3", vocab_size=360), "float"), tmp_path_factory.mktemp("ray") / "student")
    copy_files(toy_tokenizer, out)
    return out


def start(student: Path, toy: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    data = ["--data", str(toy / "test.jsonl"), "--calibration", str(toy / "train.jsonl"), "--rounds", "1"]
    space = ["--target", "gguf", "--schemes", "w4a16-g32,w8a16-channel", "--methods", "rtn,mse"]
    command = [sys.executable, "-m", "gori", "sweep", str(student), "--out", str(out), *data, *space, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def table(out: Path) -> list[dict[str, Any]]:
    rows = json.loads((out / "table.json").read_text())["rows"]
    for row in rows:
        row.pop("seconds")
        row["metrics"] = {k: v for k, v in row["metrics"].items() if k not in SPEEDS}
    return sorted(rows, key=lambda r: r["key"])


@pytest.mark.slow
def test_two_nodes_come_to_the_table_of_one_machine_also_when_the_driver_is_killed(
    student: Path, toy: Path, tmp_path: Path, address: str
) -> None:
    out, embeddings = tmp_path / "ray", ("--embeddings", "matching")
    ray = ("--engine", "ray", "--address", address, *embeddings)
    p = start(student, toy, out, *ray)
    journal = out / "journal.jsonl"
    while p.poll() is None and '"done"' not in (journal.read_text() if journal.exists() else ""):
        time.sleep(0.05)
    assert p.poll() is None, p.communicate()[1]
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    p = start(student, toy, out, *ray)
    _, said = p.communicate(timeout=900)
    assert p.returncode == 0, said
    local = start(student, toy, tmp_path / "local", *embeddings)
    _, said = local.communicate(timeout=900)
    assert local.returncode == 0, said
    assert table(out) == table(tmp_path / "local")
    assert len(table(out)) == 4
    finished = [e["key"] for e in map(json.loads, journal.read_text().splitlines()) if e["event"] == "done"]
    assert len(finished) == len(set(finished)) == 4
    for row in table(out):
        assert content_hash(out / row["artifact"]) == content_hash(tmp_path / "local" / row["artifact"])


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_named(student: Path, toy: Path, tmp_path: Path) -> None:
    p = start(student, toy, tmp_path / "out", "--engine", "ray", "--address", "127.0.0.1:9")
    _, said = p.communicate(timeout=300)
    assert p.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:9" in said.splitlines()[-1]
