"""What a stage leaves on disk: a directory that appears whole or not at all, with a manifest of hashes.

Knows nothing of what a stage does. A stage's identity (`fingerprint`) is its settings, its inputs' contents, its seed
and the library versions; two runs with one fingerprint write the same files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gori
from gori import console
from gori.errors import GoriError
from gori.ranks import agreed, barrier, by_first, current

MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
"""Of a signed artifact; made after the manifest, so that neither can name the other's hash."""
SCHEMA_VERSION = 1
LIBRARIES = ("torch", "torchao", "executorch", "transformers", "tokenizers", "safetensors", "numpy")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def utc_now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of python, gori and of those of `names` that are installed."""
    found = {"python": platform.python_version(), "gori": gori.__version__}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextmanager
def os_errors(what: Path) -> Iterator[None]:
    """Turn the system's refusals (full disk, no permission) into one sentence."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        where = f" ({e.filename})" if e.filename else ""
        raise GoriError(f"cannot write {what}{where}: {e.strerror or e}: free space or choose another --out") from e


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A temporary sibling directory that becomes `out` when the block ends well and vanishes when it does not.

    An existing `out` is replaced only if it is empty or carries a manifest (so: only what gori wrote).
    """
    out = Path(out)
    recover(out)
    check_replaceable(out)
    tmp, _ = _siblings(out)
    with os_errors(out):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    try:
        with os_errors(out):
            yield tmp
            _swap(tmp, out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def check_replaceable(out: Path) -> None:
    """Refuse to overwrite what gori did not write."""
    if out.exists() and not out.is_dir():
        raise GoriError(f"--out {out} is a file: name a directory")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out / MANIFEST):
        raise GoriError(f"--out {out} holds files but no {MANIFEST} of gori's: choose another directory, or empty it")


def check_same_kind(out: Path, manifest: Manifest) -> None:
    """Refuse to replace what another stage or target wrote, and files that no stage wrote."""
    if not (out / MANIFEST).exists():
        return
    there = read_object(out / MANIFEST)
    kind = ("stage", "name") if manifest.stage == "export" else ("stage",)
    if any(there.get(k) != getattr(manifest, k) for k in kind):
        raise GoriError(
            f"--out {out} holds {there.get('stage')} {there.get('name')}, and {manifest.stage} {manifest.name} would "
            "replace it: choose another directory, or remove it"
        )
    if spare := sorted(set(hash_files(out)) - set(there.get("files") or ())):
        raise GoriError(f"--out {out} holds {spare[0]}, which gori did not write and would remove: move it away")


def _is_ours(manifest: Path) -> bool:
    """Whether a file is a manifest that gori wrote: browsers, apps and npm call other things manifest.json too."""
    try:
        body = read_json(manifest)
    except GoriError:
        return False
    return isinstance(body, dict) and {"schema_version", "stage", "fingerprint"} <= set(body)


def _siblings(out: Path) -> tuple[Path, Path]:
    """Where a directory is written before it is `out`, and where the one that it replaces waits meanwhile."""
    return out.parent / f".{out.name}.writing", out.parent / f".{out.name}.old"


def _swap(tmp: Path, out: Path) -> None:
    _, old = _siblings(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(tmp, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Finish a swap that was killed between its two renames: `out` is then missing and what it held waits beside it.

    The new directory was whole by then (its manifest is written last); where it is not there, the old one comes back.
    """
    tmp, old = _siblings(Path(out))
    if Path(out).exists() or not (old / MANIFEST).exists():
        return
    with os_errors(Path(out)):
        os.rename(tmp if (tmp / MANIFEST).exists() else old, out)
        shutil.rmtree(old, ignore_errors=True)


def rendered(value: Any) -> str:
    """JSON as gori writes it to files: one text for one value, with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: whole, or not at all."""
    tmp = path.with_name(f".{path.name}.writing")
    with os_errors(path):
        try:
            tmp.write_bytes(data)
            os.replace(tmp, path)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with a final newline, atomically."""
    write_whole(path, rendered(value).encode())


def read_bytes(path: Path) -> bytes:
    """A file's bytes; one that is missing or cannot be read is refused."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as e:
        raise GoriError(f"{path} does not exist") from e
    except OSError as e:
        raise GoriError(f"{path} cannot be read: {e.strerror or e}") from e


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or broken one is refused with its place."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except UnicodeDecodeError as e:
        raise GoriError(f"{path} is not UTF-8 at byte {e.start}: save it as UTF-8") from e
    except json.JSONDecodeError as e:
        raise GoriError(f"{path} line {e.lineno} column {e.colno} is not JSON: {e.msg}") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, endless nesting
        raise GoriError(f"{path} holds JSON that cannot be read: {e}") from e


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object."""
    body = read_json(path)
    if not isinstance(body, dict):
        raise GoriError(f"{path} holds a JSON {type(body).__name__}, expected an object: copy or make it again")
    return body


@dataclass
class Manifest:
    """One stage's evidence, written last."""

    stage: str
    name: str
    seed: int
    settings: dict[str, Any]
    """The recipe's section as run."""
    inputs: dict[str, str]
    """Label → content hash of what was read."""
    started: str = field(default_factory=utc_now)
    finished: str = ""
    versions: dict[str, str] = field(default_factory=library_versions)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know: layers left float, what was not executed and why."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The stages that the inputs came from, and theirs, nearest first; see `ancestry`."""

    @property
    def fingerprint(self) -> str:
        return sha256_json([SCHEMA_VERSION, self.stage, self.settings, self.inputs, self.seed, self.versions])

    def write(self, directory: Path) -> None:
        """Hash every file in `directory` and write manifest.json there."""
        self.files, self.finished = hash_files(directory), utc_now()
        body = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **vars(self)}
        write_json(directory / MANIFEST, {**body, "sha256": sha256_json(body)})


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Relative path → SHA-256 and bytes, of every file but the manifest and its signature, sorted."""
    apart = (directory / MANIFEST, directory / SIGNATURE)
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p not in apart)
    return {p.relative_to(directory).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in paths}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a stage's directory."""
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise GoriError(
            f"{directory} has no {MANIFEST}: it is not a directory that gori wrote, or its stage was cut off"
        )
    body = read_object(path)
    if body.get("schema_version") != SCHEMA_VERSION:
        raise GoriError(
            f"{path} has schema version {body.get('schema_version')}, this gori {gori.__version__} reads "
            f"{SCHEMA_VERSION}: run the stage again"
        )
    return body


