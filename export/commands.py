"""The command `gori export`: parse, call one exporter, print."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gori.console import result
from gori.errors import GoriError

TARGETS = {"executorch": ("gori.export.executorch", "export_executorch")}
"""Target → the module and function that write it; imported when asked for."""


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(sorted(TARGETS)), required=True, help="The runtime to export for.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--context", type=int, help="Tokens the KV cache holds.  [default: the model's, 512 at most]")
@click.option("--chunk", type=int, help="Tokens one call takes at most.  [default: 128, below the context]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Golden prompts that are run besides random ones: a file with a JSON list of token ids on each line.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export_command(
    checkpoint: Path,
    target: str,
    out: Path,
    context: int | None,
    chunk: int | None,
    prompts: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Carry a checkpoint's integers into a runtime's format and prove it by running the file.

    \b
    Example:
      gori quantize student --scheme w4a8-g32 --out student-w4
      gori export student-w4 --target executorch --context 512 --out car.et
    """
    module, function = TARGETS[target]
    export: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), function)
    golden = read_prompts(prompts) if prompts else []
    manifest = export(checkpoint, out, context=context, chunk=chunk, prompts=golden, seed=seed)
    result({"out": str(out), **manifest["metrics"]}, as_json, summary(out, manifest["metrics"]))


def summary(out: Path, metrics: dict[str, Any]) -> str:
    """Two lines for a reader."""
    found = metrics["parity"]
    return (
        f"{out}: {metrics['pte_bytes']:,} bytes ({metrics['packed_bytes']:,} packed), "
        f"{metrics['delegated_linears']}/{metrics['linears']} linears delegated, "
        f"{metrics['export_core_s']} core-seconds\n"
        f"KL to the checkpoint {found['engine']['kl_mean']:.2e} (noise floor {found['floor']['kl_mean']:.2e}), "
        f"same first choice on {found['engine']['top1']:.1%} of {found['engine']['positions']} positions"
    )


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
