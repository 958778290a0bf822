"""`gori quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from gori import console
from gori.artifact import read_manifest
from gori.options import json_option, out_option
from gori.quantize.methods import EXAMPLES, SAMPLES, SENSITIVITY_ROWS, STEPS, TRAINING_SAMPLES
from gori.quantize.schemes import ALIASES, BITS, GROUP_SIZES

EPILOG = (
    "Example: gori quantize demo/distill --scheme w4a8-g32 --method gptq --out q4  ·  "
    f"Schemes: w{{{','.join(map(str, BITS))}}}a{{8,16}}-{{{','.join(GROUP_SIZES)}}}. "
    f"Other toolkits' names: {', '.join(ALIASES)}. "
    f"Embeddings: float, w{{{','.join(map(str, BITS))}}}-{{{','.join(GROUP_SIZES)}}}. "
    f"Methods: {', '.join(STEPS)} and what they make together, as in {', '.join(EXAMPLES[4:])}. "
    "Mixed precision: --mix gguf --bits-per-weight 4.6."
)


@click.command(epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--scheme", required=True, help="How weights and activations are held, as in w4a8-g32.")
@click.option("--embedding", help="The embedding table's scheme; default: the linear scheme's bits and groups.")
@click.option("--method", default="rtn", show_default=True, help="How integers and scales are chosen; steps with +.")
@click.option(
    "--calibration",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Conversations to calibrate with; default: the training rows beside CHECKPOINT.",
)
@click.option(
    "--samples", type=click.IntRange(1), help=f"Calibration rows; default: {SAMPLES}, and {TRAINING_SAMPLES} to train."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--option", "settings", multiple=True, metavar="STEP.NAME=VALUE", help="As in gptq.damping=0.05.")
@click.option("--teacher", type=click.Path(path_type=Path), help="What qat learns from; default: CHECKPOINT itself.")
@click.option("--mix", help="Mixed precision from a target's schemes, or from schemes with commas between.")
@click.option("--bits-per-weight", type=click.FloatRange(1, 32), help="Budget of --mix, scales included.")
@click.option("--size", help="Budget of --mix in bytes of integers and scales, as in 800kB.")
@click.option("--mix-rows", type=click.IntRange(1), default=SENSITIVITY_ROWS, show_default=True)
@click.option("--on-disk", type=click.Path(path_type=Path, file_okay=False), help="Keep activations in files there.")
@out_option
@json_option
def quantize(
    checkpoint: Path,
    scheme: str,
    embedding: str | None,
    method: str,
    files: tuple[Path, ...],
    samples: int | None,
    seed: int,
    settings: tuple[str, ...],
    teacher: Path | None,
    mix: str | None,
    bits_per_weight: float | None,
    size: str | None,
    mix_rows: int,
    on_disk: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Write CHECKPOINT's integers and scales: the one set that every target carries."""
    from gori.errors import GoriError
    from gori.quantize.budget import parse
    from gori.quantize.mix import mix_of
    from gori.quantize.stage import quantize as run

    if (bits_per_weight or size) and mix is None:
        raise GoriError("a budget needs --mix: name a target, as in --mix executorch, or schemes")
    size_bytes = int(parse(f"size={size}").bounds[0].bound) if size else None
    mixed = mix_of(mix, scheme, embedding, bits_per_weight, size_bytes, mix_rows) if mix else None
    run(
        checkpoint,
        scheme,
        embedding,
        method,
        out,
        calibration=files,
        samples=samples,
        seed=seed,
        settings=settings,
        mix=mixed,
        teacher=teacher,
        on_disk=on_disk,
    )
    body = read_manifest(out)
    m = body["metrics"]
    lines = [f"{out}: {body['name']}, {m['tensors']} tensors, {m['packed_bytes']:,} bytes packed, "]
    lines[0] += f"{m['bits_per_weight']} bits a weight"
    if c := m.get("calibration"):
        lines.append(
            f"{c['rows']} calibration rows: KL to the float student {c['kl_mean']:.2e} nats a token, "
            f"top-1 {c['top1']:.4f} (rows that the method saw: `gori eval --against` says what it is worth)"
        )
    console.result(body, as_json, "\n".join(lines))
