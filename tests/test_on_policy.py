"""Answers that a student draws: the right distribution, the same in every run, and a loss at what was drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoders import random_decoder
from gori import evaluate
from gori.corpus import Corpus, epochs
from gori.data import Example
from gori.distill.objective import Draws, divergence_loss
from gori.distill.on_policy import chosen, examples, near, prompts_of, sampled
from gori.model import Decoder, ModelConfig
from gori.teacher.train import Loss, TrainSettings, fit, to_tensors
from gori.tokenizer import Tokenizer

SMALL = ModelConfig(
    kind="qwen3", vocab_size=19, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48,
    init_std=0.4, max_position=40,
)  # fmt: skip
CPU = torch.device("cpu")
END = 3


def random_prompts(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(4, 19, (n,), generator=g).tolist() for n in lengths]


def test_nearly_cold_draws_of_one_batch_are_each_prompts_own_greedy_answer() -> None:
    model, prompts = random_decoder(SMALL), random_prompts(5, 11, 7, 7, 2)
    want = evaluate.batched(model, END)(prompts)
    got = sampled(model, prompts, END, 1e-4, 0, 96)
    for w, a in zip(want, got, strict=True):
        assert (a[:-1] if a[-1] == END else a) == w
    assert model.training is False


def test_draws_follow_the_models_distribution_at_the_temperature() -> None:
    """4,000 first tokens of one prompt: every share within five standard errors."""
    model, (prompt,) = random_decoder(SMALL), random_prompts(6)
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1] / 1.7).softmax(-1)
    first = torch.tensor([a[0] for a in sampled(model, [prompt] * 4000, END, 1.7, 1, 1)])
    share = torch.bincount(first, minlength=19) / 4000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-4).all()


def test_later_tokens_are_drawn_given_those_before() -> None:
    """Second tokens after the likeliest first one, of rows whose prompts have two lengths."""
    model, prompts = random_decoder(SMALL), random_prompts(6, 8)
    said = sampled(model, [prompts[0]] * 6000 + [prompts[1]], END, 1.0, 2, 2)
    first = max(range(19), key=lambda t: sum(a[0] == t for a in said[:-1]) * (t != END))
    with torch.no_grad():
        p = model(torch.tensor([[*prompts[0], first]]))[0, -1].softmax(-1)
    second = torch.tensor([a[1] for a in said[:-1] if a[0] == first])
    share = torch.bincount(second, minlength=19) / len(second)
    assert len(second) > 300
    assert ((share - p).abs() < 5 * (p * (1 - p) / len(second)).sqrt() + 1e-3).all()


def test_an_answer_ends_with_its_mark_its_length_or_the_context() -> None:
    model, prompts = random_decoder(SMALL), random_prompts(4, 39, 30)
    for seed in range(5):
        for longest in (1, 6, 96):
            for prompt, a in zip(prompts, sampled(model, prompts, END, 3.0, seed, longest), strict=True):
                assert 1 <= len(a) <= min(longest, 40 - len(prompt))
                assert END not in a[:-1]
                assert a[-1] == END or len(a) == min(longest, 40 - len(prompt))


def test_draws_are_a_function_of_the_seed_and_leave_the_model_training() -> None:
    model, prompts = random_decoder(SMALL).train(), random_prompts(5, 9)
    model.dropout.p = 0.5
    model.dropout.seed(0, CPU)
    a, b, c = (sampled(model, prompts, END, 2.0, seed, 12) for seed in (7, 7, 8))
    assert a == b != c
    assert model.training


@given(st.integers(0, 50), st.floats(0.05, 1), st.floats(0, 0.9))
def test_the_share_of_steps_after_the_start_is_on_policy(seed: int, share: float, start: float) -> None:
    found = [chosen(share, start, step / 600, seed) for step in range(600)]
    after = [f for step, f in enumerate(found) if step / 600 >= start]
    assert not any(found[: 600 - len(after)])
    assert abs(sum(after) - share * len(after)) <= 5 * (len(after) * share * (1 - share)) ** 0.5 + 1e-9


def test_a_prompt_is_what_stands_before_the_last_answer() -> None:
    rows = [
        Example([1, 5, 6, 2, 7, 3], [False, False, False, False, True, True]),
        Example([1, 5, 2, 7, 3, 1, 6, 2, 8, 3], [False, False, False, True, True, False, False, False, True, True]),
    ]
    b = to_tensors(rows, 0, CPU)
    assert prompts_of(b.ids_BT, b.loss_BT, b.valid_BT) == [[1, 5, 6, 2], [1, 5, 2, 7, 3, 1, 6, 2]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 10), st.integers(0, 99))
def test_near_prompts_are_neighbours_by_length(lengths: list[int], count: int, seed: int) -> None:
    got = near([[0] * n for n in lengths], count, seed)
    taken = [len(p) for p in got]
    order = sorted(lengths)
    assert len(got) == min(count, len(lengths))
    assert any(order[i : i + len(got)] == taken for i in range(len(order)))


def test_the_loss_of_an_on_policy_step_is_the_divergence_at_the_drawn_answers() -> None:
    student, teacher = random_decoder(SMALL), random_decoder(SMALL, 1)
    prompts = random_prompts(5, 7)
    truth = to_tensors(examples(prompts, [[5, 6, END], [7, END]]), 0, CPU, progress=0.5, noise=11)
    draws = Draws(1.0, 1.5, 0.3, 0, END, 0)
    weights = {"reverse_kl": 1.0, "ce": 0.5}
    total, entry = divergence_loss(teacher, weights, 1.0, draws=draws)(student, truth)
    assert set(entry) == {"loss", "reverse_kl", "on_policy"}
    said = to_tensors(examples(prompts, sampled(student, prompts, END, 1.5, 11, 96)), 0, CPU)
    want, _ = divergence_loss(teacher, {"reverse_kl": 1.0}, 1.0)(student, said)
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    before = dataclasses.replace(truth, progress=0.1)
    assert set(divergence_loss(teacher, weights, 1.0, draws=draws)(student, before)[1]) == {
        "loss", "reverse_kl", "ce", "on_policy",
    }  # fmt: skip


def test_prompts_of_their_own_take_the_place_of_the_batchs() -> None:
    student, pool = random_decoder(SMALL), random_prompts(6, 6, 6, 30)
    truth = to_tensors(examples(random_prompts(9, 9), [[5, END], [7, END]]), 0, CPU, noise=3)
    b = Draws(1.0, 1.0, 0.0, 0, END, 0, prompts=pool).batch(student, truth)
    for row in b.ids_BT.tolist():
        assert any(row[: len(p)] == p for p in pool)
    assert len(b.ids_BT) == 2


class CutError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_cut_off_draws_the_same_answers(
    toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    cfg = dataclasses.replace(SMALL, vocab_size=360, init_std=0.05, max_position=200)
    tokenizer = Tokenizer.load(toy_tokenizer)
    rows = epochs(toy_corpus.train, tokenizer, 200, 0, 0.5)
    teacher = random_decoder(cfg, 1)
    settings = TrainSettings(
        steps=8, batch_tokens=200, muon_lr=0.02, adam_lr=0.02, warmup_steps=2, checkpoint_every_s=0
    )
    calls = 0

    def loss_cut_at(last: int | None) -> Loss:
        inner = divergence_loss(teacher, {"jsd": 1.0, "ce": 0.5}, 1.0, draws=Draws(0.6, 1.0, 0.2, 1, END, 0, longest=8))

        def loss(model: Decoder, batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise CutError
            return inner(model, batch)

        return loss

    def go(name: str, loss: Loss) -> tuple[Decoder, list[dict[str, Any]]]:
        model = random_decoder(cfg)
        done = fit(
            model, rows, loss, settings, seed=1, pad=0, label=name, evaluate=lambda _: {}, state=tmp_path / name,
            fingerprint=name, workers=workers,
        )  # fmt: skip
        return model, done.log

    whole, log = go("whole", loss_cut_at(None))
    calls = 0
    with pytest.raises(CutError):
        go("cut", loss_cut_at(5 * workers + 1))
    resumed, log_resumed = go("cut", loss_cut_at(None))
    assert log == log_resumed
    assert 0 < sum(e["on_policy"] for e in log) < 8
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
