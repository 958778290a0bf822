"""The same cache from one process, two ranks, a Ray cluster and a run that was killed; a student from it alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cached import SEED, write_teacher

from gori.artifact import hash_files, read_manifest
from gori.pipeline import Run, plan
from gori.recipe import load

pytestmark = pytest.mark.slow
TRAIN = {"steps": 8, "batch_tokens": 128, "swap_values": 0.5, "checkpoint_every_s": 0}
SHAPE = {"layers": 2, "hidden_size": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "intermediate_size": 32}


def write_recipe(directory: Path, toy: Path, **sections: Any) -> Path:
    body = {
        "name": "toy",
        "seed": SEED,
        "data": {k: str(toy / f"{k}.jsonl") for k in ("train", "dev", "test")} | {"tools": str(toy / "tools.json")},
        "teacher": {"path": "teacher"},
        "cache": {"shard_rows": 4, "epochs": 3},
        "student": SHAPE,
        "distill": {"init": "random", "control": "random", "train": TRAIN, "losses": {"forward_kl": 1.0}},
        **sections,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(body))
    return directory / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_tokenizer: Path) -> Path:
    base = tmp_path_factory.mktemp("recipe")
    write_teacher(base / "teacher", toy_tokenizer)
    return write_recipe(base, toy)


def gori(*arguments: object, ranks: int = 1) -> subprocess.Popen[str]:
    many = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *many, "-m", "gori", *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def one(recipe: Path) -> Path:
    """The cache of one process that was never cut."""
    said = json.loads(finish(gori("teacher", "cache", recipe, "--out", recipe.parent / "one", "--json")))
    assert said["stage"] == "cache"
    return recipe.parent / "one"


def test_two_ranks_write_the_same_bytes(recipe: Path, one: Path) -> None:
    finish(gori("teacher", "cache", recipe, "--out", recipe.parent / "two", ranks=2))
    assert hash_files(recipe.parent / "two" / "cache") == hash_files(one / "cache")


def test_a_killed_run_makes_no_shard_twice(recipe: Path, one: Path) -> None:
    out = recipe.parent / "killed"
    process = gori("teacher", "cache", recipe, "--out", out)
    while len(list(out.glob(".cache.shards/*/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    there = {p.name: p.stat().st_mtime_ns for p in out.glob(".cache.shards/*/*.tab")}
    assert 3 <= len(there) < len(list((one / "cache").glob("*.tab")))
    finish(gori("teacher", "cache", recipe, "--out", out))
    assert hash_files(out / "cache") == hash_files(one / "cache")
    whole = {p.name.removesuffix(".json") for p in (one / "cache").glob("*.tab")}
    kept = {name for name, at in there.items() if (out / "cache" / name).stat().st_mtime_ns == at}
    assert len(there) - len(kept) <= 1  # the one without its entry
    assert set(there) <= whole


def test_a_ray_cluster_writes_the_same_bytes(recipe: Path, one: Path) -> None:
    pytest.importorskip("ray", exc_type=ImportError)
    script = Path(__file__).with_name("ray_cluster.py")
    cluster = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        out = recipe.parent / "ray"
        finish(gori("teacher", "cache", recipe, "--out", out, "--cluster", "ray", "--address", address))
    finally:
        cluster.communicate("", timeout=60)
    assert hash_files(out / "cache") == hash_files(one / "cache")


def test_a_student_is_poured_from_the_cache_alone(recipe: Path, one: Path, tmp_path: Path, toy: Path) -> None:
    """Elsewhere, without the teacher: the same weights as beside it."""
    finish(gori("distill", recipe, "--out", one))
    shutil.copytree(one / "cache", tmp_path / "carried")
    alone = write_recipe(tmp_path, toy, teacher={}, cache={"path": "carried"})
    finish(gori("distill", alone, "--out", tmp_path / "out"))
    for stage in ("distill", "control"):
        weights = [base / stage / "model.safetensors" for base in (one, tmp_path / "out")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "out" / "teacher").exists()
    inputs = read_manifest(tmp_path / "out" / "distill")["inputs"]
    assert "cache" in inputs
    assert "teacher" not in inputs
    run = Run(load(alone), tmp_path / "out")
    assert dict(plan(run, "control"))["teacher"] == "its cache, taken as it is"
    assert dict(plan(run, "control"))["distill"] == "unchanged, skipped"
