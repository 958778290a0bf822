"""`gori distill`."""

from __future__ import annotations

from pathlib import Path

import click

from gori import console
from gori.artifact import read_manifest
from gori.options import json_option, out_option, recipe_argument, set_option


@click.command(epilog="Example: gori distill examples/incar/recipe.yaml --out runs/incar --set student.layers=2")
@recipe_argument
@out_option
@set_option
@json_option
def distill(recipe: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run a RECIPE up to its student, which lands in OUT/distill (its control in OUT/control)."""
    from gori.pipeline import run_recipe
    from gori.recipe import load

    run_recipe(load(recipe, overrides), out, until="control")
    body = read_manifest(out / "distill")
    m = body["metrics"]
    text = f"{out / 'distill'}: {m['parameters']:,} parameters, dev exact {m['final']['dev_exact']:.3f}"
    console.result(body, as_json, text)
