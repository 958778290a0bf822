"""A whole recipe through the command line, tiny but real: skipped when unchanged, continued when killed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gori import incar, recipe
from gori.artifact import hash_files, read_manifest
from gori.errors import GoriError
from gori.pipeline import Run, plan, run_recipe
from gori.report import claim, plot

SHAPE = {"layers": 2, "hidden_size": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "intermediate_size": 32}
TRAIN = {"steps": 12, "batch_tokens": 256, "checkpoint_every_s": 0, "evaluate_every": 6}
STAGES = ("data", "tokenizer", "teacher", "distill", "control", "quantize", "export/executorch")


def write_recipe(directory: Path, **changes: Any) -> Path:
    """A recipe on 200 rows of the in-car task, as one's own files."""
    incar.write(directory, seed=3, train=200, dev=6, test=8)  # weights of 12 steps talk until they are cut off
    body = {
        "name": "tiny",
        "seed": 3,
        "data": {
            "train": "train.jsonl",
            "dev": "dev.jsonl",
            "test": ["template.jsonl", "none.jsonl"],
            "tools": "tools.json",
        },
        "tokenizer": {"vocab_size": 700},
        "teacher": {**SHAPE, "experts": 4, "train": TRAIN},
        "student": SHAPE,
        "distill": {"train": TRAIN, "control": "random", "losses": {"forward_kl": 0.5, "ce": 0.5}},
        "quantize": {"scheme": "w4a8-g32", "compare": ["w8a8-channel"]},
        **changes,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(body))
    return directory / "recipe.yaml"


