"""`gori teacher …`."""

from __future__ import annotations

from pathlib import Path

import click

from gori import console
from gori.artifact import read_manifest
from gori.options import json_option, out_option, recipe_argument, set_option


@click.group()
def teacher() -> None:
    """Train a mixture-of-experts teacher."""


@teacher.command(epilog="Example: gori teacher train examples/incar/recipe.yaml --out runs/incar")
@recipe_argument
@out_option
@set_option
@json_option
def train(recipe: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run a RECIPE's data, tokenizer and teacher stages; the teacher lands in OUT/teacher."""
    from gori.pipeline import run_recipe
    from gori.recipe import load

    run_recipe(load(recipe, overrides), out, until="teacher")
    body = read_manifest(out / "teacher")
    m = body["metrics"]
    text = f"{out / 'teacher'}: {m['parameters']:,} parameters, dev exact {m['final']['dev_exact']:.3f}"
    console.result(body, as_json, text)
