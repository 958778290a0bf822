"""Few entries for a distribution: drawn without bias, or the largest; packed and unpacked exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gori.data import Example
from gori.soft import Soft
from gori.teacher.cache_draw import REST, Drawn, draw, largest, uniforms
from gori.teacher.cache_file import Shard, pack


def distribution(vocab: int, seed: int = 0, sharp: float = 2.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(vocab, generator=g, dtype=torch.float64)).softmax(-1)


def dense(d: Drawn, vocab: int) -> np.ndarray:
    out = np.zeros((len(d.soft.ids), vocab))
    np.add.at(out, (np.arange(len(out))[:, None], d.soft.ids), d.soft.weights)
    return out


def inclusion(p: np.ndarray, n: int) -> np.ndarray:
    """Each one's chance to be among n that are taken in proportion to p, none above 1: one after the other is sure."""
    sure = np.zeros(len(p), bool)
    while True:
        chance = np.where(sure, 1.0, (n - sure.sum()) * p / max(p[~sure].sum(), 1e-300))
        if (chance <= 1 + 1e-12).all() or sure.all():
            return chance.clip(0, 1)
        sure |= chance > 1


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("sharp", [0.5, 2.0, 5.0])
def test_the_mean_of_many_draws_is_the_distribution(k: int, missing: float, sharp: float) -> None:
    p, n = distribution(40, sharp=sharp) * (1 - missing), 20_000
    found = dense(draw(p.expand(n, -1), torch.from_numpy(uniforms(1, 0, 0, n)), k), 40)
    outcomes = np.append(p.numpy(), missing)
    taken = np.sort(outcomes)[::-1]
    count = min(k, next(h for h in range(42) if outcomes.sum() - taken[:h].sum() <= REST) + 1)
    chance = inclusion(outcomes, count)
    assert (found > 0).mean(0) == pytest.approx(chance[:-1], abs=5 * 0.5 / n**0.5)
    sigma = p.numpy() * np.sqrt((1 / chance[:-1] - 1) / n)
    assert (np.abs(found.mean(0) - p.numpy()) <= 5 * sigma + p.numpy() * 2**-16).all()
    error, replaced = ((found - p.numpy()) ** 2).sum(1).mean(), float((p * (1 - p)).sum()) / count
    assert error < 1.02 * replaced  # of as many draws with replacement
    if k == 12 and sharp >= 2:
        assert error < 0.3 * replaced


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 9), st.floats(0.1, 20))
def test_drawn_weights_sum_to_one_and_large_ones_are_the_probabilities(
    vocab: int, k: int, seed: int, sharp: float
) -> None:
    p = distribution(vocab, seed, sharp).float().expand(3, -1)
    d = draw(p, torch.from_numpy(uniforms(seed, 1, 2, 3)), k)
    kept = d.soft.weights > 0
    assert d.soft.weights.sum(1) == pytest.approx(np.ones(3), abs=3e-5)
    assert (kept.sum(1) <= k).all()
    exact = p.numpy()[np.arange(3)[:, None], d.soft.ids]
    assert (exact[kept] > 0).all()
    assert (
        d.soft.weights[kept] >= exact[kept] * (1 - 2**-15)
    ).all()  # as it is, or raised to what all drawn ones weigh
    for row in range(3):
        raised = d.soft.weights[row] > exact[row] * (1 + 2**-15)
        assert len(set(d.soft.weights[row][raised & kept[row]].tolist())) <= 1
    assert d.top1.all() or k < vocab
    if p[0].sort().values[-k:].sum() > 1 - REST and k < vocab:
        assert d.top1.all()


def test_a_sure_teacher_has_few_entries() -> None:
    p = torch.tensor([[0.99995, 3e-5, 1e-5, 1e-5], [0.9, 0.09995, 4e-5, 1e-5]], dtype=torch.float64)
    d = draw(p, torch.tensor([0.5, 0.99]), 4)
    assert (d.soft.weights > 0).sum(1).tolist() == [2, 3]
    assert d.soft.weights[0][:2] == pytest.approx([0.99995, 5e-5], rel=2**-15)
    assert d.soft.ids[1][:3].tolist() == [0, 1, 3]


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 9))
def test_the_largest_never_sum_to_more_than_there_is(vocab: int, k: int, seed: int) -> None:
    p = distribution(vocab, seed).expand(2, -1)
    d = largest(p, k)
    kept = d.soft.weights[0] > 0
    assert kept.sum() == min(k, vocab)
    assert set(d.soft.ids[0][kept].tolist()) == set(np.argsort(-p[0].numpy(), kind="stable")[:k].tolist())
    exact = p[0].numpy()[d.soft.ids[0]]
    assert (d.soft.weights[0][kept] <= exact[kept]).all()
    assert np.allclose(d.soft.weights[0][kept], exact[kept], rtol=2**-15, atol=0)
    assert d.top1.all()


def test_draws_are_a_function_of_seed_epoch_row_and_position() -> None:
    whole = uniforms(3, 1, 7, 9)
    assert np.array_equal(whole[:4], uniforms(3, 1, 7, 4))
    others = [uniforms(4, 1, 7, 9), uniforms(3, 2, 7, 9), uniforms(3, 1, 8, 9)]
    assert not any(np.array_equal(whole, o) for o in others)


@st.composite
def rows(draw_from: st.DrawFn, vocab: int) -> list[Example]:
    out = []
    for _ in range(draw_from(st.integers(1, 5))):
        n = draw_from(st.integers(1, 12))
        ids = draw_from(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))
        loss = [False, *draw_from(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))]
        soft = []
        for _ in range(sum(loss)):
            some = draw_from(st.lists(st.integers(0, vocab - 1), max_size=6, unique=True))
            parts = draw_from(st.lists(st.integers(1, 1 << 16), min_size=len(some), max_size=len(some)))
            soft.append(list(zip(some, parts, strict=True)))
        k = max([1, *map(len, soft)])
        padded = [s + [(0, 0)] * (k - len(s)) for s in soft]
        entries = np.asarray(padded, np.int64).reshape(len(soft), k, 2)
        weights = (entries[..., 1] / (1 << 16)).astype(np.float32)  # exact in 16 bits
        out.append(Example(ids, loss, Soft(entries[..., 0].astype(np.int32), weights)))
    return out


@settings(max_examples=40)
@given(st.data(), st.sampled_from([7, 65_536, 65_537, 163_840, 1 << 24]))
def test_a_shard_gives_back_what_was_packed(data: st.DataObject, vocab: int) -> None:
    import tempfile

    examples = data.draw(rows(vocab))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard.tab"
        path.write_bytes(pack(examples, vocab))
        shard = Shard(path)
        assert len(shard) == len(examples)
        for wanted, found in zip(examples, shard, strict=True):
            assert list(found.ids) == wanted.ids
            assert list(found.loss) == wanted.loss
            assert wanted.soft is not None
            assert found.soft is not None
            width = found.soft.ids.shape[1]
            assert not wanted.soft.weights[:, width:].any()
            assert np.array_equal(found.soft.weights, wanted.soft.weights[:, :width])
            used = found.soft.weights > 0
            assert np.array_equal(found.soft.ids[used], wanted.soft.ids[:, :width][used])