def gori(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gori", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


def made_files(out: Path) -> dict[str, Any]:
    """Hashes of everything a run made but manifests and logs (times), the summary (seconds) and the report (both)."""
    timed = ("summary.json", "report.html", ".lock")
    return {
        k: v
        for k, v in hash_files(out).items()
        if k not in timed and not k.endswith("manifest.json") and not k.startswith("logs/")
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml beside `out`, the directory of a run that was never cut."""
    directory = tmp_path_factory.mktemp("pipeline")
    path = write_recipe(directory)
    stdout, _ = finish(gori("run", path, "--out", directory / "out", "--json"))
    assert json.loads(stdout) == json.loads((directory / "out/summary.json").read_text())
    return directory


def test_the_summary_has_every_model_on_every_split(tiny: Path) -> None:
    summary = json.loads((tiny / "out/summary.json").read_text())
    models = ["teacher", "student", "control", "w8a8-channel", "w4a8-g32", "executorch"]
    assert list(summary["accuracy"]) == models
    for by_split in summary["accuracy"].values():
        assert list(by_split) == ["template", "none"]
        for entry in by_split.values():
            assert entry["n"] == 8
            assert entry["exact"] == pytest.approx((entry["ko"] + entry["en"]) / 2)
    assert summary["bytes"]["executorch"] == (tiny / "out/export/executorch/model.pte").stat().st_size
    assert summary["parameters"]["student"] < summary["parameters"]["teacher"]


def test_every_stage_left_a_manifest_of_its_files(tiny: Path) -> None:
    for stage in STAGES:
        body = read_manifest(tiny / "out" / stage)
        assert body["files"] == hash_files(tiny / "out" / stage)
        assert body["finished"] >= body["started"]
    assert not list((tiny / "out").glob(".*.pt"))


def test_a_second_run_does_nothing_again_and_starts_no_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gori.pipeline.together", lambda *_, **__: pytest.fail("a process was started"))
    before = {p: p.stat().st_mtime_ns for p in (tiny / "out").rglob("manifest.json")}
    run_recipe(recipe.load(tiny / "recipe.yaml"), tiny / "out")
    assert {p: p.stat().st_mtime_ns for p in (tiny / "out").rglob("manifest.json")} == before


PLANS = {
    "": (),
    "quantize.compare=[w4a8-channel]": ("quantize", "export", "evaluate"),
    "distill.train.steps=13": ("distill", "control", "quantize", "export", "evaluate"),
    "distill.temperature=2.0": ("distill", "quantize", "export", "evaluate"),
    "export=[{target: executorch, context: 64}]": ("export", "evaluate"),
    "teacher.balance=0.02": ("teacher", "distill", "control", "quantize", "export", "evaluate"),
}
"""Changed setting → the stages that may run: the first of them does, those behind it where it comes out another."""


@pytest.mark.parametrize("override", PLANS)
def test_a_dry_run_says_which_stages_a_changed_setting_makes_anew_and_makes_nothing(override: str, tiny: Path) -> None:
    before = hash_files(tiny / "out")
    checkpoint = tiny / "out/.teacher.training.pt"
    checkpoint.write_bytes(b"of a run that was cut")
    try:
        loaded = recipe.load(tiny / "recipe.yaml", (override,) if override else ())
        states = dict(plan(Run(loaded, tiny / "out"), "report"))
        assert checkpoint.exists()
    finally:
        checkpoint.unlink()
    assert tuple(s for s, state in states.items() if state.startswith("runs")) == (*PLANS[override], "report")
    fresh = dict(plan(Run(loaded, tiny / "nowhere"), "report"))
    assert fresh.pop("cache") == "not asked for"
    assert set(fresh.values()) == {"runs"}
    assert all("comes out another" in states[s] for s in PLANS[override][1:] if s != "control")
    assert ("from its checkpoint" in states["teacher"]) == ("teacher" in PLANS[override])
    assert hash_files(tiny / "out") == before


def test_a_dry_run_of_a_run_that_stopped_before_its_export_says_that_it_would_export(
    tiny: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(tiny / "out", tmp_path / "out")
    shutil.rmtree(out / "export")
    states = dict(plan(Run(recipe.load(tiny / "recipe.yaml"), out), "report"))
    assert [s for s, state in states.items() if state.startswith("runs")] == ["export", "evaluate", "report"]


def test_the_report_is_one_page_without_network_or_script(tiny: Path) -> None:
    page = (tiny / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", page)
    for model in ("teacher", "student", "control", "w8a8-channel", "w4a8-g32", "executorch"):
        assert f"<td>{model}" in page
    assert page.count('class="example') == 10
    assert page.count("<polyline") == 6  # loss and dev score of three runs


def test_a_loss_is_drawn_by_its_logarithm_and_a_score_as_it_is() -> None:
    losses = [{"step": i, "loss": 10 ** (1 - i / 200), "dev_exact": i / 400} for i in range(1, 401)]  # 10 to 0.1
    loss, score = (plot("", {"teacher": losses}, key, key == "loss") for key in ("loss", "dev_exact"))

    def heights(of: Any) -> list[float]:
        return [float(p.split(",")[1]) for p in of.curves[0].points.split()]

    for falls in (heights(loss)[100:], [-y for y in heights(score)]):  # a smoothed exponential is one too, soon
        steps = [b - a for a, b in itertools.pairwise(falls)]
        assert max(steps) - min(steps) < 0.25  # a straight line, to the tenth of a pixel and what is left of the start
    assert [float(t) for _, t in loss.y_ticks] == pytest.approx(
        [0.12 * (9.9 / 0.12) ** (i / 4) for i in range(5)], rel=0.15
    )
    flat = plot("", {"teacher": [{"step": 1, "loss": 0.5}]}, "loss", True)
    assert "nan" not in flat.curves[0].points


def test_a_claim_needs_a_difference_larger_than_chance() -> None:
    def summary(student: float, control: float) -> dict[str, Any]:
        shares = {"student": student, "control": control}
        return {"accuracy": {m: {"t": {"exact": share, "n": 400}} for m, share in shares.items()}}

    assert "more often right than" in claim(summary(0.9, 0.7))
    assert "not shown to be better" in claim(summary(0.9, 0.89))
    assert "less often right than" in claim(summary(0.7, 0.9))


def test_a_gate_that_is_not_met_exits_3_after_everything_is_written(tiny: Path) -> None:
    args = ("run", tiny / "recipe.yaml", "--out", tiny / "out", "--set", "budget.bytes=10")
    _, err = finish(gori(*args), code=3)
    assert "1 of 1 gates not met: bytes.executorch" in err
    assert json.loads((tiny / "out/summary.json").read_text())["gates"][0]["met"] is False
    assert (tiny / "out/report.html").exists()


def test_a_second_run_in_the_same_directory_is_refused_while_one_works(tiny: Path) -> None:
    import fcntl

    with open(tiny / "out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, err = finish(gori("run", tiny / "recipe.yaml", "--out", tiny / "out"), code=1)
    assert "another gori run works in" in err


CUT = """
import os, signal, sys

stage = os.environ["CUT_STAGE"]
saved = 0

def cut(event, arguments):
    global saved
    first_file = event == "open" and isinstance(arguments[0], str) and f"/.{stage}.writing/" in arguments[0]
    checkpoint = event == "os.rename" and str(arguments[1]).endswith(f"/.{stage}.training.pt")
    saved += checkpoint
    if first_file or (checkpoint and saved == 2):  # the second is about to replace the first; os.kill is an event too
        os.kill(os.getpgid(0), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(cut)
"""
"""Loaded by every Python process of a run (sitecustomize): kills the run and itself in the middle of a stage, however
short that is. Other processes of the run end by themselves."""


def cut_and_continue(tiny: Path, tmp_path: Path, stage: str, until: str = "report") -> None:
    """Kill a run in the middle of `stage`, continue it, compare every byte with a run that was never cut."""
    out, hook = tmp_path / "out", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(CUT)
    command = ("run", tiny / "recipe.yaml", "--out", out, "--until", until)
    process = gori(*command, PYTHONPATH=str(hook), CUT_STAGE=Path(stage).name)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, f"{stage} was over before the kill"
    time.sleep(1.5)
    marks = (out / f".{stage}.training.pt", (out / stage).parent / f".{Path(stage).name}.writing")
    assert any(m.exists() for m in marks)
    assert not (out / stage / "manifest.json").exists()
    finish(gori(*command))
    made, whole = made_files(out), made_files(tiny / "out")
    if until != "report":  # the stages up to it, each with all its files
        stages = {k.split("/")[0] for k in made}
        assert until in stages
        whole = {k: v for k, v in whole.items() if k.split("/")[0] in stages}
    assert made == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["data", "tokenizer", "teacher", "distill", "control", "quantize", "export/executorch", "evaluate/student"]
)
def test_a_run_killed_in_any_stage_ends_with_the_same_bytes(tiny: Path, tmp_path: Path, stage: str) -> None:
    cut_and_continue(tiny, tmp_path, stage)


def test_a_run_killed_while_its_teacher_trains_ends_with_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    cut_and_continue(tiny, tmp_path, "teacher", until="distill")


LATE = {
    "distill.losses.forward_lk=1": "did you mean 'forward_kl'",
    "quantize.scheme=w4a8-g64": "group size 64 does not divide in_features 32",
    "quantize.scheme=w4a16-g32": r"XNNPACK\) does not hold quantize.scheme w4a16-g32",
    "quantize.embedding=w4-g33": "embedding scheme 'w4-g33' is unknown",
    "gates.accuracy=high": "write a comparison",
}


@pytest.mark.parametrize("override", LATE)
def test_what_a_late_stage_would_refuse_is_refused_before_any_training(override: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    with pytest.raises(GoriError, match=LATE[override]):
        run_recipe(recipe.load(path, (override,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_further_targets_are_added_to_a_finished_run_and_stand_ins_are_not_evaluated(
    tiny: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(tiny / "out", tmp_path / "out")
    several = "export=[{target: executorch}, {target: gguf}, {target: coreml}]"
    _, err = finish(gori("run", tiny / "recipe.yaml", "--out", out, "--set", several))
    assert "export executorch: unchanged, skipped" in err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["targets"] == ["executorch", "gguf"]
    assert set(summary["accuracy"]) >= {"executorch", "gguf"}
    assert "coreml" not in summary["accuracy"]
    assert summary["bytes"]["gguf"] == (out / "export/gguf/model.gguf").stat().st_size
    said, _ = finish(gori("verify", out, "--json"))
    body = json.loads(said)
    assert (body["ok"], body["same_integers"], len(body["artifacts"])) == (True, True, 3)
    manifest = json.loads((out / "export/coreml/manifest.json").read_text())
    assert [e["stage"] for e in manifest["lineage"]] == ["quantize", "distill", "tokenizer", "teacher"]
