"""Training on four ranks, and checkpoints that another number of ranks goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_probe import check_same, run_and_cut, run_cases, start, train_case

from gori.teacher.wholes import owners

CASES = ("dense", "few rows", "experts", "experts over all", "resharded")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases on four ranks; in `cut` runs that they left unfinished."""
    out = tmp_path_factory.mktemp("four")
    codes = start(4, out, run_and_cut, out, CASES, ["dense:3", "experts:2"])
    assert codes == [0] * 4, (out / "rank-0.txt").read_text()[-3000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_train_as_one_process(case: str, four: Path, tmp_path: Path) -> None:
    check_same(four / f"{case}.pt", *train_case(case, tmp_path / "state.pt"), atol=2e-5)


def test_two_ranks_go_on_from_what_four_wrote_and_from_what_one_wrote(four: Path, tmp_path: Path) -> None:
    for case in ("dense", "experts"):
        shutil.copytree(four / "cut" / f"{case}.training.pt", tmp_path / f"{case}.training.pt")
    run_cases(tmp_path, ["accumulate:4"])
    assert (tmp_path / "accumulate.training.pt").is_file()
    assert start(2, tmp_path, run_cases, tmp_path, ["dense", "experts", "accumulate"]) == [0, 0]
    said = (tmp_path / "rank-0.txt").read_text()
    assert [f"continuing at step {n}" in said for n in (3, 2, 4)] == [True] * 3
    for case in ("dense", "experts", "accumulate"):
        check_same(tmp_path / f"{case}.pt", *train_case(case, tmp_path / f"{case}-whole.pt"), atol=2e-5)


def test_one_process_goes_on_from_what_four_wrote_and_leaves_a_file(
    four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Path(shutil.copytree(four / "cut" / "experts.training.pt", tmp_path / "state.pt"))
    shutil.copytree(state, tmp_path / "other.pt")
    check_same(four / "experts.pt", *train_case("experts", state), atol=2e-5)
    assert "continuing at step 2" in capsys.readouterr().err
    train_case("experts", tmp_path / "other.pt", cut_after=4, steps=4)
    assert (tmp_path / "other.pt").is_file()
    assert torch.load(tmp_path / "other.pt", weights_only=True)["fingerprint"] == "experts"


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_matrices_are_divided_so_that_no_rank_has_more_than_its_share_and_one_matrix(
    sizes: list[int], ranks: int
) -> None:
    owner = owners(sizes, ranks)
    load = [sum(s for s, o in zip(sizes, owner, strict=True) if o == r) for r in range(ranks)]
    assert max(load) <= sum(sizes) / ranks + max(sizes, default=0)
