"""`gori demo`, `gori init`, `gori run`, `gori data …`, `gori doctor`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from gori import console
from gori.errors import GoriError
from gori.options import json_option, out_option, recipe_argument, set_option


@click.command(epilog="Example: gori demo --out demo")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@set_option
@json_option
def demo(out: Path, seed: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Teacher → student → int4 → .pte on the built-in in-car task: a table, OUT/summary.json and OUT/report.html."""
    from gori.recipe import load

    with resources.as_file(resources.files("gori").joinpath("demo.yaml")) as path:
        recipe = load(path, (f"seed={seed}", *overrides))
    _run(recipe, out, "report", False, as_json)


@click.command(epilog="Example: gori run recipe.yaml --out runs/mine --set distill.train.steps=500")
@recipe_argument
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Default: runs/NAME.")
@set_option
@click.option("--until", default="report", show_default=True, help="Last stage to run.")
@click.option("--dry-run", is_flag=True, help="Say what each stage would do.")
@json_option
def run(recipe: Path, out: Path | None, overrides: tuple[str, ...], until: str, dry_run: bool, as_json: bool) -> None:
    """Run every stage of RECIPE; a stage whose inputs and settings are unchanged is skipped."""
    from gori.recipe import load

    loaded = load(recipe, overrides)
    _run(loaded, out or Path("runs") / loaded.name, until, dry_run, as_json)


def _run(recipe: Any, out: Path, until: str, dry_run: bool, as_json: bool) -> None:
    from gori.pipeline import run_recipe

    summary = run_recipe(recipe, out, until, dry_run)
    if summary is not None:
        console.result(summary, as_json, summary_table(summary))
        console.log(f"{out / 'summary.json'}  {out / 'report.html'}")


def summary_table(summary: dict[str, Any]) -> Table:
    """Exact call match of every model on every split, each language, with bytes."""
    first = next(iter(summary["accuracy"].values()))
    splits = list(first)
    both = any("ko" in entry and "en" in entry for entry in first.values())
    table = Table(
        title=f"{summary['name']}: exact calls, %" + ("; below ko/en" if both else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for s in splits:
        table.add_column(s, justify="right", no_wrap=True)
    for model, by_split in summary["accuracy"].items():
        cells = [_cell(by_split[s]) for s in splits]
        table.add_row(model, f"{summary['bytes'][model]:,}", *cells)
    return table


def _cell(entry: dict[str, Any]) -> str:
    languages = [f"{entry[k] * 100:.0f}" for k in ("ko", "en") if k in entry]
    return f"{entry['exact'] * 100:.1f}" + (f"\n{'/'.join(languages)}" if len(languages) > 1 else "")


@click.command(epilog="Example: gori init mine --data calls.jsonl")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", "files", multiple=True, type=click.Path(path_type=Path), help="Your conversations, JSON Lines.")
@click.option("--tools", type=click.Path(path_type=Path), help="Your tools file.")
@json_option
def init(directory: Path, files: tuple[Path, ...], tools: Path | None, as_json: bool) -> None:
    """Write a commented recipe.yaml for your own data into DIRECTORY, the files split into train, dev and test."""
    from gori.init import write_recipe

    path = write_recipe(directory, files, tools)
    console.result({"recipe": str(path)}, as_json, f"{path}: read it, then `gori run {path}`")


@click.group()
def data() -> None:
    """The built-in corpus; checking your own; token shards."""


@data.command(epilog="Example: gori data incar --out incar --seed 1")
@out_option
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--rows", type=click.IntRange(100), default=30000, show_default=True, help="Training rows.")
@click.option("--test-rows", type=click.IntRange(10), default=300, show_default=True, help="Rows of each test split.")
@json_option
def incar(out: Path, seed: int, rows: int, test_rows: int, as_json: bool) -> None:
    """Make the built-in in-car corpus, Korean and English, from a seed."""
    from gori import incar as task
    from gori.artifact import Manifest, make, read_manifest

    manifest = Manifest("data", "incar", seed, {"rows": rows, "test_rows": test_rows}, {})
    make(out, manifest, lambda tmp: task.write(tmp, seed, train=rows, test=test_rows))
    body = read_manifest(out)
    console.result(body, as_json, "\n".join(f"{out / name}: {f['bytes']:,} bytes" for name, f in body["files"].items()))


@data.command(epilog="Example: gori data check calls.jsonl --tools tools.json")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tools", required=True, type=click.Path(path_type=Path), help="OpenAI definitions or Gleo app schemas.")
@json_option
def check(files: tuple[Path, ...], tools: Path, as_json: bool) -> None:
    """Check conversations against their tools; the first bad line is named with file, line and column."""
    from collections import Counter

    from gori.calls import read_tools
    from gori.data import read_conversations

    functions, found = read_tools(tools), {}
    for path in files:
        rows = read_conversations(path, functions)
        found[str(path)] = {
            "rows": len(rows),
            "languages": dict(Counter(c.language for c in rows)),
            "calls": sum(len(c.answer.calls or ()) for c in rows),
            "no_function": sum(c.answer.calls == () for c in rows),
            "text": sum(c.answer.calls is None for c in rows),
        }
    text = "\n".join(f"{p}: " + ", ".join(f"{k} {v}" for k, v in row.items()) for p, row in found.items())
    console.result(found, as_json, text)


@data.command(epilog="Example: gori data tokens books.txt web.jsonl --tokenizer runs/mine/tokenizer --out tokens")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="Folder with tokenizer.json.")
@out_option
@click.option("--shard-tokens", type=click.IntRange(2), default=1 << 27, show_default=True, help="Tokens of one file.")
@json_option
def tokens(files: tuple[Path, ...], tokenizer: Path, out: Path, shard_tokens: int, as_json: bool) -> None:
    """Encode text files and JSON Lines with "text" or "messages" into shards that teacher.train.tokens names."""
    from gori.artifact import read_manifest
    from gori.tokens import write_tokens

    write_tokens(files, tokenizer, out, shard_tokens)
    body = read_manifest(out)
    n, shards = (body["metrics"][k] for k in ("tokens", "shards"))
    text = f"{out}: {n:,} token{'s' if n != 1 else ''} in {shards} shard{'s' if shards != 1 else ''}"
    console.result(body, as_json, text)


@click.command(epilog="Example: gori doctor --json")
@json_option
def doctor(as_json: bool) -> None:
    """What is installed, which targets and engines work here, and which extra enables the rest."""
    from gori.doctor import findings

    rows = findings()
    table = Table(show_edge=False)
    for column in ("what", "works here", "version", "mend"):
        table.add_column(column)
    for r in rows:
        table.add_row(r["name"], "yes" if r["works"] else "no", r["version"], r["mend"])
    console.result({"needs": rows}, as_json, table)
    if missing := [r["name"] for r in rows if r["needed"] and not r["works"]]:
        raise GoriError(f"gori itself needs {', '.join(missing)}: run `pip install gori` again")
