"""The C++ runner's walk through a grammar against Python's, step by step, over every kind of argument."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import runner_tools
from gori import tokenizer
from gori.calls import read_tools
from gori.export import runner_file
from gori.grammar import COPIED
from gori.runtime.constrain import Constraint, Vocabulary
from runner_probe import Probe
from runner_tools import SAID, vocabulary


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Probe, Vocabulary]]:
    source, out = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("runner")
    runner_tools.write(source)
    assert runner_file.write(source, out) == ""
    probe = Probe(out / "runner.bin")
    yield probe, vocabulary(source)
    probe.close()


def walk(probe: Probe, words: Vocabulary, said: str, budget: int, rng: random.Random) -> int:
    """One answer, both asked at each step; its tokens."""
    theirs = Constraint(words, said, budget)
    probe.begin(said, budget)
    for step in range(budget):
        listed, mask = theirs.allowed()
        expected = listed + ([] if mask is None else np.flatnonzero(mask).tolist())
        found, forced = probe.allowed()
        assert sorted(found) == sorted(expected), (said, budget, step)
        assert forced == theirs.forced()
        # half of the time a special token where one may follow, or an answer would be one long text
        token = rng.choice(listed if listed and rng.random() < 0.5 else expected)
        theirs.advance(token)
        assert probe.advance(token) == theirs.done
        if theirs.done:
            return step + 1
    raise AssertionError(f"no end within {budget} tokens of {said!r}")


@pytest.mark.parametrize("said", SAID)
def test_both_walks_allow_the_same_tokens_at_every_step(said: str, both: tuple[Probe, Vocabulary]) -> None:
    rng = random.Random(said)
    for n in range(200):
        walk(*both, said, (2, 3, 4, 5, 7, 9, 12, 20, 45, 200)[n % 10], rng)


def test_both_refuse_a_budget_that_no_answer_fits(both: tuple[Probe, Vocabulary]) -> None:
    with pytest.raises(ValueError, match="no room"):
        both[0].begin("", 1)


def test_many_required_copies_of_an_empty_utterance_do_not_count_past_32_bits(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(8)]  # eight times 2³⁰ is 2³³
    schema = {n: {"type": "string", COPIED: True} for n in names}
    body = [{"name": "f", "parameters": {"type": "object", "properties": schema, "required": names}}]
    (tmp_path / "tools.json").write_text(json.dumps(body))
    tokenizer.train(["a"], read_tools(tmp_path / "tools.json"), 290).save(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert runner_file.write(tmp_path, out) == ""
    probe, words = Probe(out / "runner.bin"), vocabulary(tmp_path)
    probe.begin(" ", 200)
    assert probe.allowed() == ([words.none], words.none)
    for n in range(20):
        walk(probe, words, "ab cd", 30 + n, random.Random(n))
    probe.close()


def test_a_token_of_more_than_256_bytes_can_be_copied(tmp_path: Path) -> None:
    body = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", COPIED: True}}}}]
    (tmp_path / "tools.json").write_text(json.dumps(body))
    word = "abcdefghij" * 30
    trained = tokenizer.train([f" {word}"] * 3, read_tools(tmp_path / "tools.json"), 600)
    assert max(map(len, trained.pieces)) > 256
    trained.save(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert runner_file.write(tmp_path, out) == ""
    probe, words = Probe(out / "runner.bin"), vocabulary(tmp_path)
    for n in range(20):
        walk(probe, words, f"say {word} twice", 30, random.Random(n))
    probe.close()


def test_a_damaged_file_is_refused_or_walked_but_never_read_past_its_end(
    both: tuple[Probe, Vocabulary], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    runner_tools.write(source)
    assert runner_file.write(source, tmp_path) == ""
    path, whole = tmp_path / "runner.bin", (tmp_path / "runner.bin").read_bytes()
    rng = random.Random(0)
    refusals: list[str] = []
    damaged: list[str] = []
    for n in range(400):
        raw = bytearray(whole[: rng.randrange(len(whole))] if n % 4 == 0 else whole)
        for _ in range(rng.choice((0, 1, 8, 200)) if n % 4 == 0 else rng.choice((1, 8, 200))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            probe = Probe(path)
        except ValueError as e:
            refusals.append(str(e))
            continue
        try:
            probe.tokens("서울역으로 가자 é")
            probe.begin("서울역으로", 40)
            for _ in range(40):
                allowed, _ = probe.allowed()
                if not allowed or probe.advance(rng.choice(allowed)):
                    break
        except ValueError as e:
            damaged.append(str(e))
        probe.close()
    assert len(refusals) > 100
    assert all("export" in r or "cannot map" in r for r in refusals)
    assert all("damaged" in d for d in damaged)
