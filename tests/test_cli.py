"""The command line: bad input is one sentence on stderr and exit 1, usage is exit 2, and nothing is half written."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch

from gori import checkpoint, cli
from gori.model import Decoder, ModelConfig
from gori.tokenizer import copy_files

Outcome = tuple[int, str, str]


@pytest.fixture
def gori(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as done:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def student(toy_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with the toy task's tokenizer and tools."""
    out = tmp_path_factory.mktemp("student")
    cfg = ModelConfig(
        kind="qwen3", vocab_size=360, hidden_size=64, layers=1, heads=2, kv_heads=1, head_dim=32, intermediate_size=96,
        max_position=96,
    )  # fmt: skip
    checkpoint.save(Decoder(cfg).initialise(torch.Generator().manual_seed(0)), out)
    copy_files(toy_tokenizer, out)
    return out


def everything(directory: Path) -> dict[str, bytes]:
    """Files and their bytes, but for the empty lock that a run takes."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def refused(outcome: Outcome, message: str) -> None:
    """Exit 1, nothing on stdout, and one sentence on stderr that says this."""
    code, out, err = outcome
    assert (code, out) == (1, ""), err
    sentences = [line for line in err.splitlines() if line.startswith("gori: ")]
    assert len(sentences) == 1
    assert err.rstrip().endswith(sentences[0])
    assert re.search(message, sentences[0]), sentences[0]
    assert "Traceback" not in err


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = list(commands(cli.root))


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_commands_help_says_what_it_does_and_has_an_example_of_it(
    command: tuple[str, ...], gori: Callable[..., Outcome]
) -> None:
    code, out, _ = gori(*command, "--help")
    assert code == 0
    assert f"gori {' '.join(command)}" in " ".join(out[out.index("Example:") :].split())
    assert re.search(r"^  [A-Z]\w+", out, re.MULTILINE)


def test_the_list_of_commands_is_the_table(gori: Callable[..., Outcome]) -> None:
    code, out, _ = gori("--help")
    assert code == 0
    for name, (_, text) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name
        assert text.split(";")[0][:30] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "no command 'quantise': did you mean 'quantize'"),
        (["quantize"], "Missing argument 'CHECKPOINT'"),
        (["quantize", "x", "--out", "y"], "Missing option '--scheme'"),
        (
            ["quantize", "x", "--scheme", "w8a8-channel", "--out", "y", "--samples", "0"],
            "0 is not in the range x>=1",
        ),
        (["call", "x", "hi", "--threads", "0"], "0 is not in the range x>=1"),
        (["data", "incar", "--out", "y", "--rows", "3"], "3 is not in the range x>=100"),
        (["run", "--nonsense"], "No such option"),
    ],
)
def test_usage_is_exit_2(arguments: list[str], message: str, gori: Callable[..., Outcome]) -> None:
    code, out, err = gori(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_version_is_printed(gori: Callable[..., Outcome]) -> None:
    import gori as package

    assert gori("--version")[:2] == (0, f"gori, version {package.__version__}\n")


BAD_DATA = {
    "empty": (b"", "train.jsonl is empty"),
    "truncated": (b'{"messages": [{"role": "us', r"train.jsonl line 1 column \d+: not JSON"),
    "not UTF-8": (b'{"messages": "\xb0\xa1"}', "train.jsonl line 1 column 15: byte 0xb0 is not UTF-8"),
    "no answer": (
        b'{"messages": [{"role": "user", "content": "hi"}]}',
        "line 1 message 0: a row ends with the assistant",
    ),
    "unknown tool": (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "fly", "arguments": {}}}]}]}',
        r"line 1 message 0 tool_calls\[0\]: function 'fly' is not among the tools",
    ),
}


@pytest.fixture
def mine(toy: Path, tmp_path: Path) -> Path:
    """A recipe with its files, which a test may spoil."""
    for p in toy.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / "recipe.yaml").write_text(
        "name: mine\ndata: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl, tools: tools.json}\n"
        "tokenizer: {vocab_size: 360}\n"
    )
    return tmp_path


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_by_check_and_run_before_anything_is_written(
    case: str, mine: Path, gori: Callable[..., Outcome]
) -> None:
    content, message = BAD_DATA[case]
    (mine / "train.jsonl").write_bytes(content)
    before = everything(mine)
    refused(gori("data", "check", mine / "train.jsonl", "--tools", mine / "tools.json"), message)
    refused(gori("run", mine / "recipe.yaml", "--out", mine / "run", "--until", "tokenizer"), message)
    refused(gori("init", mine / "new", "--data", mine / "train.jsonl", "--tools", mine / "tools.json"), message)
    assert everything(mine) == before
    assert not (mine / "new").exists()


def test_good_data_is_counted(mine: Path, gori: Callable[..., Outcome]) -> None:
    code, out, err = gori("data", "check", mine / "test.jsonl", "--tools", mine / "tools.json", "--json")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out).values()
    assert entry["rows"] == len((mine / "test.jsonl").read_text().splitlines())
    assert entry["languages"].keys() == {"ko", "en"}


def test_stages_run_are_skipped_and_a_truncated_manifest_is_refused(mine: Path, gori: Callable[..., Outcome]) -> None:
    command = ("run", mine / "recipe.yaml", "--out", mine / "run", "--until", "tokenizer")
    assert gori(*command)[0] == 0
    before = everything(mine)
    code, out, err = gori(*command)
    assert (code, out) == (0, "")
    assert err.count("unchanged, skipped") == 2
    assert everything(mine) == before
    manifest = mine / "run" / "tokenizer" / "manifest.json"
    for content, message in (
        (manifest.read_bytes()[:50], "manifest.json line .* is not JSON"),
        (b"[]", "expected an object"),
    ):
        manifest.write_bytes(content)
        before = everything(mine)
        refused(gori(*command), message)
        assert everything(mine) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distil: {}", "unknown key distil: did you mean 'distill'"),
        ("gates: {x: high}", "gate 'x' has the bound 'high': write a comparison"),
        ("seed: [", "is not YAML"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_written(
    change: str, message: str, mine: Path, gori: Callable[..., Outcome]
) -> None:
    with (mine / "recipe.yaml").open("a") as f:
        f.write(change + "\n")
    before = everything(mine)
    refused(gori("run", mine / "recipe.yaml", "--out", mine / "run"), message)
    assert everything(mine) == before


def test_an_unknown_stage_and_a_missing_recipe_are_refused(mine: Path, gori: Callable[..., Outcome]) -> None:
    refused(gori("run", mine / "recipe.yaml", "--until", "distil", "--out", mine / "run"), "stage 'distil' is unknown")
    refused(gori("run", mine / "none.yaml"), "does not exist: `gori init DIR` writes one")


def copy(student: Path, target: Path) -> Path:
    target.mkdir()
    for p in student.iterdir():
        (target / p.name).write_bytes(p.read_bytes())
    return target


SPOILED: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "truncated weights": (
        "model.safetensors",
        lambda b: b[:-100],
        "model.safetensors is not a readable safetensors file",
    ),
    "weights of zeros": ("model.safetensors", lambda b: bytes(len(b)), "is not a readable safetensors file"),
    "no weights": ("model.safetensors", lambda b: None, "model.safetensors does not exist"),
    "a truncated config": ("config.json", lambda b: b[:20], "config.json line 2 column .* is not JSON"),
    "a config of another kind": ("config.json", lambda b: b.replace(b'"qwen3"', b'"gpt2"'), "model_type 'gpt2'"),
    "a config that is a list": ("config.json", lambda b: b"[]", "config.json holds a JSON list, expected an object"),
    "a config of words": (
        "config.json",
        lambda b: b.replace(b'"hidden_size": 64', b'"hidden_size": "x"'),
        "not the number",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_corrupt_checkpoint_is_refused_and_nothing_is_written(
    case: str, student: Path, tmp_path: Path, gori: Callable[..., Outcome]
) -> None:
    name, spoil, message = SPOILED[case]
    folder = copy(student, tmp_path / "student")
    content = spoil((folder / name).read_bytes())
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    refused(gori("quantize", folder, "--scheme", "w8a8-channel", "--out", tmp_path / "q"), message)
    assert sorted(os.listdir(tmp_path)) == ["student"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json is not a readable tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json is not a readable tokenizer"),
        ("generation_config.json", b"{", "generation_config.json line 1 column .* is not JSON"),
        ("tools.json", b'[{"name": 3}]', "tools.json entry 0: expected a function with a name"),
    ],
)
def test_a_corrupt_file_beside_the_weights_is_refused(
    name: str, content: bytes, message: str, toy: Path, student: Path, tmp_path: Path, gori: Callable[..., Outcome]
) -> None:
    folder = copy(student, tmp_path / "student")
    (folder / name).write_bytes(content)
    refused(gori("eval", folder, "--data", toy / "test.jsonl"), message)
    refused(gori("call", folder, "서울역 가자"), message)


def test_a_path_where_no_model_lies_is_refused_by_every_command_that_opens_one(
    toy: Path, tmp_path: Path, gori: Callable[..., Outcome]
) -> None:
    nowhere = tmp_path / "nowhere"
    for command in (
        ["call", nowhere, "hi"],
        ["chat", nowhere],
        ["bench", nowhere],
        ["eval", nowhere, "--data", toy / "test.jsonl"],
    ):
        refused(gori(*command), "nowhere")
    refused(gori("quantize", nowhere, "--scheme", "Q8_0", "--out", tmp_path / "q"), "nowhere does not exist")
    assert not (tmp_path / "q").exists()


def test_a_group_that_does_not_divide_is_refused_and_nothing_is_written(
    student: Path, tmp_path: Path, gori: Callable[..., Outcome]
) -> None:
    done = gori("quantize", student, "--scheme", "w4a8-g128", "--out", tmp_path / "q")
    refused(
        done, "group size 128 does not divide in_features 64 of .*: its divisors are 1, 2, 4, 8, 16, 32, 64; choose"
    )
    refused(gori("quantize", student, "--scheme", "w4a8-g33", "--out", tmp_path / "q"), "did you mean 'w4a8-g32'")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_is_quantized_evaluated_and_asked(
    student: Path, toy: Path, tmp_path: Path, gori: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = gori("quantize", student, "--scheme", "8da4w", "--out", tmp_path / "q", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "w4a8-g32"
    code, out, _ = gori("eval", tmp_path / "q", "--data", toy / "test.jsonl", "--against", student, "--json")
    body = json.loads(out)
    assert code == 0
    assert {"exact", "n", "ko", "en", "kl_mean", "kl_p99", "top1"} <= set(body)
    assert body["kl_mean"] > 0
    refused(gori("call", tmp_path / "q", " "), "the utterance is empty")
    refused(gori("call", tmp_path / "q", "word " * 200), "the prompt has .* shorten it, or export with a larger")


def limited() -> None:
    """No file of this process may exceed 8 KiB: the system refuses as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.mark.parametrize("command", ["quantize", "data", "init", "run"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(command: str, student: Path, mine: Path) -> None:
    out = mine / "out"
    rows = (mine / "train.jsonl").read_text().splitlines(keepends=True)
    many = [row.replace("가자", f"가자 {i}").replace("me to", f"me {i} to") for i in range(60) for row in rows]
    (mine / "train.jsonl").write_text("".join(many))
    arguments = {
        "quantize": ["quantize", student, "--scheme", "w8a8-channel", "--out", out],
        "data": ["data", "incar", "--rows", 100, "--test-rows", 10, "--out", out],
        "init": ["init", out, "--data", mine / "train.jsonl", "--tools", mine / "tools.json"],
        "run": ["run", mine / "recipe.yaml", "--until", "tokenizer", "--out", out],
    }[command]
    before = everything(mine)
    program = [sys.executable, "-m", "gori", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(
        r"gori: cannot write .*(File too large|os error 27).*: free space or choose another --out", done.stderr
    )
    after = everything(mine)
    if command == "run":  # its first stage is small, and whole
        assert {k for k in after if k not in before} == {"out/data/manifest.json", "out/data/tools.json"}
    else:
        assert after == before


def test_a_full_disk_behind_stdout_is_one_sentence_too() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gori", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "gori: cannot write the result: No space left on device: free space\n"
