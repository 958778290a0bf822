"""`gori bench`: artifacts side by side."""

from __future__ import annotations

from pathlib import Path

import click

from gori import console
from gori.options import json_option

AUTO = "auto"


def thread_count(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    """A number of threads, `auto`, or nothing."""
    if text is None or text == AUTO:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither a number of threads, 1 or more, nor {AUTO!r}")
    return int(text)


@click.command(epilog="Example: gori bench out/gguf --against out/executorch --threads 1")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", multiple=True, type=click.Path(path_type=Path), help="Another artifact; repeatable.")
@click.option(
    "--runner",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The C++ runner's gori-bench (`make runner`): times each .pte, too.",
)
@click.option(
    "--threads",
    callback=thread_count,
    metavar="N|auto",
    help="CPU threads; auto: measure what pays for each artifact. Default: the engine's choice.",
)
@click.option("--prompt", "prompts", multiple=True, type=click.IntRange(1), default=(32, 128, 512), show_default=True)
@click.option("--decode", "decoded", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="A fresh process each.")
@json_option
def bench(
    artifact: Path,
    against: tuple[Path, ...],
    runner: Path | None,
    threads: int | str | None,
    prompts: tuple[int, ...],
    decoded: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Speed and memory of ARTIFACT on this machine, and of others beside it, in turn.

    Prefill and decode in tokens/s, time to the first token after 32, loading, memory above the engine's library, and
    how much of the machine's read bandwidth decoding reaches.
    """
    from gori.runtime.bench import compare, entry, runner_entries
    from gori.runtime.bench_report import text
    from gori.runtime.bench_threads import choose

    paths = [artifact, *against]
    for path in paths:
        entry(path, None, prompts, decoded)  # refuse what cannot be run before the first is measured
    choices = [choose(path) if threads == AUTO else None for path in paths]
    counts = [c["chosen"] if c else None if threads is None else int(threads) for c in choices]
    entries = [entry(p, n, prompts, decoded) for p, n in zip(paths, counts, strict=True)]
    if runner:
        entries += runner_entries(runner, list(zip(paths, counts, strict=True)), prompts, decoded)
    body = compare(entries, rounds)
    for found, choice in zip(body["artifacts"], choices, strict=False):
        if choice:
            found["thread_choice"] = choice
    console.result(body, as_json, text(body))
