"""torchrun and the command line: stages over two ranks, written by the first alone, and errors in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml

from gori.artifact import hash_files, read_manifest
from gori.cli import Lazy, root
from gori.errors import GoriError
from gori.tokenizer import Tokenizer

Gori = Callable[..., subprocess.CompletedProcess[str]]
SHAPE = {"layers": 2, "hidden_size": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "intermediate_size": 32}


@pytest.fixture
def recipe(toy: Path, tmp_path: Path) -> Path:
    train = {"steps": 6, "batch_tokens": 200, "warmup_steps": 2, "checkpoint_every_s": 0, "threads": 1}
    body = {
        "name": "two",
        "data": {k: str(toy / f"{k}.jsonl") for k in ("train", "dev", "test")} | {"tools": str(toy / "tools.json")},
        "tokenizer": {"vocab_size": 360},
        "teacher": {**SHAPE, "experts": 4, "train": {**train, "expert_parallel": 2}},
        "student": SHAPE,
        "distill": {"train": train, "control": "random"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    return tmp_path / "recipe.yaml"


def on_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gori"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_teacher_and_its_students_are_trained_on_two_ranks_as_in_one_process(
    recipe: Path, gori: Gori, tmp_path: Path
) -> None:
    done = on_ranks("distill", recipe, "--out", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    body = json.loads(done.stdout)  # one object: the first rank alone prints
    assert body["metrics"]["ranks"] == 2
    assert done.stderr.count("teacher 6/6") == 1
    one = gori("distill", recipe, "--out", tmp_path / "one", "--set", "teacher.train.expert_parallel=1")
    assert one.returncode == 0, one.stderr
    for stage in ("teacher", "distill", "control"):
        assert losses(tmp_path / "two" / stage) == pytest.approx(losses(tmp_path / "one" / stage), rel=1e-3)
        assert read_manifest(tmp_path / "two" / stage)["files"] == hash_files(tmp_path / "two" / stage)
    assert not [p for p in (tmp_path / "two").glob(".*") if p.name != ".lock"]
    Tokenizer.load(tmp_path / "two/teacher")
    again = on_ranks("distill", recipe, "--out", tmp_path / "two")
    assert again.stderr.count("unchanged, skipped") == 5


def test_a_command_for_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(root, Lazy)
    with pytest.raises(GoriError, match="`gori export` works in one process: start it without torchrun"):
        root.get_command(click.Context(root), "export")


def test_a_recipe_that_is_wrong_is_refused_once(recipe: Path, tmp_path: Path) -> None:
    wrong = on_ranks("teacher", "train", recipe, "--out", tmp_path / "x", "--set", "teacher.layer=3")
    assert wrong.returncode == 1
    said = [line for line in wrong.stderr.splitlines() if line.startswith("gori: ")]
    assert said == [f"gori: {recipe}: unknown key teacher.layer: did you mean 'layers'?"]
