"""What a forger without a key can do to an artifact, and keys to sign with, for the tests of verify and sign."""

from __future__ import annotations

import json
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gori.artifact import hash_files, rendered, sha256_json


def seal(directory: Path, **changes: object) -> None:
    """Rewrite the manifest as gori would have: what a careful forger without the key can do."""
    body = json.loads((directory / "manifest.json").read_text())
    body.pop("sha256")
    body |= changes
    (directory / "manifest.json").write_text(rendered({**body, "sha256": sha256_json(body)}))


def reseal_files(directory: Path) -> None:
    seal(directory, files=hash_files(directory))


def keys(directory: Path, curve: ec.EllipticCurve) -> tuple[Path, Path]:
    private = ec.generate_private_key(curve)
    pem, public = directory / "private.pem", directory / "public.pem"
    none = serialization.NoEncryption()
    pem.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, form))
    return pem, public
