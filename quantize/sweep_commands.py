"""`gori sweep`: what it is given, in which order its parts run, and what it prints."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gori import console
from gori.errors import GoriError
from gori.options import json_option, out_option, set_option

if TYPE_CHECKING:
    from gori.quantize.sweep import Row, Setting, Sweep
    from gori.quantize.sweep_result import Request
    from gori.quantize.workers import Engine

ROWS, ROUNDS, TRIALS = 600, 3, 24


def names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...]:
    """A list that is written with commas."""
    return tuple(n for n in (part.strip() for part in (text or "").split(",")) if n)


def numbers(c: click.Context, p: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(n) for n in names(c, p, text))
    except ValueError as e:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 4.3,4.6", c, p) from e


@click.command(
    epilog="Example: gori sweep demo/distill --budget size=1MB,calls=0.95 --out sweep  ·  Started again with the same "
    "--out it goes on where it was."
)
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_option
@click.option("--budget", help="What the device allows, as in size=8MB,rss=64MB,decode=300,calls=0.97.")
@click.option("--target", "targets", multiple=True, help="Repeatable; default: executorch.")
@click.option("--schemes", callback=names, help="With commas, as in w4a8-g32,w8a8-channel; default: by target.")
@click.option("--methods", callback=names, help="With commas; default: rtn,mse,gptq,rotate+gptq.")
@click.option(
    "--embeddings", callback=names, help="With commas; `matching` follows the linears. Default: w4-g32,w8-channel."
)
@click.option("--bits-per-weight", callback=numbers, help="Candidates with mixed precision, too, as in 4.3,4.6.")
@click.option("--search", type=click.Choice(["grid", "optuna"]), default="grid", show_default=True)
@click.option(
    "--trials", type=click.IntRange(1), default=TRIALS, show_default=True, help="Candidates that optuna tries."
)
@click.option("--sampler", type=click.Choice(["tpe", "nsga"]), default="tpe", show_default=True, help="Of optuna.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--data", multiple=True, type=click.Path(path_type=Path), help="Rows to answer; default: the run's tests."
)
@click.option("--calibration", multiple=True, type=click.Path(path_type=Path), help="Default: the run's training rows.")
@click.option("--rows", type=click.IntRange(1), default=ROWS, show_default=True, help="Test rows that are answered.")
@click.option("--samples", type=click.IntRange(1), help="Rows a method looks at; default: as many as it wants.")
@click.option("--workers", type=click.IntRange(1), help="Candidates at once; default: the cores.")
@click.option("--rounds", type=click.IntRange(0), default=ROUNDS, show_default=True, help="Of measuring speeds.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the engine, for speeds.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", help="Of the Ray cluster; default: auto.")
@click.option("--students", is_flag=True, help="CHECKPOINTS is a recipe: size, train and sweep students for --budget.")
@click.option("--shapes", type=click.IntRange(1), default=6, show_default=True, help="Of students that train shortly.")
@click.option("--finalists", type=click.IntRange(1), default=2, show_default=True, help="Of them, trained in full.")
@click.option(
    "--short", type=click.FloatRange(0, 1, min_open=True), default=0.15, show_default=True, help="Share of the steps."
)
@set_option
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@click.option("--dry-run", is_flag=True, help="Name the candidates and what is left out.")
@json_option
def sweep(checkpoints: tuple[Path, ...], out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Try schemes × methods × embeddings on CHECKPOINTS, each candidate exported and run by its real engine; a table,
    OUT/report.html, and the winner under a budget (exit 3 with the nearest misses where none fits)."""
    from gori.quantize.sweep_result import finish

    if dry_run and options["students"]:
        raise GoriError("--students trains before it knows its candidates: --dry-run goes with checkpoints")
    if options["students"]:
        request = sized(checkpoints, out, options)
    else:
        request = read({str(p): p for p in checkpoints}, options)
    for reason, count in request.left_out.items():
        console.log(f"left out: {reason} ({count} combination{'s' if count > 1 else ''})")
    if dry_run:
        plan(request, as_json)
        return
    rows, meta = work(request, out)
    finish(request, out, rows, meta, as_json)


def sized(recipes: Sequence[Path], out: Path, options: Mapping[str, Any]) -> Request:
    """Students that fit the budget, trained as a recipe says; the grid is the recipe's scheme where none is named."""
    from gori.quantize import budget
    from gori.recipe import load
    from gori.students import run_students

    if len(recipes) != 1 or not options["budget"]:
        raise GoriError(
            "--students sizes the students of one recipe for a budget: gori sweep RECIPE --students --budget …"
        )
    recipe = load(recipes[0], options["overrides"])
    target, *others = options["targets"] or ("executorch",)
    if others:
        raise GoriError(f"--students sizes for one target: name {target} or {others[0]}")
    found = run_students(
        recipe,
        out,
        budget.parse(options["budget"]),
        target=target,
        candidates=options["shapes"],
        finalists=options["finalists"],
        short=options["short"],
        threads=options["threads"],
        rounds=max(1, options["rounds"]),
    )
    q = recipe.quantize
    grid = {"schemes": (q.scheme,), "methods": (q.method,), "embeddings": (q.embedding or "matching",)}
    chosen = {**options, "targets": (target,), **{k: options[k] or v for k, v in grid.items()}}
    return read(found.students, chosen, {"students": found.facts})


