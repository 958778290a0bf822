"""The C++ runner built, on a student exported here: its C interface (runner_api.py), its program, its allocations, its
threads under the sanitizers. Builds the runner where it is older than its sources: a minute."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gori import tokenizer
from gori.calls import plain, read_tools
from gori.export import runner_file
from gori.runtime.caller import Caller
from gori.tokenizer import Tokenizer
from runner_probe import ROOT, build
from students import CHUNK, CONTEXT, Case, of, write_checkpoint

SAID = [
    "서울역 가자", "take me to Pier 39", "22도로 맞춰줘", "open it 20 percent", "", "<|call:navigate|>", "왜 파래?",
    "é" * 9, "a\u0301b", "\x01\x7f",
]  # fmt: skip
NEEDED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "tools.json")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    """et/: a random student that speaks calls; copying/: its one function
    copies a place; other/: runner.bin of more tokens; answers.json: Python's of et/."""
    from gori.export.build import export

    build(tests=True)
    root = tmp_path_factory.mktemp("runner")
    source = write_checkpoint(Case(of("qwen3", vocab_size=360), "w4a8-g32", "w4-g32"), root / "student")
    for name in NEEDED:
        shutil.copyfile(toy_tokenizer / name, source / name)
    export("executorch", source, root / "et", context=CONTEXT, chunk=CHUNK, prompts=[[5, 6, 7]])
    (root / "other").mkdir()
    shutil.copyfile(source / "tools.json", root / "other" / "tools.json")
    words = ("".join(random.Random(n).choices("abcdefg", k=5)) for n in range(400))
    tokenizer.train([*words] * 2, read_tools(source / "tools.json"), 500).save(root / "other")
    assert runner_file.write(root / "other", root / "other") == ""
    shutil.copytree(root / "et", root / "copying")
    tools = json.loads((source / "tools.json").read_text(encoding="utf-8"))[:1]
    tools[0]["function"]["parameters"] |= {"properties": {"place": {"type": "string", "x-copied": True}}}
    tools[0]["function"]["parameters"]["required"] = ["place"]
    (root / "copying" / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    assert runner_file.write(root / "copying", root / "copying") == ""
    (root / "answers.json").write_text(json.dumps(answers_of_python(root / "et")))
    return root


def answers_of_python(artifact: Path) -> list[dict[str, object]]:
    caller, rows = Caller.open(artifact), []
    for said in SAID:
        for most in (2, 5, 30):
            bound, free = caller.call(said, most=most), caller.call(said, most=most, constrained=False)
            assert bound.calls is not None
            row = {"said": said, "most": most, "calls": [plain(c) for c in bound.calls], "ids": bound.ids}
            row |= {"prompt": bound.prompt_tokens, "forced": bound.forced_tokens}
            rows.append({**row, "free": free.ids, "free_finished": free.finished})
    return rows


@pytest.fixture(scope="module")
def et(cases: Path) -> Path:
    return cases / "et"


def run_apart(cases: Path, *files: str, **environment: str) -> None:
    """Tests in a process of their own; not called test…, or pytest would take it for one and run everything."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-p",
        "no:cacheprovider",
        *(str(ROOT / "tests" / f) for f in files),
    ]
    env = os.environ | environment | {"GORI_RUNNER_CASES": str(cases)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_the_c_interface_keeps_its_promises(cases: Path) -> None:
    run_apart(cases, "runner_api.py")


@pytest.mark.slow
def test_damaged_files_and_odd_texts_read_nothing_that_is_not_theirs(cases: Path) -> None:
    # exceptions pass through the sanitizer, which looks for their library when it is loaded
    ask = [["c++", f"-print-file-name={n}"] for n in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(a, capture_output=True, text=True, check=True).stdout for a in ask]
    build(sanitize="address,undefined", tests=True)
    how = {"LD_PRELOAD": " ".join(f.strip() for f in found), "ASAN_OPTIONS": "detect_leaks=0"}
    how["GORI_SANITIZE"] = "address,undefined"
    run_apart(cases, "runner_api.py", "test_runner_grammar.py", "test_runner_text.py", **how)


def test_the_program_answers_lines_and_says_what_is_wrong(et: Path) -> None:
    program = build(tests=True) / "gori-call"

    def run(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], input=said, capture_output=True, text=True, check=False)

    one = run(str(et), "서울역 가자")
    assert one.returncode == 0
    lines = run("--timing", str(et), said="서울역 가자\n" + "가" * 4000 + "\n서울역 가자\n")
    assert lines.returncode == 1
    assert lines.stdout.splitlines() == [one.stdout.strip(), "null", one.stdout.strip()]
    assert "shorten" in lines.stderr
    assert json.loads(lines.stderr.splitlines()[0])["prefix_tokens"] == 1
    tokens = run("--tokens", str(et), "서울역 가자").stdout
    assert [int(t) for t in tokens.split()] == Tokenizer.load(et).encode("서울역 가자")
    assert run("--bad", str(et)).returncode == 2
    assert run(str(et / "nowhere"), "a").returncode == 1
    assert run("--version").stdout.startswith("gori-call ")


def test_the_runner_is_timed_beside_pythons_session(
    et: Path, gori: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    program = build(tests=True) / "gori-bench"
    options = ("--rounds", 2, "--prompt", 8, "--prompt", 5000, "--decode", 4, "--threads", 1, "--json")
    done = gori("bench", et, "--runner", program, *options)
    assert done.returncode == 0, done.stderr
    session, runner = json.loads(done.stdout)["artifacts"]
    assert (session["engine"], runner["engine"]) == ("executorch", "gori-bench")
    for fact in ("file_bytes", "context", "threads", "prompt_skipped", "first_token_prompt", "decode_tokens"):
        assert session[fact] == runner[fact]
    times = [runner["prefill"]["8"]["p50_ms"], runner["decode"]["p50_ms"], runner["first_token"]["p50_ms"]]
    assert min(*times, runner["load_ms"], runner["rss_mib"]) > 0
    assert runner["step"]["gb_per_s"] > 0
    refused = gori("bench", et / "tokenizer.json", "--runner", program)
    assert refused.returncode == 1
    done = gori("bench", et, "--runner", et / "tokenizer.json", "--rounds", 1)
    assert (done.returncode, "is no program" in done.stderr) == (1, True)


def test_nothing_is_allocated_while_tokens_are_made(et: Path) -> None:
    program = build(tests=True) / "gori-allocations"
    said = "\n".join(s for s in SAID * 4 if s.isprintable()) + "\n"
    done = subprocess.run([program, et], input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, _ = map(int, done.stdout.split())
    assert before > 0, "the counter counts"
    assert after == 0


def stressed(et: Path, directory: Path, rounds: int, threads: int, **environment: str) -> list[int]:
    said = "\n".join(s for s in SAID if s.isprintable()) + "\n"
    command = [str(directory / "gori-stress"), str(et), str(rounds), str(threads)]
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=550
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-8000:]
    return [int(n) for n in done.stdout.split()]


def test_threads_on_one_handle_and_on_two_get_the_answers_of_one_thread(et: Path) -> None:
    answered, cancelled, *_ = stressed(et, build(tests=True), 150, 3)
    assert answered > cancelled > 0


SANITIZERS = {
    "address,undefined": {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_find_nothing_while_threads_answer_and_cancel(sanitizer: str, et: Path) -> None:
    directory = build(sanitize=sanitizer, tests=True)
    answered, cancelled, *_ = stressed(et, directory, 60, 3, **SANITIZERS[sanitizer])
    assert answered > 0
    assert cancelled >= 0


@pytest.mark.slow
def test_ten_thousand_answers_leave_memory_as_it_was(et: Path) -> None:
    answered, cancelled, early_kib, late_kib = stressed(et, build(tests=True), 1800, 2)
    assert answered + cancelled > 9000
    assert late_kib < early_kib + 1024
