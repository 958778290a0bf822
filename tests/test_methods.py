"""Method names, their options, and `gori quantize` with every method on a checkpoint with rows beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gori import checkpoint, quantized
from gori.artifact import Manifest, make, read_manifest, sha256_file
from gori.errors import GoriError
from gori.quantize import calibration
from gori.quantize.methods import EXAMPLES, STEPS, function, method, options, settable
from gori.quantize.stage import quantize
from gori.tokenizer import copy_files
from students import Case, of, write_checkpoint


@pytest.mark.parametrize(
    ("text", "name"),
    [("rtn", "rtn"), ("awq", "awq+mse"), ("tune", "gptq+tune"), ("rotate+awq+gptq+qat", "rotate+awq+gptq+qat"),
     ("mse+tune", "mse+tune"), ("awq+tune", "awq+gptq+tune")],
)  # fmt: skip
def test_a_name_is_read_into_steps_and_what_is_left_out_is_filled_in(text: str, name: str) -> None:
    assert method(text).name == name
    assert method(name) == method(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("gptw", "step 'gptw' is unknown: did you mean 'gptq'"), ("tune+gptq", "transforms, then one rounding"),
     ("rtn+gptq", "each once"), ("gptq+gptq", "each once"), ("tune+qat", "each once"), ("", "step '' is unknown"),
     ("gptq+awq", "as in rotate")],
)  # fmt: skip
def test_a_name_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(GoriError, match=message):
        method(text)


def test_every_step_is_there_and_names_what_may_be_set() -> None:
    for name in STEPS:
        assert callable(function(name))
        assert all(type(v) in (bool, int, float, str) for v in settable(name).values()), name
    for text in EXAMPLES:
        method(text)
    assert {"damping", "act_order", "block", "rounds", "asymmetric"} == set(settable("gptq"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("gptq.dampin=1", "gptq takes no 'dampin': did you mean 'damping'"), ("awq.x=1", "has no step 'awq'"),
     ("gptq.damping=x", "expected float"), ("gptq.act_order=yes", "expected true or false"),
     ("damping=1", "STEP.NAME")],
)  # fmt: skip
def test_an_option_that_no_step_takes_is_refused(text: str, message: str) -> None:
    with pytest.raises(GoriError, match=message):
        options(method("gptq"), [text])
    assert options(method("gptq"), ["gptq.block=64", "gptq.act_order=false"]) == {
        "gptq": {"block": 64, "act_order": False}
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_tokenizer: Path) -> Path:
    """A run's directory: `data` as a recipe leaves it, and a student that learned from it."""
    root = tmp_path_factory.mktemp("run")
    files = {k: str(toy / f"{k}.jsonl") for k in ("train", "dev", "test")}
    note = Manifest("data", "files", 0, {"builtin": None, **files}, {})
    make(root / "data", note, lambda tmp: shutil.copyfile(toy / "tools.json", tmp / "tools.json"))
    plain = write_checkpoint(Case(of("qwen3", vocab_size=360, layers=2), "float"), root / "plain")
    learned = Manifest("distill", "distill", 0, {}, {"train": sha256_file(toy / "train.jsonl")})

    def build(tmp: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(plain / name, tmp / name)
        copy_files(toy_tokenizer, tmp)

    make(root / "student", learned, build)
    return root


FAST = {"tune": ["tune.epochs=1"], "qat": ["qat.epochs=1"]}


@pytest.mark.parametrize(
    "name", ["rtn", "mse", "hqq", "gptq", "awq", "smoothquant", "rotate", "rotate+gptq", "tune", "qat"]
)
def test_every_method_writes_a_checkpoint_that_computes_near_the_float_one_and_twice_the_same_bytes(
    name: str, run: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        quantize(run / "student", "w8a8-channel", None, name, out, samples=24, settings=FAST.get(name, []))
    body = read_manifest(outs[0])
    assert [read_manifest(out)["files"] for out in outs] == [body["files"]] * 2
    assert body["settings"]["method"] == method(name).name
    if method(name).calibrated:
        assert body["inputs"]["calibration/train.jsonl"]
        assert body["metrics"]["calibration"]["rows"] == 24
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        got, want = quantized.load(outs[0])(ids), checkpoint.load(run / "student")(ids)
    # eight bits: a hundredth of the logits' spread; another function altogether is as far as their spread
    assert float((got - want).square().mean().sqrt()) < 0.1 * float(want.std())


def test_rows_are_drawn_from_a_seed_and_found_beside_a_checkpoint_only_if_it_learned_from_them(
    run: Path, toy: Path, tmp_path: Path
) -> None:
    found = calibration.beside(run / "student")
    assert found["train"] == [toy / "train.jsonl"]
    assert found["test"] == [toy / "test.jsonl"]
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for change, message in (
        (lambda: (copy / "data" / "manifest.json").unlink(), "has no data directory beside it"),
        (lambda: _say(copy / "data" / "manifest.json", toy / "dev.jsonl"), "is not what .* learned from"),
    ):
        change()
        with pytest.raises(GoriError, match=message):
            quantize(copy / "student", "w4a8-g32", None, "gptq", tmp_path / "out")
        shutil.copyfile(run / "data" / "manifest.json", copy / "data" / "manifest.json")
    assert not (tmp_path / "out").exists()


def _say(manifest: Path, train: Path) -> None:
    body = json.loads(manifest.read_text())
    body["settings"]["train"] = str(train)
    manifest.write_text(json.dumps(body))


def test_a_mix_is_made_within_its_budget_and_says_what_it_knew(
    run: Path, tmp_path: Path, gori: Callable[..., object]
) -> None:
    out = tmp_path / "mixed"
    done = gori("quantize", run / "student", "--scheme", "w4a8-g32", "--mix", "executorch", "--bits-per-weight", "5.2",
                "--samples", "16", "--out", out, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    body = json.loads(done.stdout)  # type: ignore[attr-defined]
    facts = body["metrics"]["mix"]
    assert facts["size_bytes"] <= facts["budget_bytes"]
    assert len({(s.bits, s.group_size) for s in quantized.read(out)[0].tensors.values()}) > 1
    for more, message in (
        (("--bits-per-weight", "4.5"), "a budget needs --mix"),
        (("--mix", "executorch"), "needs one budget"),
        (("--mix", "executorch", "--bits-per-weight", "1.5"), "holds no choice"),
        (("--teacher", run / "student"), "--teacher goes with qat"),
    ):
        done = gori("quantize", run / "student", "--scheme", "w4a8-g32", *more, "--out", tmp_path / "no")
        assert done.returncode == 1  # type: ignore[attr-defined]
        assert message in done.stderr  # type: ignore[attr-defined]
        assert not (tmp_path / "no").exists()
