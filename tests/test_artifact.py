"""A stage's directory appears whole or not at all, and what gori did not write is left alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori import artifact
from gori.artifact import Manifest, content_hash, is_current, make, read_json, read_manifest, sha256_json, writing
from gori.errors import GoriError


def manifest(**settings: object) -> Manifest:
    return Manifest("stage", "name", 0, dict(settings), {})


def write(out: Path, text: str, **settings: object) -> bool:
    return make(out, manifest(**settings), lambda tmp: (tmp / "file").write_text(text) and None)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_directory_appears_when_its_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with writing(out) as tmp:
        (tmp / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert names(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing_and_the_old_directory_as_it_was(
    error: type[BaseException], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for known in (False, True):
        if known:
            write(out, "old")
        with pytest.raises(error), writing(out) as tmp:  # noqa: PT012 (the block is what is tested)
            (tmp / "half").write_text("x")
            raise error
        assert names(tmp_path) == (["out"] if known else [])
    assert (out / "file").read_text() == "old"


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS], ids=["ENOSPC", "EDQUOT", "EACCES", "EROFS"]
)
def test_what_the_system_refuses_is_one_sentence(code: int, tmp_path: Path) -> None:
    message = f"cannot write .*: {os.strerror(code)}: free space or choose another"
    with pytest.raises(GoriError, match=message), writing(tmp_path / "out"):
        raise OSError(code, os.strerror(code), "file")
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"name": "my web app", "icons": []}', "[]"])
def test_a_directory_that_gori_did_not_write_is_left_alone(content: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    if content is not None:
        (out / "manifest.json").write_text(content)
    with pytest.raises(GoriError, match="choose another directory"), writing(out):
        raise AssertionError("the block must not run")
    assert (out / "mine.txt").read_text() == "precious"


def test_an_empty_directory_is_taken_and_a_file_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(GoriError, match="is a file: name a directory"):
        write(tmp_path / "file", "y")


def test_a_stage_runs_once_until_its_settings_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [write(out, "1", a=1), write(out, "2", a=1), write(out, "3", a=2), write(out, "4", a=2)] == [True, False] * 2
    assert (out / "file").read_text() == "3"


def test_a_flipped_byte_a_spare_file_and_a_missing_one_are_noticed(tmp_path: Path) -> None:
    def flip(out: Path) -> None:
        body = bytearray((out / "file").read_bytes())
        body[3] ^= 1
        (out / "file").write_bytes(body)

    for number, change in enumerate((flip, lambda o: (o / "file").unlink())):
        out = tmp_path / str(number)
        write(out, "hello")
        assert is_current(out, manifest().fingerprint)
        change(out)
        assert not is_current(out, manifest().fingerprint)
        assert write(out, "hello")
        assert is_current(out, manifest().fingerprint)


@pytest.mark.parametrize(
    "change",
    [{"stage": "other"}, {"seed": 1}, {"settings": {"a": 1}}, {"inputs": {"x": "00"}}, {"versions": {"torch": "0"}}],
)
def test_a_fingerprint_depends_on_all_that_matters(change: dict[str, object]) -> None:
    fields = {"stage": "stage", "name": "name", "seed": 0, "settings": {}, "inputs": {}}
    assert Manifest(**{**fields, **change}).fingerprint != Manifest(**fields).fingerprint  # type: ignore[arg-type]


def test_a_fingerprint_does_not_depend_on_when_a_stage_ran_or_what_it_measured() -> None:
    a, b = manifest(), manifest()
    b.started, b.metrics, b.notes = "then", {"x": 1}, ["y"]
    assert a.fingerprint == b.fingerprint


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_the_hash_of_json_does_not_depend_on_the_order_of_keys(value: object) -> None:
    def turned(v: object) -> object:
        if isinstance(v, dict):
            return {k: turned(v[k]) for k in reversed(list(v))}
        return [turned(x) for x in v] if isinstance(v, list) else v

    # half a surrogate pair never gets here: recipes and tools are read as UTF-8
    if "\\ud" not in json.dumps(value):
        assert sha256_json(value) == sha256_json(turned(value))


def test_a_directorys_content_hash_follows_names_and_bytes_but_not_the_manifest(tmp_path: Path) -> None:
    for d in ("a", "b"):
        (tmp_path / d).mkdir()
        (tmp_path / d / "x").write_text("1")
    (tmp_path / "a" / "manifest.json").write_text("{}")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    with pytest.raises(GoriError, match="does not exist"):
        content_hash(tmp_path / "c")


KILL = """
    import os, signal, sys
    from pathlib import Path
    from gori import artifact
    real, calls = os.rename, 0
    def rename(a, b):
        global calls
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        real(a, b)
    os.rename = rename
    m = artifact.Manifest("stage", "name", 0, {"a": 2}, {})
    artifact.make(Path(sys.argv[1]), m, lambda tmp: (tmp / "file").write_text("new") and None)
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_before_or_between_the_two_renames_loses_neither_the_old_nor_the_new(
    renames: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(out, "old", a=1)
    command = [sys.executable, "-c", textwrap.dedent(KILL), str(out), str(renames)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert out.exists() == (renames == 0)
    ran = make(out, manifest(a=2), lambda tmp: (tmp / "file").write_text("new") and None)
    assert ran == (renames == 0)  # killed between them, the new directory was whole already
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "out", os.rename
    write(out, "old", a=1)

    def rename(a: Path, b: Path) -> None:
        if str(a).endswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(GoriError, match="Input/output error"):
        write(out, "new", a=2)
    assert (out / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_old_directory_comes_back_where_the_new_one_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old", a=1)
    out.rename(tmp_path / ".out.old")
    assert write(out, "never", a=1) is False
    assert (out / "file").read_text() == "old"


def test_leftovers_of_a_kill_while_writing_are_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".out.writing"
    left.mkdir()
    (left / "half").write_text("x")
    write(tmp_path / "out", "whole")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file", "manifest.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 column 1 is not JSON"), (b'{"a":', "line 1 column 6 is not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "holds JSON that cannot be read"), (b"9" * 5000, "holds JSON that cannot be read"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read_is_refused_with_its_place(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(GoriError, match=message):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json"), ("[]", "expected an object"), ("{", "is not JSON"),
        ('{"schema_version": 9}', "schema version 9"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(GoriError, match=message):
        read_manifest(tmp_path)


def test_json_is_written_atomically_and_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    artifact.write_json(path, {"가": 1})
    assert path.read_text(encoding="utf-8") == '{\n "가": 1\n}\n'

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GoriError, match="No space left on device"):
        artifact.write_json(path, {"가": 2})
    assert names(tmp_path) == ["x.json"]
    assert read_json(path) == {"가": 1}


def test_a_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    import hashlib

    def build(tmp: Path) -> None:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "b").write_bytes(b"abc")

    make(tmp_path / "out", manifest(), build)
    body = read_manifest(tmp_path / "out")
    assert body["files"] == {"sub/b": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}}
    assert body["versions"]["gori"]
    shutil.rmtree(tmp_path / "out")


def test_what_another_stage_or_a_user_put_there_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "hello")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(GoriError, match=r"holds notes\.txt, which gori did not write"):
        write(out, "other", a=1)
    (out / "notes.txt").unlink()
    with pytest.raises(GoriError, match="holds stage name, and other name would replace it"):
        make(out, Manifest("other", "name", 0, {}, {}), lambda tmp: None)
    assert (out / "file").read_text() == "hello"


def test_an_export_does_not_replace_one_for_another_target(tmp_path: Path) -> None:
    make(tmp_path / "out", Manifest("export", "gguf", 0, {}, {}), lambda tmp: (tmp / "file").write_text("x") and None)
    with pytest.raises(GoriError, match="holds export gguf, and export litert would replace it"):
        make(tmp_path / "out", Manifest("export", "litert", 0, {}, {}), lambda tmp: None)
