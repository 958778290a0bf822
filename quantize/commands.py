"""`gori quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from gori import console
from gori.artifact import read_manifest
from gori.options import json_option, out_option
from gori.quantize.schemes import ALIASES, EMBEDDINGS, SCHEMES


@click.command(
    epilog="Example: gori quantize demo/distill --scheme w4a8-g32 --out q4  ·  Schemes: "
    + ", ".join(SCHEMES)
    + ". Other toolkits' names: "
    + ", ".join(ALIASES)
    + ". Embeddings: "
    + ", ".join(EMBEDDINGS)
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--scheme", required=True, help="How weights and activations are held, as in w4a8-g32.")
@click.option("--embedding", help="The embedding table's scheme; default: the linear scheme's bits and groups.")
@click.option(
    "--method",
    type=click.Choice(["rtn", "mse"]),
    default="rtn",
    help="Each group's scale: the one that holds its largest weight (rtn) or that has the least squared error (mse).",
)
@out_option
@json_option
def quantize(checkpoint: Path, scheme: str, embedding: str | None, method: str, out: Path, as_json: bool) -> None:
    """Write CHECKPOINT's integers and scales: the one set that every target carries."""
    from gori.quantize.stage import quantize as run

    run(checkpoint, scheme, embedding, method, out)
    body = read_manifest(out)
    m = body["metrics"]
    size = f"{m['packed_bytes']:,} bytes packed, {m['bits_per_weight']} bits a weight"
    console.result(body, as_json, f"{out}: {body['name']}, {m['tensors']} tensors, {size}")
