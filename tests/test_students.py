"""Student sizing from a recipe: scores of a rung against a row-by-row reference, refusals, and a whole sizing through
real training, exports and engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from decoders import random_decoder
from gori import checkpoint, evaluate, incar, recipe
from gori.data import encode
from gori.errors import GateError, GoriError
from gori.model import ModelConfig
from gori.pipeline import Run
from gori.quantize.budget import parse
from gori.quantize.sizing import Shape
from gori.recipe import Recipe
from gori.students import check, run_students, score, train
from gori.tokenizer import END, Tokenizer

TRAIN = {"steps": 12, "batch_tokens": 256, "checkpoint_every_s": 0}
STUDENT = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "intermediate_size": 96}


def recipe_of(directory: Path, data: Path, **changes: Any) -> Recipe:
    """A recipe on files, for gguf: it exports and runs in a second."""
    files = {k: str(data / f"{k}.jsonl") for k in ("train", "dev", "test")}
    body = {
        "name": "tiny",
        "data": {**files, "tools": str(data / "tools.json")},
        "tokenizer": {"vocab_size": 400},
        "teacher": {**STUDENT, "experts": 4, "intermediate_size": 64, "train": TRAIN},
        "student": STUDENT,
        "distill": {"train": TRAIN, "control": "none", "losses": {"forward_kl": 0.5, "ce": 0.5}},
        "quantize": {"scheme": "w4a16-g32", "method": "mse"},
        "export": [{"target": "gguf"}],
        **changes,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return recipe.load(path)


def test_a_rungs_scores_are_those_of_one_row_after_the_other(toy: Path, toy_tokenizer: Path, tmp_path: Path) -> None:
    run = Run(recipe_of(tmp_path, toy), tmp_path / "out")
    student = Path(shutil.copytree(toy_tokenizer, tmp_path / "student"))
    tokenizer = Tokenizer.load(student)
    cfg = ModelConfig(kind="qwen3", vocab_size=tokenizer.vocab_size, max_position=128, **STUDENT)  # type: ignore[arg-type]
    checkpoint.save(random_decoder(cfg), student)
    found = score(run, student)

    model = checkpoint.load(student).double()
    whole, losses = [], []
    for c in run.corpus.dev:
        e = encode(c, tokenizer)
        with torch.no_grad():
            log_p = model.logits(model.hidden(torch.tensor([e.ids[:-1]])))[0].log_softmax(-1)
        said = [-log_p[i, e.ids[i + 1]].item() for i in range(len(e.ids) - 1) if e.loss[i + 1]]
        whole.append(float(torch.tensor(said, dtype=torch.float64).sum().neg().exp()))
        losses += said
    assert found["rows"] == len(run.corpus.dev) == 6
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["answer_probability"] == pytest.approx(sum(whole) / len(whole), rel=1e-3)
    for name in ("loss", "answer_probability", "exact"):
        low, high = found[f"{name}_ci"]
        assert low <= found[name] <= high
    generate = evaluate.batched(checkpoint.load(student), tokenizer.id(END))
    scored = evaluate.score(run.corpus.dev, generate, tokenizer, run.corpus.functions)
    assert found["exact"] == sum(s.exact for s in scored) / 6


@pytest.mark.parametrize(
    ("candidates", "finalists", "short", "target", "said"),
    [
        (3, 4, 0.1, "gguf", "4 finalists of 3 shapes: name 1 to 3"),
        (3, 0, 0.1, "gguf", "0 finalists of 3 shapes"),
        (3, 1, 0.0, "gguf", "a share above 0 and at most 1"),
        (3, 1, 1.5, "gguf", "a share above 0 and at most 1"),
        (3, 1, 0.1, "coreml", "does not run here, so no student can be sized for coreml"),
        (3, 1, 0.1, "ggfu", "ggfu"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_anything_is_trained(
    candidates: int, finalists: int, short: float, target: str, said: str
) -> None:
    with pytest.raises(GoriError, match=said):
        check(candidates, finalists, short, target)


def test_mixed_precision_is_not_sized(toy: Path, tmp_path: Path) -> None:
    mixed = {"scheme": "w4a16-g32", "mix": "gguf", "bits_per_weight": 5.0}
    with pytest.raises(GoriError, match=r"one scheme for all linears: --set quantize\.mix=null"):
        run_students(recipe_of(tmp_path, toy, quantize=mixed), tmp_path / "out", parse("size=1MB"), target="gguf")
    assert not (tmp_path / "out").exists()


def test_a_short_distillation_has_its_own_whole_schedule(
    toy: Path, toy_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr("gori.distill.stage.train_student", lambda *a: seen.append(a))
    long = {**TRAIN, "steps": 400, "warmup_steps": 90, "evaluate_every": 50}
    made = recipe_of(tmp_path, toy, distill={"train": long, "layers": [0, 1], "init": "teacher"})
    for share in (0.001, 0.1, 1.0):
        train(made, tmp_path / "out", Shape(1, 64, 4, 4, 16, 32), share, tmp_path / "x")
    runs = [(d.train.steps, d.train.warmup_steps, d.train.evaluate_every, d.layers) for _, d, *_ in seen]
    assert runs == [(10, 2, 0, None), (40, 8, 0, None), (400, 90, 50, None)]
    assert {(s.layers, s.intermediate_size) for s, *_ in seen} == {(1, 32)}


@pytest.mark.slow
def test_a_whole_sizing_trains_students_that_fit_and_is_not_done_twice(tmp_path: Path) -> None:
    incar.write(tmp_path, seed=3, train=200, dev=20, test=20)
    (tmp_path / "template.jsonl").rename(tmp_path / "test.jsonl")
    made = recipe_of(tmp_path, tmp_path, tokenizer={"vocab_size": 700})
    budget, how = parse("size=90kB,decode=20"), {"target": "gguf", "candidates": 3, "finalists": 2, "rounds": 1}
    sized = run_students(made, tmp_path / "out", budget, **how)  # type: ignore[arg-type]
    facts, home = sized.facts, tmp_path / "out/students"
    assert len(sized.students) == 2
    assert [len(r["ranking"]) for r in facts["rungs"]] == [3, 2]
    assert set(sized.students) == {r["student"] for r in facts["rungs"][1]["ranking"]}
    assert len(facts["measured"]) == 7
    assert facts["cost_model"]["size_bytes"]["worst"] < 0.05
    assert sum(facts["left_out"].values()) > 100
    for name, path in sized.students.items():
        cfg = checkpoint.read_config(path)
        assert name == f"l{cfg.layers}-d{cfg.hidden_size}-m{cfg.intermediate_size}"
        assert facts["predicted"][name]["size_bytes"] <= 90_000
        assert path == home / name
    assert json.loads((home / "sizing.json").read_text(encoding="utf-8")) == json.loads(json.dumps(facts))
    before = {p: p.stat().st_mtime_ns for p in home.rglob("manifest.json")}
    again = run_students(made, tmp_path / "out", budget, **how)  # type: ignore[arg-type]
    assert again == sized
    assert {p: p.stat().st_mtime_ns for p in home.rglob("manifest.json")} == before
    with pytest.raises(GateError, match=r"none of \d+ shapes is expected to fit size=2kB; nearest: l2-d32-m32 \(size"):
        run_students(made, tmp_path / "out", parse("size=2kB"), **how)  # type: ignore[arg-type]
