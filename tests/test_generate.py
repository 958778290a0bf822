"""Sampling against the softmax it should follow, and answers in batches against answers one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gori import checkpoint, evaluate
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.runtime.generate import choose, generate, picker
from gori.runtime.session import Logits, Session, SessionInfo, open_session

LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 1.9, -3.0], dtype=np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x.astype(np.float64) - x.max())
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [(1.0, 0, 1.0, 6), (0.5, 0, 1.0, 6), (2.0, 0, 1.0, 6), (1.0, 3, 1.0, 3), (1.0, 0, 0.6, 2), (1.0, 4, 0.9, 3)],
)
def test_samples_follow_the_softmax_of_what_is_kept(temperature: float, top_k: int, top_p: float, kept: int) -> None:
    p = softmax(LOGITS / temperature)
    order = np.argsort(-p)
    p[order[kept:]] = 0.0
    p /= p.sum()
    rng = np.random.default_rng(0)
    n = 20_000
    counts = np.bincount([choose(LOGITS, rng, temperature, top_k, top_p) for _ in range(n)], minlength=6)
    assert (counts[p == 0] == 0).all()
    some = p > 0
    chi2 = ((counts[some] - n * p[some]) ** 2 / (n * p[some])).sum()
    # the 99.99th percentile of chi-square with 5 degrees of freedom, and the seed is fixed
    assert chi2 < 25.7


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12, unique=True), st.integers(0, 99))
def test_no_randomness_is_the_largest_logit(values: list[float], seed: int) -> None:
    x = np.array(values, dtype=np.float32)
    rng = np.random.default_rng(seed)
    assert choose(x, None) == choose(x, rng, temperature=0) == choose(x, rng, top_k=1) == choose(x, rng, top_p=1e-9)
    assert choose(x, None) == int(np.argmax(x))


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12), st.floats(0.01, 1.0), st.integers(0, 12),
    st.integers(0, 99),
)  # fmt: skip
def test_the_smallest_set_that_holds_top_p_is_kept_and_no_more(
    values: list[float], top_p: float, top_k: int, seed: int
) -> None:
    x = np.array(values, dtype=np.float32)
    p = np.sort(softmax(x))[::-1]
    p = p[:top_k] / p[:top_k].sum() if top_k else p
    needed = 1 + int((np.cumsum(p) < top_p - 1e-9).sum())
    token = choose(x, np.random.default_rng(seed), 1.0, top_k, top_p)
    # among equal probabilities any may be kept
    assert softmax(x)[token] >= np.sort(softmax(x))[::-1][min(needed, len(p)) - 1] - 1e-12


class ScriptedSession(Session):
    """Says a fixed list of tokens, whatever it reads."""

    def __init__(self, script: Sequence[int], context: int = 50) -> None:
        super().__init__()
        self.info = SessionInfo("scripted", "0", "", 10, context, 8, None, (9,), 1, 0)
        self.script = list(script)

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        return np.eye(10, dtype=np.float32)[self.script.pop(0)]


def test_generation_stops_at_an_end_mark_at_the_limit_and_at_a_full_context() -> None:
    assert list(generate(ScriptedSession([1, 2, 9, 3]), [0], [8, 9])) == [1, 2]
    assert list(generate(ScriptedSession([1, 2, 3, 4]), [0], [9], max_new=3)) == [1, 2, 3]
    assert list(generate(ScriptedSession([1] * 9, context=5), [0, 0, 0], [9])) == [1, 1, 1]
    assert list(generate(ScriptedSession([9]), [0], [9])) == []


def test_one_seed_is_one_answer() -> None:
    def answer(seed: int) -> list[int]:
        session = ScriptedSession([0] * 40)
        return list(generate(session, [0], [], max_new=30, pick=picker(seed, temperature=3.0)))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_settings_of_no_meaning_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(GoriError, match="allowed are"):
        picker(0, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = ModelConfig(
        kind="qwen3", vocab_size=23, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=32,
        max_position=40, init_std=0.6,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(Decoder(cfg).initialise(torch.Generator().manual_seed(2)), out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    return out


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 23, n).tolist() for n in (3, 7, 3, 1, 7, 12, 3, 39, 40, 38)]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_answers_in_batches_are_those_one_by_one(folder: Path, batch: int) -> None:
    session = open_session(folder)
    alone = evaluate.one_by_one(session, 5, session.info.context)(prompts())
    together = evaluate.batched(checkpoint.load(folder), 5, batch)(prompts())
    assert together == alone
    assert len({tuple(a) for a in alone}) > 4  # otherwise the comparison would say little
    rooms = [40 - len(p) for p in prompts()]
    assert all(len(a) <= room for a, room in zip(alone, rooms, strict=True))


def test_answers_are_the_argmax_of_the_whole_sequence_each_time(folder: Path) -> None:
    model = checkpoint.load(folder)
    for prompt, answer in zip(prompts()[:6], evaluate.batched(model, 5)(prompts()[:6]), strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for token in answer:
                assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
                ids.append(token)
            assert len(ids) == 40 or int(model(torch.tensor([ids]))[0, -1].argmax()) == 5


def test_a_prompt_that_exceeds_the_context_is_refused_by_both(folder: Path) -> None:
    session = open_session(folder)
    with pytest.raises(GoriError, match="41 more exceed its 40"):
        evaluate.one_by_one(session, 5, 40)([[0] * 41])
    with pytest.raises(GoriError, match="a prompt of 41 tokens exceeds the context of 40"):
        evaluate.batched(checkpoint.load(folder), 5)([[0] * 41])
