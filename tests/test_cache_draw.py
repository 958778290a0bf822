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
from gori.teacher.cache_draw import Drawn, draw, largest, uniforms
from gori.teacher.cache_file import Shard, pack

ROUNDS = 50


def distribution(vocab: int, seed: int = 0, sharp: float = 2.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(vocab, generator=g, dtype=torch.float64)).softmax(-1)


def dense(d: Drawn, vocab: int) -> np.ndarray:
    out = np.zeros((len(d.soft.ids), vocab))
    np.add.at(out, (np.arange(len(out))[:, None], d.soft.ids), d.soft.weights)
    return out


@pytest.mark.parametrize("proposal", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_mean_of_many_draws_is_the_distribution(proposal: float, missing: float) -> None:
    p, n = distribution(40) * (1 - missing), 20_000
    found = dense(draw(p.expand(n, -1), torch.from_numpy(uniforms(1, 0, 0, n, 10)), proposal), 40)
    q = torch.cat((p, torch.tensor([missing], dtype=torch.float64))) ** proposal
    q = (q / q.sum())[:-1]
    sigma = (p**2 / q * (1 - q) / (10 * n)).sqrt().numpy()
    # float16 rounds each weight by up to 2^-11 of it where the proposal is another
    slack = p.numpy() * 2**-11 if proposal != 1 else 0.0
    assert (np.abs(found.mean(0) - p.numpy()) < 5 * sigma + slack).all()


def test_scaling_weights_to_one_would_bias_another_proposal() -> None:
    """Why the weights stay as they are: the ratio of two estimates has another mean than the ratio of their means."""
    p, n = distribution(6, sharp=1.5), 200_000
    found = dense(draw(p.expand(n, -1), torch.from_numpy(uniforms(2, 0, 0, n, 3)), 0.5), 6)
    scaled = (found / found.sum(1, keepdims=True)).mean(0)
    assert np.abs(found.mean(0) - p.numpy()).max() < 0.005
    assert np.abs(scaled - p.numpy()).max() > 0.02


@given(st.integers(1, 60), st.integers(1, 255), st.integers(0, 9), st.floats(0.1, 6))
def test_weights_of_plain_draws_are_counts(vocab: int, rounds: int, seed: int, sharp: float) -> None:
    p = distribution(vocab, seed, sharp).float().expand(3, -1)
    d = draw(p, torch.from_numpy(uniforms(seed, 1, 2, 3, rounds)), 1.0)
    counts = d.soft.weights.astype(np.float64) * rounds
    assert np.allclose(counts, counts.round(), atol=1e-4)
    # a sum of float32 probabilities may lack 1e-7, which is then drawn with that chance
    assert (counts.round().sum(1) == rounds).all()
    assert (p.numpy()[np.arange(3)[:, None], d.soft.ids][d.soft.weights > 0] > 0).all()
    for ids, weights in zip(d.soft.ids, d.soft.weights, strict=True):
        assert len(set(ids[weights > 0].tolist())) == (weights > 0).sum()


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 9))
def test_the_largest_never_sum_to_more_than_there_is(vocab: int, k: int, seed: int) -> None:
    p = distribution(vocab, seed).expand(2, -1)
    d = largest(p, k)
    kept = d.soft.weights[0] > 0
    assert kept.sum() == min(k, vocab)
    assert set(d.soft.ids[0][kept].tolist()) == set(np.argsort(-p[0].numpy(), kind="stable")[:k].tolist())
    exact = p[0].numpy()[d.soft.ids[0]]
    assert (d.soft.weights[0][kept] <= exact[kept]).all()
    assert np.allclose(d.soft.weights[0][kept], exact[kept], rtol=2**-10, atol=1e-7)
    assert d.top1.all()


def test_draws_are_a_function_of_seed_epoch_row_and_position() -> None:
    whole = uniforms(3, 1, 7, 9, 5)
    assert np.array_equal(whole[:4], uniforms(3, 1, 7, 4, 5))
    others = [uniforms(4, 1, 7, 9, 5), uniforms(3, 2, 7, 9, 5), uniforms(3, 1, 8, 9, 5)]
    assert not any(np.array_equal(whole, o) for o in others)


@st.composite
def rows(draw_from: st.DrawFn, vocab: int, rounds: int) -> list[Example]:
    out = []
    for _ in range(draw_from(st.integers(1, 5))):
        n = draw_from(st.integers(1, 12))
        ids = draw_from(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))
        loss = [False, *draw_from(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))]
        soft = []
        for _ in range(sum(loss)):
            some = draw_from(st.lists(st.integers(0, vocab - 1), max_size=6, unique=True))
            counts = draw_from(st.lists(st.integers(1, 255), min_size=len(some), max_size=len(some)))
            soft.append(list(zip(some, counts, strict=True)))
        k = max([1, *map(len, soft)])
        padded = [s + [(0, 0)] * (k - len(s)) for s in soft]
        entries = np.asarray(padded, np.int64).reshape(len(soft), k, 2)
        scale = rounds or 256  # a 256th of a count is exact in float16
        weights = (entries[..., 1] / scale).astype(np.float32)
        out.append(Example(ids, loss, Soft(entries[..., 0].astype(np.int32), weights)))
    return out


@settings(max_examples=40)
@given(st.data(), st.sampled_from([7, 65_536, 65_537, 163_840, 1 << 24]), st.sampled_from([0, 50, 255]))
def test_a_shard_gives_back_what_was_packed(data: st.DataObject, vocab: int, rounds: int) -> None:
    import tempfile

    examples = data.draw(rows(vocab, rounds))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard.tab"
        path.write_bytes(pack(examples, vocab, rounds))
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
