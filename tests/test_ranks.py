"""Training on two ranks: the losses and weights of one process, the same after a cut, one sentence when one fails."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from rank_probe import CASES, DENSE, check_same, draw_with_a_large_student, fail, run_and_cut, start, train_case

from decoders import random_decoder
from gori import checkpoint
from gori.tokenizer import Tokenizer

BF16 = {"bf16": "dense", "bf16 muon": "moe", "bf16 states": "states"}
EXACT = [c for c in CASES if c not in (*BF16, "experts over all")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two ranks; in `cut` runs that were left unfinished, in `again` those, finished."""
    out = tmp_path_factory.mktemp("two")
    codes = start(2, out, run_and_cut, out, [*EXACT, *BF16], ["dense:2", "experts at once:3"])
    assert codes == [0, 0], (out / "rank-0.txt").read_text()[-3000:]
    return out


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_train_as_one_process(case: str, two: Path, tmp_path: Path) -> None:
    # float32 sums in another order, through six updates of 0.01
    weights, done = train_case(case, tmp_path / "state.pt")
    check_same(two / f"{case}.pt", weights, done, atol=2e-5)
    drawn = [e.get("on_policy") for e in done.log]
    assert (0 in drawn and 1 in drawn) if case.startswith("on-policy") else set(drawn) == {None}


@pytest.mark.parametrize(("case", "exact"), list(BF16.items()))
def test_bf16_follows_float32_within_its_mantissa(case: str, exact: str, two: Path, tmp_path: Path) -> None:
    got = [e["loss"] for e in torch.load(two / f"{case}.pt")["log"]]
    wanted = [e["loss"] for e in train_case(exact, tmp_path / "state.pt")[1].log]
    assert got == pytest.approx(wanted, rel=2**-8)
    assert got != pytest.approx(wanted, rel=1e-6)  # it was computed with


@pytest.mark.parametrize("case", ["dense", "experts at once"])
def test_a_run_that_two_ranks_left_is_finished_by_two_as_if_it_were_never_cut(case: str, two: Path) -> None:
    assert f"continuing at step {2 if case == 'dense' else 3}" in (two / "rank-0.txt").read_text()
    whole, again = torch.load(two / f"{case}.pt"), torch.load(two / "again" / f"{case}.pt")
    assert again["log"] == whole["log"]
    assert all(torch.equal(a, whole["weights"][name]) for name, a in again["weights"].items())


def test_a_run_that_two_ranks_left_is_finished_by_one(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = shutil.copytree(two / "cut" / "experts at once.training.pt", tmp_path / "state.pt")
    weights, done = train_case("experts at once", state)
    assert "continuing at step 3" in capsys.readouterr().err
    check_same(two / "experts at once.pt", weights, done, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_both_with_its_sentence_alone(rank: int, tmp_path: Path) -> None:
    codes = start(2, tmp_path, fail, rank, tmp_path)
    said = [(tmp_path / f"rank-{r}.txt").read_text() for r in (0, 1)]
    assert codes == [1, 1]
    assert "GoriError: this row is refused" in said[rank]
    assert "Traceback" not in said[1 - rank]


def test_on_policy_steps_of_a_student_that_no_rank_may_hold_are_refused(
    toy: Path, toy_tokenizer: Path, tmp_path: Path
) -> None:
    vocabulary = Tokenizer.load(toy_tokenizer).vocab_size
    (tmp_path / "teacher").mkdir()
    checkpoint.save(random_decoder(dataclasses.replace(DENSE, vocab_size=vocabulary)), tmp_path / "teacher")
    codes = start(2, tmp_path, draw_with_a_large_student, tmp_path, toy, toy_tokenizer)
    said = "".join((tmp_path / f"rank-{r}.txt").read_text() for r in (0, 1))
    assert codes == [1, 1]
    assert "GoriError: on-policy steps under torchrun hold the student whole on every rank" in said
    assert not (tmp_path / "distill").exists()
