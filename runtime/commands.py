"""`gori call`, `gori chat`, `gori eval`, `gori bench`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gori import console
from gori.calls import ASSISTANT, END, Call, CallError, parse
from gori.data import Conversation, Turn, encode, prompt_ids
from gori.errors import GoriError
from gori.options import json_option

if TYPE_CHECKING:
    from gori.calls import Function
    from gori.runtime.session import Session
    from gori.tokenizer import Tokenizer

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the engine's choice.")
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


def _open(artifact: Path, threads: int | None) -> tuple[Session, Tokenizer, list[int]]:
    from gori.runtime.session import open_session
    from gori.tokenizer import Tokenizer, eos_ids

    session = open_session(artifact, threads)
    directory = artifact if artifact.is_dir() else artifact.parent
    return session, Tokenizer.load(directory), eos_ids(directory)


@click.command(epilog='Example: gori call demo/export/executorch "조수석 창문 반만 열어줘"')
@artifact_argument
@click.argument("utterance")
@threads_option
@sampled
@json_option
def call(artifact: Path, utterance: str, threads: int | None, as_json: bool, **how: Any) -> None:
    """Answer one UTTERANCE with the function call that ARTIFACT makes of it, as JSON."""
    from gori.runtime.evaluation import functions_of
    from gori.runtime.generate import generate

    if not utterance.strip():
        raise GoriError("the utterance is empty: say something")
    session, tokenizer, end = _open(artifact, threads)
    functions = functions_of(artifact if artifact.is_dir() else artifact.parent)
    prompt = prompt_ids(Conversation((Turn("user", utterance), Turn("assistant", None, ()))), tokenizer)
    began = time.perf_counter()
    ids = list(generate(session, prompt, end, **how))
    latency_ms = (time.perf_counter() - began) * 1e3
    text = tokenizer.decode(ids)
    try:
        calls = parse(text, functions)
    except CallError as e:
        raise GoriError(f"the model's answer is no call of its tools ({e}): {text!r}") from e
    body = {
        "calls": [_plain(c) for c in calls],
        "prompt_tokens": len(prompt),
        "answer_tokens": len(ids),
        "latency_ms": round(latency_ms, 2),
        "engine": session.info.engine,
    }
    console.result(body if as_json else None, as_json, _as_text(calls))


def _plain(c: Call) -> dict[str, Any]:
    return {"name": c.name, "arguments": dict(c.arguments)}


def _as_text(calls: list[Call]) -> str:
    import json

    return json.dumps([_plain(c) for c in calls], ensure_ascii=False)


@click.command(epilog="Example: gori chat demo/export/executorch  ·  /reset forgets, /quit or Ctrl-D ends.")
@artifact_argument
@threads_option
@sampled
def chat(artifact: Path, threads: int | None, **how: Any) -> None:
    """Talk with ARTIFACT turn by turn; answers appear as they are made."""
    session, tokenizer, end = _open(artifact, threads)
    turns: list[Turn] = []
    for line in _lines():
        if line == "/reset":
            turns, _ = [], session.reset()
            continue
        if line == "/quit":
            return
        turns.append(Turn("user", line))
        turns.append(Turn("assistant", _answer(session, tokenizer, end, turns, how)))


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _answer(session: Session, tokenizer: Tokenizer, end: list[int], turns: list[Turn], how: dict[str, Any]) -> str:
    """Stream one answer; what the cache already holds of the conversation is not computed again."""
    from gori.runtime.generate import Utf8Stream, generate
    from gori.runtime.session import Snapshot

    prompt: list[int] = []
    for t in turns:
        if t.role == "user":
            prompt += encode(Conversation((t,)), tokenizer).ids
        else:  # what was said is markup: its calls are special tokens
            said = tokenizer.encode_markup(t.content or "")
            prompt += [tokenizer.id(ASSISTANT), *said, tokenizer.id(END)]
    prompt.append(tokenizer.id(ASSISTANT))
    session.restore(Snapshot(tuple(prompt[:-1])))
    stream, ids = Utf8Stream(tokenizer), []
    for token in generate(session, prompt[-1:], end, **how):
        ids.append(token)
        print(stream.push(token), end="", flush=True)
    print(stream.close())
    return tokenizer.decode(ids)


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
    answers = evaluate_model(model, tests, functions, model.name, threads)
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


@click.command(epilog="Example: gori bench demo/export/executorch --threads 1")
@artifact_argument
@threads_option
@click.option("--prompt", "prompts", multiple=True, type=click.IntRange(1), default=(32, 128, 512), show_default=True)
@click.option("--decode", "decode_tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True)
@json_option
def bench(
    artifact: Path, threads: int | None, prompts: tuple[int, ...], decode_tokens: int, repeats: int, as_json: bool
) -> None:
    """Prefill and decode tokens/s, load time and peak RSS of ARTIFACT on this machine."""
    from gori.runtime.bench import bench as run

    body = run(artifact, threads, prompts, decode_tokens, repeats)
    lines = [f"{body['engine']} {body['engine_version']}, {body['threads']} threads, {body['file_bytes']:,} bytes"]
    lines.append(f"load {body['load_ms']} ms, peak RSS {body['peak_rss_mib']} MiB")
    for name, row in [*((f"prefill({n})", r) for n, r in body["prefill"].items()), ("decode", body["decode"])]:
        lines.append(
            f"{name:<13} {row['tokens_per_second']:>10,.1f} tok/s  p50 {row['p50_ms']} ms  p95 {row['p95_ms']} ms"
        )
    if body["prefill_skipped"]:
        lines.append(f"prefill of {body['prefill_skipped']} tokens exceeds the context and was not measured")
    console.result(body, as_json, "\n".join(lines))
