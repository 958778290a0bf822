"""A teacher's cache: what it holds, whoever made it and however often it was cut off; damage and strangers refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cached import SEED, make_cache, write_teacher
from transformers import AutoModelForCausalLM

from gori.artifact import content_hash, hash_files, read_manifest
from gori.corpus import Corpus, epochs
from gori.data import Example
from gori.errors import GoriError
from gori.recipe import parse
from gori.teacher import cache as stage
from gori.teacher import cache_read
from gori.teacher.cache_read import CachedRows
from gori.teacher.foreign_recipe import check_teacher
from gori.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return write_teacher(tmp_path_factory.mktemp("t") / "teacher", toy_tokenizer)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path) -> Path:
    """A cache of draws that a test may not change."""
    return make_cache(teacher, toy_corpus, toy_tokenizer, tmp_path_factory.mktemp("c") / "cache")


@pytest.fixture(scope="module")
def exact(teacher: Path) -> Callable[[Example], np.ndarray]:
    """The teacher's distributions at a row's answer tokens, by transformers, the row alone and in float64."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64, experts_implementation="eager").eval()

    def probs(e: Example) -> np.ndarray:
        with torch.no_grad():
            found = model(torch.tensor([list(e.ids)])).logits[0, :-1].softmax(-1)
        return found[torch.tensor(e.loss[1:])].numpy()

    return probs


