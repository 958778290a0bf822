"""`gori verify` and `gori sign`: a good artifact passes, and every kind of damage is refused in one sentence.

One small GGUF artifact is made for the file; what is checked here is the same for every target.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from gori.artifact import rendered
from gori.errors import GoriError
from gori.export import golden, golden_run
from gori.export.build import export
from gori.export.commands import verify
from gori.export.verify import caption, same_integers, table, verify_all
from sealing import reseal_files, seal
from students import CHUNK, CONTEXT


def refusal(directory: Path, key: Path | None = None) -> str:
    (row,) = verify_all(directory, key)
    return row.problem


def test_a_whole_artifact_passes_and_says_what_ran(artifact: Path) -> None:
    run = CliRunner().invoke(verify, [str(artifact), "--json"])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(run.stdout)["artifacts"]
    assert (row["ok"], row["tensors"], row["here"]["engine"]) == (True, 8, "llama.cpp")
    assert row["here"]["answers"] == row["here"]["same_answers"] > 0
    assert row["entry"]["executed"] is True
    assert row["here"]["kl_mean"] <= row["here"]["kl_bound"]


def test_golden_prompts_hold_both_languages_a_chunks_boundary_and_a_full_context(artifact: Path) -> None:
    found = golden.read(artifact)
    lengths = {len(p) for p in found.prompts}
    assert {1, CHUNK - 1, CHUNK, CHUNK + 1, CONTEXT} <= lengths
    texts = "".join(a["text"] for a in found.answers)
    assert any("가" <= c <= "힣" for c in texts)
    assert any("a" <= c <= "z" for c in texts)


def test_the_kl_over_kept_tokens_is_never_more_than_over_all() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 5.0):
        a, b = rng.normal(0, scale, (2, 20, 300))
        p, q = golden.log_softmax(a), golden.log_softmax(b)
        whole = (np.exp(p) * (p - q)).sum(-1)
        top, kept = golden.distributions(a)
        part = golden.divergence(kept, np.take_along_axis(q, top, -1))
        assert ((part > 0) & (part <= whole + 1e-9)).all()
        assert golden.divergence(kept, kept) == pytest.approx(0, abs=1e-9)


MUTATIONS = 240


def test_a_flipped_byte_anywhere_is_refused_in_one_sentence(artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    files = sorted(p for p in out.rglob("*") if p.is_file())
    rng = random.Random(0)
    for i in range(MUTATIONS):
        path = files[i % len(files)]
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        assert len(refusal(out).splitlines()) == 1, f"{path.name} byte {at}"
        path.write_bytes(whole)
    assert refusal(out) == ""


def test_a_truncated_file_is_refused_in_one_sentence(artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    rng = random.Random(1)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for length in (0, 1, len(whole) - 1, rng.randrange(len(whole))):
            path.write_bytes(whole[:length])
            assert refusal(out), f"{path.name} cut to {length}"
        path.write_bytes(whole)


def test_damage_to_the_engines_file_is_refused_though_its_hash_was_rewritten(artifact: Path, tmp_path: Path) -> None:
    """Whoever rewrites the manifest still has to get past the integers and the golden outputs."""
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    path, rng = out / "model.gguf", random.Random(2)
    whole = path.read_bytes()
    integers = whole.index(b"blk.0.attn_q.weight")
    refused = 0
    for i in range(24):
        at = rng.randrange(len(whole) // 2, len(whole)) if i % 2 else rng.randrange(integers)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        reseal_files(out)
        (row,) = verify_all(out, run=False)
        refused += not row.ok
        assert "\n" not in row.problem
    # vocabulary and metadata are not integers: they are for the signature
    assert refused >= 12


def swap_tokenizer(out: Path) -> None:
    body = json.loads((out / "tokenizer.json").read_text())
    merges = body["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (out / "tokenizer.json").write_text(json.dumps(body))


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        body = json.loads((out / name).read_text())
        (out / name).write_text(rendered(body | changes))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    "a swapped tokenizer": (swap_tokenizer, False, "tokenizer.json is not the file that was written"),
    "a swapped tokenizer, resealed": (swap_tokenizer, True, "tokenizer.json is not the one that parity was measured"),
    "a missing template": (lambda o: (o / "chat_template.jinja").unlink(), False, "lacks chat_template.jinja"),
    "a missing template, resealed": (lambda o: (o / "chat_template.jinja").unlink(), True, "chat_template.jinja"),
    "a file too many": (lambda o: (o / "extra.so").write_bytes(b"x"), False, "holds extra.so, which its manifest does"),
    "an empty directory": (lambda o: (o / "empty").mkdir(), False, "holds the empty directory 'empty'"),
    "a link to nowhere": (lambda o: (o / "x").symlink_to("nowhere"), False, "holds 'x', which is no plain file"),
    "a link in the file's place": (
        lambda o: (o / "model.gguf").rename(o.parent / "m") and (o / "model.gguf").symlink_to(o.parent / "m"), True,
        "holds 'model.gguf', which is no plain file",
    ),
    "a pipe for a manifest": (
        lambda o: (o / "manifest.json").unlink() or os.mkfifo(o / "manifest.json"), False, "which is no plain file",
    ),
    "a name of two lines": (lambda o: (o / "a\nb").write_text(""), False, "holds a b, which its manifest does"),
    "a parity of no bytes": (edit("parity.json", packed_bytes=0), True, "field 'packed_bytes'"),
    "a parity of text": (edit("parity.json", parity="x"), True, "field 'parity'"),
    "a parity without figures": (edit("parity.json", parity={"engine": {}, "floor": {}}), True, "field 'parity'"),
    "other answers": (
        lambda o: edit("golden.json", answers=[
            {"text": "", "prompt": [1, 2], "answer": [7, 7, 7]} for _ in range(12)
        ])(o), True, "0 of 12 answers",
    ),
    "no manifest": (lambda o: (o / "manifest.json").unlink(), False, "has no manifest.json"),
    "no parity": (lambda o: (o / "parity.json").unlink(), True, "parity.json"),
    "another parity": (edit("parity.json", schema_version=2), True, "version that this gori does not read"),
    "an unknown target": (edit("parity.json", target="onnx"), True, "version that this gori does not read"),
    "a parity of nothing": (lambda o: (o / "parity.json").write_text("[]"), True, "parity.json"),
    "a parity without parts": (
        lambda o: (o / "parity.json").write_text('{"schema_version": 1, "target": "gguf"}'), True, "field 'engine'",
    ),
    "a golden of another version": (edit("golden.json", schema_version=9), True, "golden.json has version 9"),
    "a golden without rows": (edit("golden.json", prompts=[], top=[], log_p=[]), True, "fields of golden"),
    "a golden of words": (edit("golden.json", prompts=[["a"]]), True, "is no list of token ids"),
    "a golden of infinity": (edit("golden.json", prompts=[[float("inf")]]), True, "is no list of token ids"),
    "a golden of other rows": (edit("golden.json", prompts=[[1]]), True, "for 1 positions"),
    "a golden with foreign tokens": (
        edit("golden.json", prompts=[[1]], top=[[10**6]], log_p=[[0.0]]), True, "name token 1000000",
    ),
    "a golden with foreign ids": (
        edit("golden.json", prompts=[[10**6]], top=[[1]], log_p=[[0.0]]), True, "token id 1000000 is outside",
    ),
    "integers of nothing": (edit("integers.json", tensors={}), True, "8 of 8 tensors in"),
    "integers of another kind": (edit("integers.json", tensors=[1]), True, "integers.json"),
    "a manifest of a later gori": (lambda o: seal(o, schema_version=2), False, "has schema version 2"),
    "a manifest of another stage": (lambda o: seal(o, stage="quantize"), False, "only exported artifacts"),
    "a manifest of a list": (lambda o: (o / "manifest.json").write_text("[]\n"), False, "manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_in_one_sentence(what: str, copy: Path) -> None:
    change, resealed, message = DAMAGE[what]
    change(copy)
    if resealed:
        reseal_files(copy)
    (said,) = refusal(copy).splitlines()
    assert message in said
    run = CliRunner().invoke(verify, [str(copy)])
    assert isinstance(run.exception, GoriError)


def test_an_engine_that_answers_otherwise_is_refused(copy: Path) -> None:
    """Golden outputs of another model: the hashes are right, the answers are not."""
    body = json.loads((copy / "golden.json").read_text())
    body["top"] = [row[::-1] for row in body["top"]]
    (copy / "golden.json").write_text(rendered(body))
    reseal_files(copy)
    assert "does not answer as it did when it was made" in refusal(copy)


def test_one_bad_artifact_does_not_keep_the_others_from_being_checked(artifact: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(artifact, tmp_path / name)
    (tmp_path / "b" / "parity.json").write_text("{")
    rows = verify_all(tmp_path, run=False)
    assert [(r.directory.name, r.ok) for r in rows] == [("a", True), ("b", False), ("c", True)]


def test_an_artifact_without_its_manifest_is_seen_among_others(artifact: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(artifact, tmp_path / name)
    (tmp_path / "b" / "manifest.json").unlink()
    assert [(r.directory.name, r.ok) for r in verify_all(tmp_path, run=False)] == [("a", True), ("b", False)]


def test_the_same_integers_are_only_claimed_of_integers_that_were_read(artifact: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(artifact, tmp_path / "two" / name)
    rows = verify_all(tmp_path / "two", run=False)
    assert same_integers(rows) is True
    rows[1].integers = "0" * 64
    assert same_integers(rows) is False
    assert caption(rows) == f"{rows[0].integers[:8]}: a; 00000000: b"
    rows[1].tensors = 0  # not read, or a float student
    assert same_integers(rows) is None
    assert caption(rows).endswith("no integers read: b")


def test_an_engine_that_is_not_installed_is_said_and_no_refusal(artifact: Path, tmp_path: Path) -> None:
    """A copy of the interpreter's path without the wheel: what another machine is."""
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").write_text("raise ModuleNotFoundError('no xllamacpp', name='xllamacpp')")
    command = [sys.executable, "-m", "gori", "verify", str(artifact), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (row,) = json.loads(done.stdout)["artifacts"]
    assert (row["ok"], row["tensors"], row["here"]) == (True, 8, {})
    assert "gori[gguf]" in row["not_run"]


def test_an_engine_that_ends_is_a_refusal_and_not_the_end(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_run, "sys", type("S", (), {"executable": "/bin/false"}))
    assert "ended with 1" in refusal(copy)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_shows_every_artifact_at_any_width(width: int, artifact: Path, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        shutil.copytree(artifact, tmp_path / name)
    (tmp_path / "bad" / "parity.json").write_text("{")
    console = Console(width=width, file=io.StringIO())
    console.print(table(verify_all(tmp_path, run=False), width))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "good" in shown
    assert "REFUSED bad" in shown
    assert "eager" not in shown


def test_nothing_to_verify_is_said(tmp_path: Path) -> None:
    with pytest.raises(GoriError, match="holds no exported artifact"):
        verify_all(tmp_path)
    with pytest.raises(GoriError, match="is not a directory"):
        verify_all(tmp_path / "none")


def test_verifying_a_gguf_loads_no_torch(artifact: Path) -> None:
    code = f"import sys\nfrom gori.cli import main\ntry: main(['verify', {str(artifact)!r}])\nexcept SystemExit: pass\n"
    command = [sys.executable, "-c", f"{code}print('TORCH', 'torch' in sys.modules)"]
    assert "TORCH False" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_same_export_writes_the_same_bytes_again(artifact: Path, tmp_path: Path) -> None:
    export("gguf", artifact.parent / "student", tmp_path / "again", context=CONTEXT, chunk=CHUNK)
    names = sorted(p.name for p in artifact.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in set(names) - {"manifest.json"}:
        assert (artifact / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
