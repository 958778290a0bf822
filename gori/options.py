"""Click options that more than one room's commands share."""

from __future__ import annotations

from pathlib import Path

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to write."
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe's key, as in distill.train.steps=500.",
)
recipe_argument = click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