def test_the_rows_are_those_that_a_student_would_see(sampled: Path, toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    made = epochs(toy_corpus.train, Tokenizer.load(toy_tokenizer), 256, SEED + 1, 0.5)
    rows = CachedRows(sampled)
    for number in (0, 1, 2, 5):
        wanted = [(list(e.ids), list(e.loss)) for e in made(number % 2)]  # two epochs, in turn
        assert [(list(e.ids), list(e.loss)) for e in rows.epoch(number)] == wanted
    assert [e.ids for e in rows.epoch(0)] != [e.ids for e in rows.epoch(1)]


def test_draws_come_from_the_teachers_distribution(sampled: Path, exact: Callable[[Example], np.ndarray]) -> None:
    """Over all answer tokens: the weight on the teacher's most probable token is its probability."""
    hit, expected, variance = 0.0, 0.0, 0.0
    for e in CachedRows(sampled).epoch(0):
        p = exact(e)
        assert e.soft is not None
        assert np.allclose(e.soft.weights.sum(1), 1, atol=5e-5)
        for row, ids, weights in zip(p, e.soft.ids, e.soft.weights, strict=True):
            hit += weights[ids == row.argmax()].sum()
            expected += row.max()
            variance += row.max() * (1 - row.max()) / 32
    assert abs(hit - expected) < 5 * variance**0.5


def test_the_largest_are_the_teachers_own(
    tmp_path: Path, teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path, exact: Callable[[Example], np.ndarray]
) -> None:
    made = make_cache(teacher, toy_corpus, toy_tokenizer, tmp_path / "c", method="topk", k=20, epochs=1)
    rows = CachedRows(made)
    assert rows.tail
    for e in rows.epoch(0):
        p = exact(e)
        assert e.soft is not None
        assert np.allclose(e.soft.weights, np.take_along_axis(p, e.soft.ids, 1), rtol=2e-3, atol=1e-6)
        assert np.allclose(e.soft.weights.sum(1), np.sort(p)[:, -20:].sum(1), rtol=2e-3)


def test_batches_and_shards_change_nothing_but_the_last_bits(
    tmp_path: Path, teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path
) -> None:
    ways = ({"shard_rows": 1000}, {"shard_rows": 3, "batch_tokens": 40})
    more = {"method": "topk", "k": 50, "epochs": 1}
    made = [
        CachedRows(make_cache(teacher, toy_corpus, toy_tokenizer, tmp_path / str(n), **w, **more)).epoch(0)
        for n, w in enumerate(ways)
    ]
    for a, b in zip(*made, strict=True):
        assert a.soft is not None
        assert b.soft is not None
        assert np.allclose(np.sort(a.soft.weights), np.sort(b.soft.weights), rtol=2e-3, atol=1e-7)


def test_the_manifest_tells_what_a_token_costs(sampled: Path) -> None:
    m = read_manifest(sampled)["metrics"]
    assert m["answer_tokens"] == sum(e.loss.count(True) for n in (0, 1) for e in CachedRows(sampled).epoch(n))  # type: ignore[union-attr]
    assert m["bytes"] == sum(f.stat().st_size for f in sampled.glob("*.tab"))
    assert m["bytes_per_answer_token"] == pytest.approx(m["bytes"] / m["answer_tokens"], abs=0.01)
    assert 1 < m["entries_per_answer_token"] <= 32
    assert m["mass_per_answer_token"] == pytest.approx(1, abs=1e-4)
    assert m["weight_per_answer_token"] == pytest.approx(1, abs=1e-4)


def test_a_run_that_was_cut_off_makes_only_what_is_missing(
    tmp_path: Path,
    sampled: Path,
    teacher: Path,
    toy_corpus: Corpus,
    toy_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    write = stage._write

    def cut(scratch: Path, part: stage.Part, data: bytes, entry: dict[str, object]) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(part.name)
        write(scratch, part, data, entry)

    monkeypatch.setattr(stage, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        make_cache(teacher, toy_corpus, toy_tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    damaged = next((tmp_path / ".cache.shards").rglob(made[1]))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # as a full disk leaves it
    again: list[str] = []

    def count(scratch: Path, part: stage.Part, data: bytes, entry: dict[str, object]) -> None:
        again.append(part.name)
        write(scratch, part, data, entry)

    monkeypatch.setattr(stage, "_write", count)
    make_cache(teacher, toy_corpus, toy_tokenizer, tmp_path / "cache")
    shards = {f.name for f in sampled.glob("*.tab")}
    assert sorted(again) == sorted(shards - {made[0], made[2]})
    assert hash_files(tmp_path / "cache") == hash_files(sampled)
    assert not (tmp_path / ".cache.shards").exists()


def test_a_flipped_bit_is_refused_with_its_place(tmp_path: Path, sampled: Path) -> None:
    copy = Path(shutil.copytree(sampled, tmp_path / "copy"))
    shard = copy / "epoch-001-rows-00000008.tab"
    raw = bytearray(shard.read_bytes())
    raw[700] ^= 4
    shard.write_bytes(raw)
    rows = CachedRows(copy)
    assert len(rows.epoch(0)) == rows.rows_per_epoch
    place = rf"{shard.name} was changed in bytes 0\.\.{len(raw) - 1}.*rows 8\.\.15 of epoch 1"
    with pytest.raises(GoriError, match=place):
        rows.epoch(1)
    shard.write_bytes(raw[:-4])
    with pytest.raises(GoriError, match=f"has {len(raw) - 4} bytes of {len(raw)}"):
        rows.epoch(1)
    index = copy / "index.json"
    index.write_text(index.read_text().replace('"epoch": 0', '"epoch": 1', 1))
    with pytest.raises(GoriError, match=r"index\.json was changed"):
        CachedRows(copy)


def test_a_cache_of_another_teacher_or_of_none_is_refused(sampled: Path, teacher: Path, toy_tokenizer: Path) -> None:
    rows = CachedRows(sampled)
    rows.check(teacher=content_hash(teacher), tokenizer=content_hash(toy_tokenizer))
    with pytest.raises(GoriError, match="is of another teacher"):
        rows.check(teacher=content_hash(toy_tokenizer))
    with pytest.raises(GoriError, match="is of another tokenizer"):
        rows.check(tokenizer=content_hash(teacher))
    with pytest.raises(GoriError, match=r"has no manifest\.json"):
        CachedRows(toy_tokenizer)


def test_a_student_has_the_caches_temperature_and_room_for_its_rows(sampled: Path) -> None:
    rows = CachedRows(sampled)
    longest = max(len(e.ids) for n in (0, 1) for e in rows.epoch(n))
    rows.check(temperature=1.0, max_position=longest)
    with pytest.raises(GoriError, match=r"cache was made at temperature 1\.0, and distill\.temperature is 2\.0"):
        rows.check(temperature=2.0)
    place = (
        rf"{sampled} has a row of {longest} tokens, and student\.max_position is {longest - 1}: raise it to {longest}"
    )
    with pytest.raises(GoriError, match=place):
        rows.check(max_position=longest - 1)


def test_another_training_file_is_told_and_no_error(sampled: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cache_read.console, "log", said.append)
    CachedRows(sampled).check(train=content_hash(toy / "train.jsonl"))
    assert not said
    CachedRows(sampled).check(train=content_hash(toy / "dev.jsonl"))
    assert "its rows are used, not data.train's" in said[0]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"cache": {"k": 12}}, r"cache\.k is for a cache that is made"),
        ({"distill": {"init": "teacher"}}, r"distill\.init teacher takes a teacher's weights, which the cache"),
        ({"distill": {"init": "random", "control": "teacher"}}, r"distill\.control teacher takes .* teacher\.path"),
        ({"distill": {"init": "random", "temperature": 2.0}}, "made at temperature"),
        ({"distill": {"init": "random", "tokenizers": "align"}}, r"distill\.tokenizers is align, and .* with None"),
        ({"distill": {"init": "random", "train": {"swap_values": 0.1}}}, r"swap_values is 0\.1, .* made with 0\.5"),
        ({"student": {"max_position": 16}}, r"student\.max_position is 16"),
        ({"teacher": {"path": "TOKENIZER"}}, "is of another teacher"),
        ({"distill": {"init": "random", "train": {"swap_values": 0.5}}}, None),
        ({"teacher": {"path": "TEACHER"}, "distill": {"init": "teacher"}}, None),
    ],
)
def test_what_a_finished_cache_fixes_is_not_asked_for_otherwise(
    sampled: Path, teacher: Path, toy_tokenizer: Path, sections: dict[str, dict[str, object]], why: str | None
) -> None:
    data = {"train": "a", "dev": "b", "test": "c", "tools": "d"}
    body = {"name": "n", "data": data, "distill": {"init": "random"}, **sections}
    body["cache"] = {**sections.get("cache", {}), "path": str(sampled)}
    if path := {"TOKENIZER": toy_tokenizer, "TEACHER": teacher}.get(str(sections.get("teacher", {}).get("path"))):
        body["teacher"] = {"path": str(path)}
    if why is None:
        check_teacher(parse(body, "recipe"))
        return
    with pytest.raises(GoriError, match=why):
        check_teacher(parse(body, "recipe"))


def test_shards_are_copied_where_no_hard_links_are(
    tmp_path: Path,
    sampled: Path,
    teacher: Path,
    toy_corpus: Corpus,
    toy_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what FAT and some network shares answer

    monkeypatch.setattr(os, "link", refuse)
    made = make_cache(teacher, toy_corpus, toy_tokenizer, tmp_path / "cache")
    assert hash_files(made) == hash_files(sampled)


def test_a_teacher_of_fewer_tokens_is_refused(
    tmp_path: Path, toy_corpus: Corpus, toy_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cached

    monkeypatch.setattr(cached, "SHAPE", cached.SHAPE.__class__(**{**vars(cached.SHAPE), "vocab_size": 300}))
    small = write_teacher(tmp_path / "small", toy_tokenizer)
    with pytest.raises(GoriError, match="has a vocabulary of 300, the student's tokenizer 360"):
        make_cache(small, toy_corpus, toy_tokenizer, tmp_path / "cache")
