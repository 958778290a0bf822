"""`gori teacher …`."""

from __future__ import annotations

from pathlib import Path

import click

from gori import console, ranks
from gori.artifact import read_manifest
from gori.errors import GoriError
from gori.options import json_option, out_option, recipe_argument, set_option


@click.group()
def teacher() -> None:
    """Train a mixture-of-experts teacher, or take one that exists, and write down what it knows."""


@teacher.command(epilog="Example: gori teacher train examples/incar/recipe.yaml --out runs/incar")
@recipe_argument
@out_option
@set_option
@json_option
def train(recipe: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run a RECIPE's data, tokenizer and teacher stages; the teacher lands in OUT/teacher."""
    from gori.pipeline import run_recipe
    from gori.recipe import load

    loaded = load(recipe, overrides)
    if not loaded.has_teacher or loaded.teacher.path:
        named = loaded.teacher.path or "that of a finished cache"
        raise GoriError(f"the recipe's teacher is {named}: there is nothing to train")
    run_recipe(loaded, out, until="teacher")
    body = read_manifest(out / "teacher")
    m = body["metrics"]
    text = f"{out / 'teacher'}: {m['parameters']:,} parameters, dev exact {m['final']['dev_exact']:.3f}"
    console.result(body, as_json, text)


@teacher.command("import", epilog="Example: gori teacher import Qwen3-30B-A3B --out teachers/qwen3 --device-map auto")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@out_option
@click.option("--dtype", type=click.Choice(["bf16", "float32", "float16"]), default="bf16", show_default=True)
@click.option("--device-map", default="cpu", show_default=True, help="cpu, or what accelerate takes, as in auto.")
@click.option("--bits", type=click.Choice(["4", "16"]), default="16", show_default=True, help="Of its weights.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the folder brings.")
@json_option
def import_(
    folder: Path, out: Path, dtype: str, device_map: str, bits: str, trust_remote_code: bool, as_json: bool
) -> None:
    """Take FOLDER, any causal LM that transformers loads, as a teacher; its weights stay where they are."""
    from gori.teacher.foreign import Loading, import_teacher

    import_teacher(folder, Loading(dtype, device_map, int(bits), trust_remote_code), out)
    body = read_manifest(out)
    m = body["metrics"]
    text = (
        f"{out}: {m['architecture']}, {m['parameters']:,} parameters, {m['active_parameters']:,} of them active, "
        f"vocabulary {m['vocab_size']:,}"
    )
    console.result(body, as_json, text)


@teacher.command(epilog="Example: gori teacher cache recipe.yaml --out runs/mine --set cache.epochs=4")
@recipe_argument
@out_option
@set_option
@click.option("--cluster", type=click.Choice(["ray"]), help="Divide the shards over a Ray cluster that runs already.")
@click.option("--address", default="auto", show_default=True, metavar="HOST:PORT", help="Of the Ray cluster.")
@json_option
def cache(
    recipe: Path, out: Path, overrides: tuple[str, ...], cluster: str | None, address: str, as_json: bool
) -> None:
    """Run a RECIPE up to its cache: a few of the teacher's probabilities at each answer token, in OUT/cache.

    Continues where it was cut off. Under torchrun every rank makes its part of the shards.
    """
    from gori.pipeline import run_recipe
    from gori.recipe import load

    loaded = load(recipe, overrides)
    if loaded.cache is None:
        raise GoriError(f"{recipe} has no section `cache`: write `cache: {{}}`, or give --set cache.k=32")
    if loaded.cache.path:
        raise GoriError(f"cache.path {loaded.cache.path} names a finished cache: there is nothing to make")
    run_recipe(loaded, out, until="cache", ray=address if cluster else None)
    if not ranks.current().first:
        return
    body = read_manifest(out / "cache")
    m = body["metrics"]
    text = (
        f"{out / 'cache'}: {m['answer_tokens']:,} answer tokens in {m['shards']} shards, "
        f"{m['entries_per_answer_token']:.1f} entries and {m['bytes_per_answer_token']:.1f} bytes each"
    )
    console.result(body, as_json, text)
