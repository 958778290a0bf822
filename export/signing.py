"""Signatures over an artifact's files: a key in a file or on a PKCS#11 token, by model-signing (OpenSSF), offline.

Keyless signing is left out on purpose: it asks a service. Knows nothing of what the files hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gori.artifact import SIGNATURE, check_integrity
from gori.errors import GoriError, MissingEngine, one_line

URI = "pkcs11:"


def sign_artifact(directory: Path, key: str) -> dict[str, Any]:
    """Write signature.json (a Sigstore bundle with an in-toto statement over every file's SHA-256) into an artifact.

    `key` is a PEM file of an ECDSA private key (P-256, P-384, P-521) or a `pkcs11:` URI (RFC 7512) of one. A signature
    that is there is replaced. Raises GoriError for an artifact that is not whole and a key that cannot sign.
    """
    files = check_integrity(directory)["files"]
    signature = directory / SIGNATURE
    signing = _library().signing.Config()
    try:
        config = signing.use_pkcs11_signer(pkcs11_uri=key) if key.startswith(URI) else _key_signer(signing, key)
        signature.unlink(missing_ok=True)
        config.set_hashing_config(_hashing(directory)).sign(directory.resolve(), signature.resolve())
    except GoriError:
        raise
    except Exception as e:  # the library raises ValueError, TypeError, its token's own errors and bare Exception
        raise GoriError(f"--key {_shown(key)} does not sign {directory}: {one_line(e, 200)}") from e
    return {"signature": str(signature), "files": len(files) + 1}


def _key_signer(signing: Any, key: str) -> Any:
    if not Path(key).is_file():
        raise GoriError(f"--key {key} is not a file: name a PEM file of an ECDSA private key, or a pkcs11: URI")
    return signing.use_elliptic_key_signer(private_key=Path(key))


def check_signature(directory: Path, key: Path) -> None:
    """GoriError unless every file, manifest included, is the one that the holder of `key`'s private half signed."""
    signature = directory / SIGNATURE
    if not signature.is_file():
        raise GoriError(f"{directory} is not signed: `gori sign {directory} --key PRIVATE_KEY` does that")
    if not key.is_file():
        raise GoriError(f"--key {key} is not a file: name a PEM file of the signer's public key")
    verifying = _library().verifying.Config()
    try:
        config = verifying.use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing(directory))
        config.verify(directory.resolve(), signature.resolve())
    except Exception as e:  # as above
        raise GoriError(f"the signature of {directory} is not one that {key} verifies: {one_line(e, 200)}") from e


def _hashing(directory: Path) -> Any:
    """SHA-256 of every file but the signature; git's files are not left out."""
    config = _library().hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    # absolute: the library takes a relative path for one inside the directory
    return config.set_ignored_paths(paths=[directory.resolve() / SIGNATURE], ignore_git_paths=False)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as e:
        raise MissingEngine(f"signing needs {e.name}: pip install 'gori[sign]'") from e
    return model_signing


def _shown(key: str) -> str:
    """A key's name without the PIN that its URI may carry."""
    return key.partition("?")[0]
