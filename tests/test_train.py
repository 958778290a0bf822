"""The training loop: a run that was cut off ends at the same weights, it learns, and it refuses to go on from NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gori.corpus import Corpus, epochs
from gori.data import Example
from gori.distill.stage import divergence_loss
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.teacher.stage import answer_loss
from gori.teacher.train import Loss, Progress, TrainBatch, TrainSettings, fit, to_tensors
from gori.teacher.workers import Workers, split
from gori.tokenizer import Tokenizer

DENSE = ModelConfig(
    kind="qwen3", vocab_size=360, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, kind="qwen3_moe", intermediate_size=24, experts=4, experts_per_token=2)
SETTINGS = TrainSettings(
    steps=12, batch_tokens=200, muon_lr=0.02, adam_lr=0.02, warmup_steps=3, evaluate_every=5, checkpoint_every_s=0.0
)


class CutError(Exception):
    """Stands for a kill."""


def new(cfg: ModelConfig) -> Decoder:
    return Decoder(cfg).initialise(torch.Generator().manual_seed(0))


@pytest.fixture
def run(toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Decoder, Progress]]:
    rows = epochs(toy_corpus.train, Tokenizer.load(toy_tokenizer), 200, 0, 0.5)

    def go(model: Decoder, loss: Loss, name: str = "run", **changes: Any) -> tuple[Decoder, Progress]:
        settings = dataclasses.replace(SETTINGS, **changes)
        done = fit(
            model, rows, loss, settings, seed=1, pad=0, label=name, state=tmp_path / f"{name}.pt",
            evaluate=lambda m: {"dev_exact": 0.0}, fingerprint=name,
        )  # fmt: skip
        return model, done

    return go


def cut_at(loss: Loss, call: int) -> Loss:
    calls = 0

    def cut(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise CutError
        return loss(model, batch)

    return cut


def distilling() -> Loss:
    teacher = Decoder(MOE).initialise(torch.Generator().manual_seed(5)).eval()
    return divergence_loss(teacher, {"forward_kl": 0.5, "ce": 0.5}, 1.0, until=0.7)


CASES: dict[str, tuple[ModelConfig, Callable[[], Loss]]] = {
    "a mixture of experts": (MOE, lambda: answer_loss(0.01)),
    "a dense model": (DENSE, lambda: answer_loss(0.0)),
    "a distilled student": (DENSE, distilling),
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_twice_ends_at_the_same_weights_and_log(
    case: str,
    dropout: float,
    run: Callable[..., tuple[Decoder, Progress]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg, loss = CASES[case]
    whole, done = run(new(cfg), loss(), "whole", dropout=dropout)
    for call in (5, 4):  # calls are counted anew: 4 steps are done, then 3 more
        with pytest.raises(CutError):
            run(new(cfg), cut_at(loss(), call), "cut", dropout=dropout)
    again, redone = run(new(cfg), loss(), "cut", dropout=dropout)
    err = capsys.readouterr().err
    assert "continuing at step 4" in err
    assert "continuing at step 7" in err
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert redone.log == done.log
    assert (redone.step, redone.tokens) == (12, done.tokens)


def test_in_bfloat16_a_mixtures_gradients_stay_near_float32() -> None:
    """The stream is bfloat16 from the embedding on; weights and their gradients are float32."""
    ids = torch.randint(0, 360, (8, 30), generator=torch.Generator().manual_seed(0)).numpy()
    batch = to_tensors([Example(row, row > 50) for row in ids], 0, torch.device("cpu"))
    model, found = new(MOE).train(), []
    for narrow in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss, _ = answer_loss(0.01)(model, batch)
            assert batch.answer_hidden(model).dtype == (torch.bfloat16 if narrow else torch.float32)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(g.dtype == torch.float32 for g in found[1])
    wide, narrow = (torch.cat([g.flatten() for g in some]) for some in found)
    assert 0 < float((narrow - wide).norm() / wide.norm()) < 0.05


def test_a_mixture_that_torch_cannot_compile_is_refused(run: Callable[..., tuple[Decoder, Progress]]) -> None:
    with pytest.raises(GoriError, match="set precision to bf16, or compile off"):
        run(new(MOE), answer_loss(0.0), "compiled", compile=True)


def test_a_checkpoint_of_other_settings_is_left_alone(
    run: Callable[..., tuple[Decoder, Progress]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CutError):
        run(new(DENSE), cut_at(answer_loss(0.0), 5), "old")
    (tmp_path / "old.pt").rename(tmp_path / "new.pt")
    got, _ = run(new(DENSE), answer_loss(0.0), "new")
    assert "belongs to other settings or data: starting anew" in capsys.readouterr().err
    want, _ = run(new(DENSE), answer_loss(0.0), "fresh")
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def test_the_loss_falls_and_the_answers_become_right(
    run: Callable[..., tuple[Decoder, Progress]], toy_corpus: Corpus, toy_tokenizer: Path
) -> None:
    from gori import evaluate
    from gori.calls import END

    model, done = run(new(DENSE), answer_loss(0.0), "long", steps=120, batch_tokens=800)
    losses = [e["loss"] for e in done.log]
    assert losses[0] == pytest.approx(torch.tensor(360.0).log().item(), rel=0.05)  # uniform at first
    assert sum(losses[-5:]) / 5 < 0.3
    t = Tokenizer.load(toy_tokenizer)
    scored = evaluate.score(toy_corpus.train, evaluate.batched(model, t.id(END)), t, toy_corpus.functions)
    assert evaluate.summary(scored)["exact"] > 0.7


def test_gradients_are_clipped_and_their_norm_is_logged(run: Callable[..., tuple[Decoder, Progress]]) -> None:
    seen: list[float] = []
    plain = answer_loss(0.0)

    def hundredfold(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        value, entry = plain(model, batch)
        return 100 * value, entry

    _, done = run(new(DENSE), hundredfold, "clip", steps=2, clip=1.0)
    seen += [e["gradient_norm"] for e in done.log]
    assert min(seen) > 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_with_the_step_and_the_rates(
    bad: float, run: Callable[..., tuple[Decoder, Progress]]
) -> None:
    plain = answer_loss(0.0)

    def breaks(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        value, entry = plain(model, batch)
        return value * bad, entry

    with pytest.raises(GoriError, match=r"its gradient (nan|inf) at step 0: lower muon_lr 0\.02 or adam_lr 0\.02"):
        run(new(DENSE), breaks, "nan")


def test_targets_are_the_answers_and_hidden_states_stand_at_the_tokens_before_them(
    toy_corpus: Corpus, toy_tokenizer: Path
) -> None:
    t = Tokenizer.load(toy_tokenizer)
    rows = epochs(toy_corpus.train, t, 200, 0, 0.0)(0)[:3]
    batch = to_tensors(rows, 0, torch.device("cpu"))
    wanted = [i for e in rows for i, on in zip(e.ids, e.loss, strict=True) if on]
    assert batch.targets.tolist() == wanted
    model = new(DENSE).eval()
    with torch.no_grad():
        got = batch.answer_hidden(model)
        one_by_one = [
            model.hidden(torch.tensor([e.ids[:i]]))[0, -1] for e in rows for i, on in enumerate(e.loss) if on
        ]  # fmt: skip
    torch.testing.assert_close(got, torch.stack(one_by_one), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "a mixture of experts"])
def test_two_workers_find_the_gradient_of_one(cfg: ModelConfig, toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    rows = epochs(toy_corpus.train, Tokenizer.load(toy_tokenizer), 200, 0, 0.0)(0)[:9]
    loss = answer_loss(0.0)

    def gradient(count: int) -> list[Tensor]:
        model = new(cfg)
        team = Workers(model, count)
        team.train()
        parts = [to_tensors(part, 0, torch.device("cpu")) for part in split(rows, count)]
        answers = [len(p.targets) for p in parts]
        team.gradient(parts, [n / sum(answers) for n in answers], loss)
        team.close()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, two in zip(gradient(1), gradient(2), strict=True):
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)  # float32 sums in another order
    assert all(torch.equal(a, b) for a, b in zip(gradient(2), gradient(2), strict=True))


def test_the_teacher_is_heard_up_to_its_share_of_the_steps_and_no_longer(
    run: Callable[..., tuple[Decoder, Progress]],
) -> None:
    _, done = run(new(DENSE), distilling(), "heard")  # 12 steps, 0.7 of them are 8.4
    assert ["forward_kl" in entry for entry in done.log] == [True] * 9 + [False] * 3


def test_dropout_leaves_out_its_share_keeps_the_mean_and_draws_anew_at_each_step_and_part() -> None:
    model = new(DENSE)
    drop, x = model.dropout, torch.ones(200, 300)
    drop.p = 0.25

    def masked(seed: int) -> Tensor:
        drop.seed(seed, x.device)
        return drop(x)

    y = masked(1)
    # 60,000 draws: a standard error of 0.0018
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.008)
    assert y.mean().item() == pytest.approx(1.0, abs=0.011)
    assert torch.equal(y, masked(1))
    assert not torch.equal(y, masked(2))
    assert torch.equal(drop.eval()(x), x)


def test_dropout_changes_what_is_learned_and_nothing_of_an_evaluation(
    run: Callable[..., tuple[Decoder, Progress]],
) -> None:
    plain, _ = run(new(DENSE), answer_loss(0.0), "plain")
    dropped, _ = run(new(DENSE), answer_loss(0.0), "dropped", dropout=0.2)
    assert not torch.equal(plain.embed_tokens.weight, dropped.embed_tokens.weight)  # type: ignore[arg-type]
    ids = torch.randint(0, 360, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped(ids), dropped(ids))