def ancestry(sources: dict[str, Path]) -> list[dict[str, Any]]:
    """Where inputs came from: for each directory that a stage of gori's wrote, what it was made of, then its own
    ancestors. Each stage once, by content."""
    found: dict[str, dict[str, Any]] = {}
    for label, path in sources.items():
        if not (path / MANIFEST).exists():
            continue
        body = read_manifest(path)
        kept = {k: body[k] for k in ("stage", "name", "seed", "settings", "inputs", "versions")}
        content = sha256_json({name: f["sha256"] for name, f in body["files"].items()})
        for entry in ({"as": label, "content": content, **kept}, *body.get("lineage", ())):
            found.setdefault(entry["content"], entry)
    return list(found.values())


def check_integrity(directory: Path) -> dict[str, Any]:
    """The manifest of a directory that holds exactly the files, byte for byte, that were written.

    Raises GoriError that names the first difference. It finds damage and mistakes; only a signature finds a forger.
    """
    path = Path(directory) / MANIFEST
    check_plain(Path(directory))
    body = read_manifest(directory)
    stated = body.pop("sha256", None)
    try:
        same = read_bytes(path) == rendered({**body, "sha256": stated}).encode() and sha256_json(body) == stated
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, UTF-8 may not
        same = False
    if not same or not isinstance(body.get("files"), dict):
        raise GoriError(f"{path} was changed after it was written: copy or make {directory} again")
    files, found = body["files"], hash_files(Path(directory))
    if missing := sorted(set(files) - set(found)):
        raise GoriError(f"{directory} lacks {missing[0]}, which its manifest names: copy or make it again")
    if spare := sorted(set(found) - set(files)):
        raise GoriError(f"{directory} holds {spare[0]}, which its manifest does not name: remove it or make it again")
    if wrong := [name for name in sorted(files) if found[name] != files[name]]:
        raise GoriError(f"{Path(directory) / wrong[0]} is not the file that was written: copy or make it again")
    return body


def check_plain(directory: Path) -> None:
    """Refuse links, pipes and empty directories: no hash speaks for them."""
    for at, directories, files in os.walk(directory):
        here = Path(at)
        if not directories and not files and here != directory:
            raise GoriError(
                f"{directory} holds the empty directory {here.name!r}: remove it or make the artifact again"
            )
        for name in (*directories, *files):
            mode = (here / name).lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise GoriError(f"{directory} holds {name!r}, which is no plain file: remove it or make it again")


def content_hash(path: Path) -> str:
    """What identifies an input: a file's SHA-256, or of a directory the hash over its files (manifest apart)."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise GoriError(f"{path} does not exist")
    return sha256_json({name: f["sha256"] for name, f in hash_files(path).items()})


def is_current(directory: Path, fingerprint: str) -> bool:
    """Whether a directory was written under this fingerprint and its files are still the ones that were written."""
    if not (Path(directory) / MANIFEST).exists():
        return False
    body = read_object(Path(directory) / MANIFEST)
    return body.get("fingerprint") == fingerprint and hash_files(Path(directory)) == body.get("files")


def gate(name: str, value: float, bound: float, *, at_least: bool) -> dict[str, Any]:
    """A verdict for the manifest: the value, the bound and whether it is met."""
    met = value >= bound if at_least else value <= bound
    return {"name": name, "value": value, "bound": bound, "at_least": at_least, "met": bool(met)}


class WouldMake(BaseException):
    """Ends a stage that is only asked whether it would make something."""


_only_asked = False


def would_make(stage: Callable[[], object]) -> bool:
    """Whether a stage would make any of its artifacts anew. It makes nothing, and ends at the first that it would."""
    global _only_asked
    _only_asked = True
    try:
        stage()
        return False
    except WouldMake:
        return True
    finally:
        _only_asked = False


def make(
    out: Path, manifest: Manifest, build: Callable[[Path], None], scratch: Path | None = None, by_all: bool = False
) -> bool:
    """Run a stage unless `out` already holds what it would write; returns whether it ran.

    `build(tmp)` writes the files into a temporary directory and fills the manifest's metrics, gates and notes.
    `scratch` is a file or folder that only an unfinished run needs; it is removed once `out` is whole.
    Under torchrun every rank calls it and the first builds alone; `by_all`: all build, and the first alone writes.
    """
    if _only_asked:
        if is_current(out, manifest.fingerprint):
            return False
        raise WouldMake

    def write() -> None:
        with writing(out) as tmp:
            build(tmp)
            manifest.write(tmp)

    if first := current().first:
        recover(out)
        check_same_kind(out, manifest)
    there = agreed(first and is_current(out, manifest.fingerprint))
    if there:
        console.log(f"{manifest.stage} {manifest.name}: unchanged, skipped ({out})")
    elif not by_all:
        by_first(write)
    elif first:
        write()
    else:
        build(_siblings(out)[0])
    if first and scratch:
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)
    barrier()
    return not there
