"""`gori export`, `gori verify`, `gori sign`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gori.artifact import read_bytes
from gori.calls import read_text
from gori.console import result, table_width
from gori.errors import GateError, GoriError
from gori.options import json_option
from gori.targets import TARGETS


@click.command(
    "export",
    epilog="Example: gori export student-w4 --target executorch --context 512 --out car.et  ·  several at once: "
    "--target litert --target gguf --out car writes car/litert and car/gguf  ·  "
    "`gori quantize student --scheme w4a8-g32 --out student-w4` makes the checkpoint.",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    type=click.Choice(list(TARGETS)),
    required=True,
    multiple=True,
    help="The runtime; or several.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory to write; of several targets the parent."
)
@click.option("--context", type=int, help="Tokens the KV cache holds.  [default: the model's, 512 at most]")
@click.option("--chunk", type=int, help="Tokens one call takes at most.  [default: 128, below the context]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Golden prompts that are run besides random ones: a file with a JSON list of token ids on each line.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts.")
@click.option(
    "--backend",
    metavar="TEXT",
    help="Of executorch: xnnpack (default), coreml, vulkan, openvino, qnn:SA8295; of atom-max: batch=8+1,devices=2.",
)
@click.option(
    "--system", type=click.Path(path_type=Path), help="A text file: what the model is told before every utterance."
)
@click.option(
    "--runner",
    type=click.Path(path_type=Path),
    help="Of executorch: a built gori-call, by which keys and values of what stands before every utterance are saved.",
)
@json_option
def export_command(
    checkpoint: Path,
    targets: tuple[str, ...],
    out: Path,
    context: int | None,
    chunk: int | None,
    prompts: Path | None,
    seed: int,
    backend: str | None,
    system: Path | None,
    runner: Path | None,
    as_json: bool,
) -> None:
    """Carry a checkpoint's integers into a runtime's format and prove it by running the file."""
    from gori.export.build import export

    variant = check_backend(backend, targets)
    golden = read_prompts(prompts) if prompts else []
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(targets):
        place = out / name if len(set(targets)) > 1 else out
        manifest = export(
            name,
            checkpoint,
            place,
            context=context,
            chunk=chunk,
            prompts=golden,
            seed=seed,
            backend=variant,
            system=read_system(system) if system else "",
            runner=runner,
        )
        found[name] = {"out": str(place), **manifest["metrics"], "gates": manifest["gates"], "notes": manifest["notes"]}
    body = found if len(found) > 1 else next(iter(found.values()))
    result(body, as_json, "\n".join(summary(m) for m in found.values()))
    require_gates(found, out)


def require_gates(found: dict[str, dict[str, Any]], out: Path) -> None:
    """GateError that names the gates that an export did not meet; what was written stays."""
    gates = [(name, gate) for name, metrics in found.items() for gate in metrics["gates"]]
    missed = [f"{name}: {g['name']} is {g['value']:,}, bound {g['bound']:,}" for name, g in gates if not g["met"]]
    if missed:
        raise GateError(f"{len(missed)} of {len(gates)} gates not met: {'; '.join(missed)} (everything is in {out})")


def check_backend(backend: str | None, targets: tuple[str, ...]) -> str | None:
    """The variant that is asked for, None for the default; refused for targets that have none."""
    if backend and targets not in (("executorch",), ("atom-max",)):
        raise GoriError(f"--backend {backend} is of --target executorch or atom-max alone, got {', '.join(targets)}")
    return None if backend == "xnnpack" else backend


def summary(metrics: dict[str, Any]) -> str:
    """Some lines for a reader."""
    head = (
        f"{metrics['out']}: {metrics['file_bytes']:,} bytes ({metrics['packed_bytes']:,} packed), "
        f"{metrics['tensors_read_back']} tensors read back identical, {metrics['export_core_s']} core-seconds"
    )
    found = metrics.get("parity")
    if found is None:
        return "\n".join([head, f"not run: {metrics['not_run']}", *(f"note: {n}" for n in metrics["notes"])])
    measured = (
        f"KL to the checkpoint {found['engine']['kl_mean']:.2e} (noise floor {found['floor']['kl_mean']:.2e}), "
        f"same first choice on {found['engine']['top1']:.1%} of {found['engine']['positions']} positions"
    )
    return "\n".join([head, measured, *(f"note: {n}" for n in metrics["notes"])])


def read_system(path: Path) -> str:
    """A text in NFC, as a conversation's content is read; GoriError for an empty one."""
    try:
        text = read_text(read_bytes(path).decode("utf-8").strip(), str(path))
    except UnicodeDecodeError as e:
        raise GoriError(f"{path} is not UTF-8: save it as UTF-8") from e
    if not text:
        raise GoriError(f"{path} is empty: write what the model is told before every utterance, or leave --system out")
    return text


def read_prompts(path: Path) -> list[list[int]]:
    """Token ids, one JSON list a line; a bad line is refused with its place."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise GoriError(f"--prompts {path} cannot be read: {e}") from e
    found: list[list[int]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            ids = json.loads(line)
        except json.JSONDecodeError as e:
            raise GoriError(f"{path} line {number} column {e.colno} is not JSON: {e.msg}") from e
        if not (isinstance(ids, list) and ids and all(type(t) is int for t in ids)):
            raise GoriError(f"{path} line {number} is {line[:40]!r}, expected a list of token ids such as [1, 7, 42]")
        found.append(ids)
    return found


@click.command(
    epilog="Example: gori verify demo/export  ·  a directory of artifacts gives one row each.",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Public key (PEM): the signature is checked, too.")
@click.option("--no-run", is_flag=True, help="Check files, integers and signature; run no engine.")
@json_option
def verify(directory: Path, key: Path | None, no_run: bool, as_json: bool) -> None:
    """Check an exported artifact, or every one under DIRECTORY: hashes, integers, signature, golden outputs."""
    from gori.export.verify import ledger, table, verify_all

    if key and not key.is_file():
        raise GoriError(f"--key {key} is not a file: name a PEM file of the signer's public key")
    rows = verify_all(directory, key, run=not no_run)
    result(ledger(rows), as_json, table(rows, table_width()))
    refused = [r for r in rows if not r.ok]
    if refused:
        raise GoriError(f"{len(refused)} of {len(rows)} artifacts refused: {refused[0].problem}")


@click.command(
    epilog="Example: gori sign demo/export/executorch --key private.pem  ·  then verify with --key public.pem"
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--key", required=True, help="Private key: a PEM file (ECDSA), or a PKCS#11 URI (pkcs11:…).")
@json_option
def sign(directory: Path, key: str, as_json: bool) -> None:
    """Sign an exported artifact with a key file or a PKCS#11 token; offline, no service is asked."""
    from gori.export.signing import sign_artifact

    body = sign_artifact(directory, key)
    result(body, as_json, f"{body['signature']}: {body['files']} files signed")
