"""`gori sign`, and what an export says on paper: a signature, a bill of materials."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec

from gori.errors import GoriError
from gori.export.commands import sign
from gori.export.signing import check_signature, sign_artifact
from gori.export.verify import verify_one
from sealing import keys, reseal_files, seal


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_a_signed_artifact_verifies_with_its_key_and_no_other(
    curve: ec.EllipticCurve, copy: Path, tmp_path: Path
) -> None:
    pem, public = keys(tmp_path, curve)
    (tmp_path / "other").mkdir()
    _, other = keys(tmp_path / "other", curve)
    run = CliRunner().invoke(sign, [str(copy), "--key", str(pem), "--json"])
    assert run.exit_code == 0, run.output
    assert verify_one(copy, public, run=False).signed is True
    assert verify_one(copy, run=False).ok
    assert "is not one that" in verify_one(copy, other, run=False).problem


@pytest.mark.parametrize("name", ["model.gguf", "tools.json", "manifest.json", "signature.json"])
def test_a_signed_artifact_that_was_changed_and_resealed_is_refused(name: str, copy: Path, tmp_path: Path) -> None:
    pem, public = keys(tmp_path, ec.SECP256R1())
    sign_artifact(copy, str(pem))
    if name == "manifest.json":
        seal(copy, seed=1)
    else:
        whole = (copy / name).read_bytes()
        middle = len(whole) // 2
        (copy / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        reseal_files(copy)
    with pytest.raises(GoriError, match=r"is not one that .*public\.pem verifies"):
        check_signature(copy, public)


def test_signing_again_replaces_the_signature(copy: Path, tmp_path: Path) -> None:
    pem, public = keys(tmp_path, ec.SECP256R1())
    sign_artifact(copy, str(pem))
    sign_artifact(copy, str(pem))
    check_signature(copy, public)


def test_what_cannot_sign_or_was_not_signed_is_refused(copy: Path, tmp_path: Path) -> None:
    pem, public = keys(tmp_path, ec.SECP256R1())
    with pytest.raises(GoriError, match="is not signed: `gori sign"):
        check_signature(copy, public)
    with pytest.raises(GoriError, match="is not a file: name a PEM file of an ECDSA private key"):
        sign_artifact(copy, str(tmp_path / "none.pem"))
    with pytest.raises(GoriError, match="does not sign"):
        sign_artifact(copy, str(public))
    (copy / "tools.json").write_text("[1]")
    with pytest.raises(GoriError, match="not the file that was written"):
        sign_artifact(copy, str(pem))


SOFTHSM = next((p for p in map(Path, ("/usr/lib/softhsm/libsofthsm2.so",)) if p.exists()), None)


@pytest.mark.skipif(SOFTHSM is None, reason="no PKCS#11 token here: Debian's softhsm2 brings one in software")
def test_a_key_on_a_pkcs11_token_signs(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    pem, public = keys(tmp_path, ec.SECP256R1())
    label = ["--token", "gori", "--pin", "1234"]
    for command in (
        ["--init-token", "--free", "--label", "gori", "--pin", "1234", "--so-pin", "5678"],
        ["--import", str(pem), *label, "--label", "release", "--id", "01"],
    ):
        subprocess.run(["softhsm2-util", *command], check=True, capture_output=True)
    uri = f"pkcs11:token=gori;object=release?module-path={SOFTHSM}&pin-value=1234"
    body = sign_artifact(copy, uri)
    assert body["files"] > 5
    check_signature(copy, public)
    with pytest.raises(GoriError, match="does not sign") as e:
        sign_artifact(copy, uri.replace("release", "none"))
    assert "1234" not in str(e.value)


def test_the_bill_of_materials_is_valid_cyclonedx(artifact: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (artifact / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    body = json.loads(text)
    kinds = {c["type"] for c in body["components"]}
    assert {"file", "library", "platform"} <= kinds
    assert body["metadata"]["component"]["type"] == "machine-learning-model"
    hashes = {c["name"]: c["hashes"][0]["content"] for c in body["components"] if c["type"] == "file"}
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert hashes["model.gguf"] == manifest["files"]["model.gguf"]["sha256"]


def test_a_relative_path_verifies_too(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem, public = keys(tmp_path, ec.SECP256R1())
    monkeypatch.chdir(copy.parent)
    sign_artifact(Path(copy.name), str(pem))
    check_signature(Path(copy.name), public)
    copy.rename(tmp_path / "moved")
    check_signature(tmp_path / "moved", public)
