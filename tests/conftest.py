"""What every test shares: no hub, few threads, small random decoders."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from gori import corpus, tokenizer

# one worker on a busy machine: a slow example is not a defect
settings.register_profile("gori", deadline=None, derandomize=True)
settings.load_profile("gori")

PLACES = ("서울역", "강남역", "부산항", "Central Park", "Main Street", "제주공항", "Pier 39", "한강공원")


def toy_tools() -> list[dict[str, object]]:
    """Three functions that use every kind of argument."""
    zone = {"type": "string", "enum": ["front", "rear"]}
    functions = {
        "navigate": {"place": {"type": "string"}, "stops": {"type": "array", "items": {"type": "string"}}},
        "set_temperature": {"degrees": {"type": "number", "minimum": 16, "maximum": 30}, "zone": zone},
        "open_window": {"zone": zone, "percent": {"type": "integer"}, "child_lock": {"type": "boolean"}},
    }
    bodies = [{"name": n, "parameters": {"type": "object", "properties": p}} for n, p in functions.items()]
    return [{"type": "function", "function": body} for body in bodies]


def toy_row(said: str, *calls: tuple[str, dict[str, object]]) -> dict[str, object]:
    """One conversation: what was said and the calls that answer it."""
    answer = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "tool_calls": answer}]}


def toy_rows() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for place in PLACES:
        rows.append(toy_row(f"{place} 가자", ("navigate", {"place": place})))
        rows.append(toy_row(f"take me to {place}", ("navigate", {"place": place})))
        rows.append(toy_row(f"stop at {place} and 집", ("navigate", {"stops": [place, "집"]})))
    for degrees in range(18, 26):
        rows.append(toy_row(f"{degrees}도로 맞춰줘", ("set_temperature", {"degrees": degrees, "zone": "front"})))
        rows.append(toy_row(f"open it {degrees} percent", ("open_window", {"percent": degrees, "child_lock": True})))
    rows.append(toy_row("하늘이 왜 파래?"))
    both = (("open_window", {"zone": "rear"}), ("navigate", {"place": "Pier 39"}))
    rows.append(toy_row("open the rear window and go to Pier 39", *both))
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, dev.jsonl, test.jsonl and tools.json of a toy task."""
    out = tmp_path_factory.mktemp("toy")
    rows = toy_rows()
    for name, part in (("train", rows), ("dev", rows[:6]), ("test", rows[::5])):
        write_rows(out / f"{name}.jsonl", part)
    (out / "tools.json").write_text(json.dumps(toy_tools(), ensure_ascii=False), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def toy_corpus(toy: Path) -> corpus.Corpus:
    return corpus.read(toy / "train.jsonl", toy / "dev.jsonl", [toy / "test.jsonl"], toy / "tools.json")


@pytest.fixture(scope="session")
def toy_tokenizer(toy: Path, toy_corpus: corpus.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of the toy task and its tools."""
    out = tmp_path_factory.mktemp("tokenizer")
    trained = tokenizer.train(corpus.training_texts(toy_corpus.train), toy_corpus.functions, 360)
    trained.save(out)
    (out / "tools.json").write_bytes((toy / "tools.json").read_bytes())
    return out


@pytest.fixture
def gori() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own."""

    def run(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gori", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    """A small student's GGUF with the toy task's tokenizer, exported once."""
    from gori.export.build import export
    from students import CHUNK, CONTEXT, Case, of, write_checkpoint

    root = tmp_path_factory.mktemp("verify")
    source = write_checkpoint(Case(of("qwen3", vocab_size=360), "w4a8-g32"), root / "student")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tools.json"):
        shutil.copyfile(toy_tokenizer / name, source / name)
    export("gguf", source, root / "gguf", context=CONTEXT, chunk=CHUNK)
    return root / "gguf"


@pytest.fixture(scope="session")
def runner() -> Path:
    """The directory of the C++ runner's build."""
    from runner_probe import build

    return build()


@pytest.fixture(scope="session")
def car(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student with the in-car functions, untrained."""
    from embedded import exported_car

    return exported_car(tmp_path_factory.mktemp("car") / "root")


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))
