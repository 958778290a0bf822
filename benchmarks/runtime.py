"""One student's integers as .pte and as .gguf, timed in turn: by gori's sessions and by llama.cpp's own llama-bench.

    python benchmarks/runtime.py make --out /tmp/bench100 --scheme w4a8-g32       # 100M, random: both files
    python benchmarks/runtime.py time /tmp/bench100/w4a8-g32 --llama-bench llama.cpp/build/bin/llama-bench

The first column is llama-bench, of a llama.cpp built for this machine (`cmake -B build -DCMAKE_BUILD_TYPE=Release
-DGGML_NATIVE=ON -DLLAMA_CURL=OFF`), at its own defaults: float16 caches, repacked weights, flash attention where it
chooses so. Its tokens are timed one by one, after as many as the others have read (`-n 1 -d 32`): of a longer run it
tells the mean alone, which other work on the machine moves more than a median. The second is the .gguf through gori's
session (xllamacpp's wheel, built for AVX2, float32 caches), the third the .pte, the fourth the .pte in the C++ runner
(`--runner build/gori-bench`). A round is a process for each, and ratios are of rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from gori.children import printed
from gori.export.build import export
from gori.quantize.stage import quantize
from gori.runtime.bench import Entry, Round, compare, entry, runner_entries
from gori.runtime.bench_report import text
from gori.runtime.bench_round import FIRST_TOKEN_PROMPT

PROMPT, DECODED, PROMPTS = 128, 64, 3
TARGETS = ("gguf", "executorch")


def make(a: argparse.Namespace) -> None:
    """A student with random weights, quantized once, exported twice."""
    from export_cost import random_student

    student, _ = random_student(a.out / "student", a.layers, a.hidden, a.vocab)
    quantize(student, a.scheme, None, "rtn", a.out / a.scheme / "quantize")
    for target in TARGETS:
        export(target, a.out / a.scheme / "quantize", a.out / a.scheme / target, context=a.context)


def time(a: argparse.Namespace) -> None:
    """The comparison; `--json` keeps all of it."""
    gguf, pte = (a.directory / t for t in TARGETS)
    entries = [entry(p, a.threads, (PROMPT,), DECODED) for p in (gguf, pte)]
    if a.runner:
        entries += runner_entries(a.runner, [(pte, a.threads)], (PROMPT,), DECODED)
    if a.llama_bench:
        measure = partial(llama_bench, a.llama_bench, gguf / "model.gguf", a.threads)
        entries.insert(0, Entry(f"llama-bench {gguf}", measure, gguf))
    body = compare(entries, a.rounds)
    print(text(body))
    if a.json:
        a.json.write_text(json.dumps(body, indent=1) + "\n")


def llama_bench(program: Path, file: Path, threads: int, *, depth: int = FIRST_TOKEN_PROMPT) -> Round:
    """A round of llama.cpp's own benchmark: prompts in an empty context, and single tokens after `depth`."""
    common = [str(program), "-m", str(file), "-t", str(threads), "-o", "json"]
    (prompt,) = printed([*common, "-p", str(PROMPT), "-n", "0", "-r", str(PROMPTS)], "llama-bench's prompt")
    single = ["-p", "0", "-n", "1", "-d", str(depth), "-r", str(DECODED)]
    (tokens,) = printed([*common, *single], "llama-bench's decode")
    return {
        "engine": "llama-bench",
        "engine_version": prompt["build_commit"],
        "threads": threads,
        "file_bytes": file.stat().st_size,
        "context": None,
        "stand_in": False,
        "load_ms": None,
        "rss_mib": None,
        "peak_rss_mib": None,
        "prompt_skipped": [],
        "first_token_prompt": depth,
        "decode_tokens": 1,
        "prefill_ms": {str(PROMPT): milliseconds(prompt)},
        "first_token_ms": [],
        "decode_ms": milliseconds(tokens),
    }


def milliseconds(found: dict[str, Any]) -> list[float]:
    """Of every repetition."""
    assert abs(statistics.mean(found["samples_ns"]) / found["avg_ns"] - 1) < 0.01, found
    return [ns / 1e6 for ns in found["samples_ns"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    maker = verbs.add_parser("make", help="write OUT/SCHEME/{quantize,gguf,executorch}")
    maker.set_defaults(run=make)
    maker.add_argument("--out", type=Path, required=True)
    maker.add_argument("--scheme", default="w4a8-g32", help="w8a8-channel is llama.cpp's Q8_0 with repeated scales")
    maker.add_argument("--layers", type=int, default=12)
    maker.add_argument("--hidden", type=int, default=768)
    maker.add_argument("--vocab", type=int, default=32000)
    maker.add_argument("--context", type=int, default=1024)
    timer = verbs.add_parser("time", help="compare DIRECTORY/gguf and DIRECTORY/executorch")
    timer.set_defaults(run=time)
    timer.add_argument("directory", type=Path)
    timer.add_argument("--llama-bench", type=Path, help="llama.cpp's program; without it the two sessions alone")
    timer.add_argument("--runner", type=Path, help="the C++ runner's gori-bench; without it Python's session alone")
    timer.add_argument("--threads", type=int, default=1)
    timer.add_argument("--rounds", type=int, default=7)
    timer.add_argument("--json", type=Path, help="write every figure there")
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
