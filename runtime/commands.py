"""`gori call`, `gori chat`, `gori eval`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gori import console
from gori.calls import CallError, as_gleo, parse, plain
from gori.data import Conversation, Turn
from gori.errors import GoriError
from gori.options import json_option

if TYPE_CHECKING:
    from gori.calls import Function
    from gori.runtime.caller import Caller

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the engine's choice.")
kv_option = click.option(
    "--kv", type=click.Choice(["float32", "q8_0"]), help="What a .gguf's keys and values are kept in."
)
sampling = (
    click.option("--seed", type=int, help="Sample with this seed; default: greedy."),
    click.option("--temperature", type=float, default=1.0, show_default=True),
    click.option("--top-k", type=int, default=0, show_default=True),
    click.option("--top-p", type=float, default=1.0, show_default=True),
)


def sampled(command: Any) -> Any:
    for option in reversed(sampling):
        command = option(command)
    return command


def _caller(artifact: Path, threads: int | None, kv: str | None) -> Caller:
    from gori.runtime.caller import Caller

    return Caller.open(artifact, threads, kv)


@click.command(epilog='Example: gori call demo/export/executorch "조수석 창문 반만 열어줘"')
@artifact_argument
@click.argument("utterance")
@click.option("--gleo", is_flag=True, help="Gleo's action JSON: packageName, action, actionParameters.")
@click.option("--free", is_flag=True, help="Let the model say anything; an answer that is no call is then an error.")
@threads_option
@kv_option
@sampled
@json_option
def call(
    artifact: Path,
    utterance: str,
    gleo: bool,
    free: bool,
    threads: int | None,
    kv: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Answer one UTTERANCE with the function call that ARTIFACT makes of it, as JSON."""
    from gori.runtime.generate import picker

    if not utterance.strip():
        raise GoriError("the utterance is empty: say something")
    caller = _caller(artifact, threads, kv)
    answer = caller.call(utterance, constrained=not free, pick=picker(**how))
    if answer.calls is None:
        try:
            parse(answer.text, caller.functions)
        except CallError as e:
            raise GoriError(f"the model's answer is no call of its tools ({e}): {answer.text!r}") from e
        raise GoriError(f"{artifact} carries no tools, so its answer is no call: {answer.text!r}")
    calls = [as_gleo(c, caller.functions) if gleo else plain(c) for c in answer.calls]
    body = {
        "calls": calls,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": len(answer.ids),
        "forced_tokens": answer.forced_tokens,
        "first_token_ms": round(answer.first_token_ms, 2),
        "latency_ms": round(answer.total_ms, 2),
        "alternatives": [{"name": n, "probability": round(p, 4)} for n, p in answer.alternatives],
        "engine": caller.session.info.engine,
    }
    console.result(body if as_json else None, as_json, json.dumps(calls, ensure_ascii=False))


@click.command(epilog="Example: gori chat demo/export/executorch  ·  /reset forgets, /quit or Ctrl-D ends.")
@artifact_argument
@threads_option
@kv_option
@sampled
def chat(artifact: Path, threads: int | None, kv: str | None, **how: Any) -> None:
    """Talk with ARTIFACT turn by turn; answers appear as they are made."""
    from gori.runtime.generate import picker

    caller, turns = _caller(artifact, threads, kv), []
    for line in _lines():
        if line == "/reset":
            turns = []
            continue
        if line == "/quit":
            return
        turns.append(Turn("user", line))
        answer = caller.answer(turns, constrained=False, pick=picker(**how), on_text=_say)
        print()
        calls = None if answer.calls is None else tuple(answer.calls)
        turns.append(Turn("assistant", answer.text.strip() if calls is None else None, calls))


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


@click.command("eval", epilog="Example: gori eval demo/quantize --data demo/data/template.jsonl --against demo/distill")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_files",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Conversations, JSON Lines; several times for several splits.",
)
@click.option("--tools", type=click.Path(path_type=Path), help="Tools file; default: the one beside the model.")
@click.option("--against", type=click.Path(path_type=Path), help="A reference: calls kept, flips, KL, perplexity.")
@click.option("--gate", "gates", multiple=True, help="Exit 3 where a figure misses a bound, as in 'calls >= 0.99'.")
@click.option("--rows", type=click.IntRange(1), help="So many of each file, drawn from a fixed seed; default: all.")
@click.option(
    "--constrained", is_flag=True, help="Answers of MODEL that can be nothing but calls, as `gori call` makes."
)
@click.option(
    "--failures", type=click.IntRange(0), default=0, help="Print so many rows that were not exact, on stderr."
)
@threads_option
@json_option
def evaluate_command(
    model: Path,
    data_files: tuple[Path, ...],
    tools: Path | None,
    against: Path | None,
    gates: tuple[str, ...],
    rows: int | None,
    constrained: bool,
    failures: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Exact call match of MODEL (a checkpoint or an artifact) per language, by really generating every answer, and how
    far it is from a reference; shares and differences with 95 % intervals."""
    from gori.calls import read_tools
    from gori.runtime import eval_report as report
    from gori.runtime.evaluation import evaluate_model, functions_of, read_splits

    functions = read_tools(tools) if tools else functions_of(model)
    tests = read_splits(data_files, functions, rows)
    wanted = [report.read_gate(g) for g in gates]
    if wanted:
        known = [{"split": s, "language": c.language} for s, some in tests.items() for c in some]
        report.rehearse(wanted, known, against is not None)
    tokens, theirs = _reference(model, against, tests, functions, threads) if against else ({}, None)
    answers = evaluate_model(model, tests, functions, model.name, threads, constrained=constrained)
    body = report.body(answers, theirs, functions, tokens)
    verdicts = report.judge(wanted, body)
    for a in [a for a in answers if not a["exact"]][:failures]:
        console.log(f"{a['utterance']}\n  wanted {a['wanted']}\n  got    {a['answer']}")
    lines = report.gate_lines(verdicts, body["n"])
    console.result(body | ({"gates": verdicts} if wanted else {}), as_json, report.table(body))
    if lines and not as_json:
        print("\n".join(lines))
    report.refuse_missed(verdicts)


def _reference(
    model: Path,
    against: Path,
    tests: dict[str, list[Conversation]],
    functions: dict[str, Function],
    threads: int | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How far the model is from the reference token by token, and the reference's answers."""
    from gori.runtime.evaluation import compare, evaluate_model, rounding_of

    tokens = compare(model, against, [c for some in tests.values() for c in some], threads)
    return tokens, evaluate_model(against, tests, functions, against.name, threads, rounding_of(model))
