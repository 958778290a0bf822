"""The C++ runner's figures on an artifact: warm calls, first token, cold start, memory, the price of the grammar; and,
asked to, its answers beside Python's on the same program.

    python benchmarks/runner.py demo/export/executorch demo/data/template.jsonl … [--python]

Everything is measured by running build/gori-call, on one thread. A busy machine lengthens every time: passes are
repeated and the forms interleaved, the best pass is given beside the median one, and ratios are of medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gori.calls import Call, same_calls
from gori.data import Conversation, read_conversations
from gori.runtime.evaluation import functions_of

PROGRAM = Path(__file__).parents[1] / "build" / "gori-call"


def lines(artifact: Path, said: Sequence[str], *options: str) -> tuple[list[str], list[dict[str, float]]]:
    """Answers and timings of one process for all utterances."""
    command = [PROGRAM, "--timing", *options, artifact]
    text = "".join(s.replace("\n", " ") + "\n" for s in said)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    answers, timings = done.stdout.splitlines(), [json.loads(t) for t in done.stderr.splitlines()]
    assert len(answers) == len(timings) == len(said)
    return answers, timings


def spread(values_ms: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values_ms, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def warm(artifact: Path, said: Sequence[str], passes: int) -> dict[str, Any]:
    """Whole calls and first tokens over all utterances, and the price of the grammar on answers of equal length."""
    bound, free = [], []
    for _ in range(passes):
        bound.append(lines(artifact, said)[1])
        free.append(lines(artifact, said, "--text")[1])
    whole = sorted((spread([t["total_ms"] for t in p[1:]]) for p in bound), key=lambda s: s["p50"])
    first = sorted((spread([t["first_token_ms"] for t in p[1:]]) for p in bound), key=lambda s: s["p50"])
    alike = [
        i for i, (a, b) in enumerate(zip(bound[0], free[0], strict=True)) if a["answer_tokens"] == b["answer_tokens"]
    ]
    middle = [[statistics.median(p[i]["total_ms"] for p in form) for i in alike] for form in (bound, free)]
    ratios = [a / b for a, b in zip(*middle, strict=True)]
    tokens, forced = (sum(t[k] for t in bound[0]) for k in ("answer_tokens", "forced_tokens"))
    return {
        "call_ms": {"best": whole[0], "median": whole[len(whole) // 2]},
        "first_token_ms": {"best": first[0], "median": first[len(first) // 2]},
        "answer_tokens": tokens / len(said),
        "forced_share": forced / tokens,
        "constrained_over_free": statistics.median(ratios),
        "answers_of_equal_length": len(alike),
    }


def cold(artifact: Path, said: str, runs: int) -> dict[str, float]:
    """From the start of a process to its first answer, and its largest resident memory then."""
    elapsed, resident = [], []
    for _ in range(runs):
        began = time.perf_counter()
        with subprocess.Popen([PROGRAM, artifact], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(said + "\n")
            process.stdin.flush()
            assert process.stdout.readline()
            elapsed.append((time.perf_counter() - began) * 1e3)
            # not ru_maxrss: that begins with what the parent held when it forked
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    peak_mib, file_mib = statistics.median(resident), (artifact / "model.pte").stat().st_size / 2**20
    return {
        "start_to_answer_ms_best": min(elapsed),
        "start_to_answer_ms_median": statistics.median(elapsed),
        "peak_rss_mib": peak_mib,
        "peak_rss_above_pte_mib": peak_mib - file_mib,
    }


def calls_of(answer: str) -> list[Call]:
    return [Call(c["name"], c["arguments"]) for c in json.loads(answer)]


def beside_python(artifact: Path, rows: Sequence[Conversation]) -> dict[str, int]:
    """How many answers are Python's on the same .pte, and how many are right, constrained and free."""
    from gori.runtime.caller import Caller

    said = [r.utterance for r in rows]
    answers, timings = lines(artifact, said)
    caller = Caller.open(artifact)
    out = Counter[str]()
    for row, answer, timing in zip(rows, answers, timings, strict=True):
        bound, free = caller.call(row.utterance), caller.call(row.utterance, constrained=False)
        assert bound.calls is not None
        counts = (len(bound.ids) + 1, bound.forced_tokens, bound.prompt_tokens)
        out["rows"] += 1
        out["same_calls"] += calls_of(answer) == bound.calls
        out["same_token_counts"] += counts == tuple(
            timing[k] for k in ("answer_tokens", "forced_tokens", "prompt_tokens")
        )
        out["right"] += same_calls(bound.calls, row.answer.calls or ())
        out["right_free"] += free.calls is not None and same_calls(free.calls, row.answer.calls or ())
        out["free_differs"] += free.ids != bound.ids
        out["free_invalid"] += free.calls is None
    return dict(out)


@click.command()
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--python", "with_python", is_flag=True, help="Also compare with Python's answers.")
@click.option("--passes", default=5, help="Passes over all utterances in each form.")
@click.option("--runs", default=40, help="Processes for the cold start.")
def main(artifact: Path, files: tuple[Path, ...], with_python: bool, passes: int, runs: int) -> None:
    functions = functions_of(artifact)
    rows = [r for f in files for r in read_conversations(f, functions)]
    said = [r.utterance for r in rows]
    out: dict[str, Any] = {"rows": len(rows), **warm(artifact, said, passes), **cold(artifact, said[0], runs)}
    if with_python:
        out["beside_python"] = beside_python(artifact, rows)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
