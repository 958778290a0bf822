"""Token shards: what stands in them, that each sequence comes once an epoch over all ranks, starts at any step."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import toy_rows, write_rows
from hypothesis import given
from hypothesis import strategies as st

from gori.artifact import hash_files, read_manifest
from gori.calls import END
from gori.data import collate, encode, read_conversations
from gori.errors import GoriError
from gori.teacher.workers import split
from gori.tokenizer import Tokenizer
from gori.tokens import INDEX, Ids, Tokens, shuffled, write_tokens

BOOK = "서울역 가자\ntake me to Pier 39\n\n하늘이 왜 파래?\n" * 9


@pytest.fixture
def shards(toy_tokenizer: Path, tmp_path: Path) -> Path:
    """A book and two JSON Lines files, in shards of 100 tokens."""
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    (tmp_path / "web.jsonl").write_text(json.dumps({"text": "open it 20 percent"}) + "\n", encoding="utf-8")
    write_rows(tmp_path / "chat.jsonl", toy_rows()[:3])
    files = [tmp_path / name for name in ("book.txt", "web.jsonl", "chat.jsonl")]
    assert write_tokens(files, toy_tokenizer, tmp_path / "tokens", 100)
    assert not write_tokens(files, toy_tokenizer, tmp_path / "tokens", 100)
    return tmp_path / "tokens"


def stored(directory: Path) -> list[int]:
    index = json.loads((directory / INDEX).read_text())
    return [i for s in index["shards"] for i in np.fromfile(directory / s["file"], index["dtype"]).tolist()]


def test_shards_hold_every_text_with_an_end_mark_and_conversations_as_the_template_makes_them(
    shards: Path, toy_tokenizer: Path, toy_corpus: object
) -> None:
    t = Tokenizer.load(toy_tokenizer)
    lines = [i for line in BOOK.splitlines(keepends=True) for i in t.encode(line)]
    chat = read_conversations(shards.parent / "chat.jsonl", toy_corpus.functions)  # type: ignore[attr-defined]
    end = [t.id(END)]
    wanted = [*lines, *end, *t.encode("open it 20 percent"), *end, *(i for c in chat for i in encode(c, t).ids)]
    assert stored(shards) == wanted
    assert t.decode(wanted[: len(lines)]) == BOOK
    sizes = [f["bytes"] for name, f in read_manifest(shards)["files"].items() if name.endswith(".bin")]
    assert sizes == [*[200] * (len(wanted) // 100), 2 * (len(wanted) % 100)]  # uint16
    assert read_manifest(shards)["files"] == hash_files(shards)


def test_every_token_but_a_shards_first_and_its_rest_is_a_target_once_an_epoch(shards: Path) -> None:
    data = Tokens(shards, 16)
    targets = [int(i) for n in range(len(data)) for i in data[n].ids[1:]]
    whole = stored(shards)
    parts = [whole[i : i + 100] for i in range(0, len(whole), 100)]
    assert targets == [i for p in parts for i in p[1 : 1 + (len(p) - 1) // 16 * 16]]
    assert isinstance(data[0].ids, Ids)
    assert isinstance(data[0].ids.view, np.memmap)  # nothing is read before it is used
    assert all(np.all(data[n].loss) for n in range(len(data)))


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 5))
def test_the_order_of_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, count, seed, epoch) for i in range(count)) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own_and_neighbours_part() -> None:
    orders = [[shuffled(i, 1000, s, e) for i in range(1000)] for s, e in ((0, 0), (0, 1), (1, 0))]
    for a, b in itertools.combinations([*orders, list(range(1000))], 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # one of a thousand is expected to stay
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15  # four standard errors


class Places(Tokens):
    """A set of sequences that are their own numbers."""

    def __init__(self, count: int) -> None:
        self.sequence, self._firsts = 4, [0, count]

    def __getitem__(self, i: int) -> int:  # type: ignore[override]
        return i


@given(st.integers(1, 60), st.integers(4, 64), st.integers(1, 5), st.integers(0, 9), st.integers(0, 40))
def test_over_all_ranks_every_sequence_comes_once_an_epoch_and_a_later_start_gives_the_same_rest(
    count: int, batch_tokens: int, ranks: int, seed: int, first: int
) -> None:
    data = Places(count)
    steps = -(-count // (batch_tokens // 4))
    two_epochs = list(itertools.islice(data.steps(batch_tokens, seed, 0), 2 * steps))
    for epoch in (two_epochs[:steps], two_epochs[steps:]):
        of_ranks = [[i for rows in epoch for p in split(rows, ranks)[r : r + 1] for i in p] for r in range(ranks)]
        assert sorted(i for some in of_ranks for i in some) == list(range(count))
    later = list(itertools.islice(data.steps(batch_tokens, seed, first), 3))
    assert later == list(itertools.islice(data.steps(batch_tokens, seed, 0), first, first + 3))


def test_what_cannot_be_used_is_refused_with_its_mend(shards: Path, toy_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(GoriError, match="longest shard has 100 tokens, a sequence needs 101"):
        Tokens(shards, 100)
    with pytest.raises(GoriError, match="batch_tokens 15 holds no sequence of 16 tokens"):
        next(Tokens(shards, 16).steps(15, 0, 0))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"said": "b"}\n')
    with pytest.raises(GoriError, match=r'bad\.jsonl line 2: expected \{"text"'):
        write_tokens([tmp_path / "bad.jsonl"], toy_tokenizer, tmp_path / "x", 100)
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(GoriError, match=r"bytes\.txt line 2: byte 0xff is not UTF-8"):
        write_tokens([tmp_path / "bytes.txt"], toy_tokenizer, tmp_path / "x", 100)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    nothing = [tmp_path / "empty.txt", tmp_path / "empty.jsonl"]
    with pytest.raises(GoriError, match=r"empty\.txt, .*empty\.jsonl: no text in it"):
        write_tokens(nothing, toy_tokenizer, tmp_path / "x", 100)
    write_tokens([*nothing, tmp_path / "book.txt"], toy_tokenizer, tmp_path / "x", 100)
    write_tokens([tmp_path / "book.txt"], toy_tokenizer, tmp_path / "y", 100)
    assert stored(tmp_path / "x") == stored(tmp_path / "y")
    path = next(shards.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(GoriError, match="is not the file that was written"):
        Tokens(shards, 16)


def test_an_id_beyond_the_vocabulary_is_refused_where_its_sequence_is_read(shards: Path) -> None:
    path = shards / "tokens-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[40] = 360  # the vocabulary has 360
    ids.tofile(path)
    data = Tokens(shards, 16)
    assert collate([data[0], data[1]], 0).ids.max() < 360
    with pytest.raises(GoriError, match=rf"{path} holds token 360, its vocabulary has 360"):
        collate([data[1], data[2]], 0)


def test_a_teacher_trains_on_them_through_the_command_line(
    gori: Callable[..., subprocess.CompletedProcess[str]], toy: Path, tmp_path: Path
) -> None:
    train = {"steps": 2, "batch_tokens": 128, "threads": 1, "tokens": "tokens", "sequence": 32}
    shape = {"layers": 2, "hidden_size": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "intermediate_size": 32}
    body = {
        "name": "tokens",
        "data": {k: str(toy / f"{k}.jsonl") for k in ("train", "dev", "test")} | {"tools": str(toy / "tools.json")},
        "tokenizer": {"vocab_size": 360},
        "teacher": {**shape, "experts": 2, "train": train},
        "distill": {"init": "random"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    out = tmp_path / "out"

    def teach(*more: str) -> subprocess.CompletedProcess[str]:
        return gori("teacher", "train", tmp_path / "recipe.yaml", "--out", out, *more)

    assert "tokens has no manifest.json" in teach().stderr  # the tokenizer is made by now
    made = gori("data", "tokens", tmp_path / "book.txt", "--tokenizer", out / "tokenizer", "--out", tmp_path / "tokens")
    assert made.returncode == 0, made.stderr
    done = teach()
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out / "teacher")
    assert manifest["inputs"]["tokens"] == Tokens(tmp_path / "tokens", 32).identity
    assert manifest["metrics"]["tokens"] == 2 * 4 * 33
    live = [json.loads(line) for line in (out / "logs/teacher.jsonl").read_text().splitlines()]
    assert [e["step"] for e in live] == [1, 2]
    assert all(e["tokens_per_second"] > 0 and "mfu" not in e for e in live)
    assert "no MFU: trained on a CPU" in manifest["notes"]
    refused = teach("--set", "tokenizer.vocab_size=350")
    assert "was made with another tokenizer" in refused.stderr