def read(students: Mapping[str, Path], options: Mapping[str, Any], facts: dict[str, Any] | None = None) -> Request:
    """Check all that can be checked before anything is made."""
    from gori import checkpoint, quantized
    from gori.quantize import budget, space
    from gori.quantize.sweep_result import Request

    widths = {}
    for name, path in students.items():
        if path.is_file():
            raise GoriError(
                f"{path} is a file: name checkpoint folders, or size the students of a recipe with --students"
            )
        cfg = checkpoint.read_config(path)
        if quantized.is_quantized(path):
            raise GoriError(f"{path} is quantized already: sweep over the float student that it was made from")
        heads = {"heads * head_dim": cfg.heads * cfg.head_dim, "intermediate_size": cfg.intermediate_size}
        widths[name] = {"hidden_size": cfg.hidden_size, **heads}
    everything = space.space(
        list(students),
        options["targets"],
        options["schemes"],
        options["methods"],
        options["embeddings"],
        options["bits_per_weight"],
    )
    candidates, left_out = space.split(everything, widths)
    bounds = budget.parse(options["budget"]) if options["budget"] else None
    return Request(dict(students), candidates, left_out, bounds, options, facts or {})


def plan(request: Request, as_json: bool) -> None:
    """What `--dry-run` prints."""
    from gori.quantize.sweep_report import candidate_label

    labels = [candidate_label(c.as_dict()) for c in request.candidates]
    body = {"candidates": [c.as_dict() for c in request.candidates], "left_out": request.left_out}
    console.result(body, as_json, "\n".join([*labels, f"{request.total} candidates would be measured"]))


def work(request: Request, out: Path) -> tuple[list[Row], dict[str, Any]]:
    """Measure every candidate, then speeds; the rows, and what the report says of how they came about."""
    from gori import candidate
    from gori.artifact import os_errors
    from gori.quantize.journal import Journal
    from gori.quantize.sweep import Sweep, measure_speeds

    o = request.options
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    setting, facts = prepared(request, out)
    journal = Journal(out)
    with shown(request) as show, engine(request) as running:
        run = Sweep(setting, journal, running, show, o["retry_failed"])
        run.run(request.search())
    check_any(run)
    machine = platform.node()
    measure_speeds(run, candidate.speed, machine, o["threads"], o["rounds"])
    return run.with_speeds(machine, o["threads"]), {**facts, "machine": machine}


def prepared(request: Request, out: Path) -> tuple[Setting, dict[str, Any]]:
    """The rows on disk, and what all candidates have in common."""
    from gori import candidate
    from gori.artifact import content_hash, sha256_file
    from gori.quantize.sweep import Setting
    from gori.quantize.sweep_data import CALIBRATION, TEST, prepare

    o = request.options
    lengths = {p: candidate.longest_row(p) for p in request.students.values()}
    facts = prepare(out, lengths, o["data"], o["calibration"], o["rows"], o["seed"])
    hashes = {name: content_hash(p) for name, p in request.students.items()}
    data = {name: sha256_file(out / "data" / name) for name in (TEST, CALIBRATION)}
    setting = Setting(out.resolve(), request.students, hashes, data, o["samples"], o["seed"])
    return setting, {**facts, "checkpoints": hashes, "data": data}


@contextmanager
def engine(request: Request) -> Iterator[Engine]:
    """Where candidates are worked on, ended whatever happens."""
    from gori import candidate
    from gori.parallel import cores

    o = request.options
    if o["engine"] == "ray":
        from gori.quantize.cluster import Cluster
        from gori.targets import TARGETS

        packages = {p for c in request.candidates for p in TARGETS[c.target].packages}
        found: Engine = Cluster(candidate.run, o["address"], sorted(packages))
    else:
        from gori.quantize.workers import Local

        found = Local(candidate.run, o["workers"] or cores())
    try:
        yield found
    finally:
        found.close()


@contextmanager
def shown(request: Request) -> Iterator[Any]:
    """A live table on a terminal, else a line for each candidate that is finished."""
    from gori.quantize.sweep_report import candidate_label, live_table
    from gori.quantize.sweep_result import alike

    hidden = alike(request)
    if not sys.stderr.isatty():
        said: set[str] = set()

        def log(rows: list[Row], running: list[dict[str, Any]]) -> None:
            for row in rows:
                if row["key"] not in said:
                    said.add(row["key"])
                    what = row["error"] or f"{row['seconds']:.0f} s"
                    label = candidate_label(row["candidate"], hidden)
                    console.log(f"{len(said)}/{request.total} {label}: {row['state']}, {what}")

        yield log
        return
    from rich.live import Live

    with Live(console=console.stderr, refresh_per_second=2, transient=True) as live:
        yield lambda rows, running: live.update(live_table(rows, running, request.total))


def check_any(run: Sweep) -> None:
    """Refuse to go on where nothing was made: there is no table."""
    rows = run.rows()
    if rows and all(r["state"] == "failed" for r in rows):
        raise GoriError(
            f"all {len(rows)} candidates failed, the first with: {rows[0]['error']} (mend it and use --retry-failed)"
        )
