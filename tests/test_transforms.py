"""awq, smoothquant and rotate: the same function in float64, nothing added, and less error where they promise it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from decoders import random_decoder
from gori import norm, quantized
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.quantize.awq import awq, proposals
from gori.quantize.blocks import SITES, linear
from gori.quantize.calibration import Batch
from gori.quantize.fold import Seen, common, copied, scale_head_inputs, scale_inputs, thinned
from gori.quantize.layout import layout, mixed
from gori.quantize.rotate import hadamard, rotate, rotation
from gori.quantize.rtn import METHODS, nearest
from gori.quantize.smoothquant import smoothquant
from gori.quantized import EMBEDDING, HEAD, TensorScheme, quantize_activations

CONFIG = ModelConfig(
    kind="qwen3", vocab_size=40, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
    init_std=0.3, max_position=32,
)  # fmt: skip
SHAPES = [(kind, tied, kv) for kind in ("llama", "qwen2", "qwen3") for tied in (True, False) for kv in (2, 1)]
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(0, 40, (3, 12), generator=GENERATOR)
VALID = torch.ones_like(IDS, dtype=torch.bool)
VALID[0, 8:] = False
BATCHES = [
    Batch(IDS, VALID, VALID, torch.arange(3)),
    Batch(
        torch.randint(0, 40, (4, 15), generator=GENERATOR), *[torch.ones(4, 15, dtype=torch.bool)] * 2, torch.arange(4)
    ),
]


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are computed in float32 whatever the weights are; here they must not hide an error behind that."""

    def exact(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return x * scale, scale

    monkeypatch.setattr(norm, "normed", exact)


def decoder(seed: int = 0, **changes: object) -> Decoder:
    return random_decoder(dataclasses.replace(CONFIG, **changes), seed)  # type: ignore[arg-type]


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def gap(model: Decoder, changed: Decoder) -> float:
    """Largest difference of logits over the largest logit."""
    want = logits(model)
    return float((logits(changed) - want).abs().max() / want.abs().max())


def kl(model: Decoder, rounded: Decoder) -> float:
    want, got = logits(model).log_softmax(-1), logits(rounded).log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1)[VALID].mean())


def rounded_to_nearest(model: Decoder, scheme: str) -> Decoder:
    spec = layout(model, scheme, "float")
    return quantized.apply(copied(model), nearest(model, spec, METHODS["mse"]), spec)


TRANSFORMS: dict[str, Callable[[Decoder], Decoder]] = {
    "awq": lambda m: awq(m, BATCHES, layout(m, "w3a8-channel", "float")),
    "smoothquant": lambda m: smoothquant(m, BATCHES, layout(m, "w8a8-channel", "float")),
    "rotate": rotate,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "tied", "kv_heads"), SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_other_weights_and_the_same_function(name: str, kind: str, tied: bool, kv_heads: int) -> None:
    model = decoder(kind=kind, tied=tied, kv_heads=kv_heads).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    changed = TRANSFORMS[name](model)
    moved = [k for k, v in changed.state_dict().items() if k in before and not torch.equal(v, before[k])]
    assert len(moved) >= 8, "too little was changed to prove anything"
    # 1e-10: some hundreds of float64 roundings, 1e-16 each, through two blocks
    assert gap(model, changed) < 1e-10
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model itself was changed"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "tied", "kv_heads"), SHAPES)
def test_any_positive_factors_fold_at_every_site(kind: str, tied: bool, kv_heads: int) -> None:
    model = decoder(kind=kind, tied=tied, kv_heads=kv_heads).double()

    @given(st.integers(0, 9999), st.floats(0, 3))
    def folds(seed: int, spread: float) -> None:
        generator, changed = torch.Generator().manual_seed(seed), copied(model)

        def factors(size: int) -> Tensor:
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread).exp()

        for block in changed.layers:
            for site, names in enumerate(SITES):
                f = factors(linear(block, names[0]).weight.shape[1])  # type: ignore[arg-type]
                scale_inputs(block, site, common(model.cfg, f) if site == 1 else f)  # type: ignore[arg-type]
        scale_head_inputs(changed, factors(CONFIG.hidden_size))
        assert gap(model, changed) < 1e-10

    folds()


def test_query_heads_of_one_value_head_cannot_have_factors_of_their_own() -> None:
    with pytest.raises(AssertionError, match="share a value head"):
        scale_inputs(decoder().layers[0], 1, torch.arange(1.0, 33.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 76, 128, 192, 224, 320, 768, 896, 1152])
def test_a_hadamard_matrix_has_entries_of_size_one_and_orthogonal_rows(order: int) -> None:
    H = hadamard(order)
    assert H is not None
    assert (H.abs() == 1).all()
    assert torch.equal(H @ H.mT, order * torch.eye(order, dtype=torch.float64))


@given(st.integers(1, 200), st.integers(0, 9))
def test_a_rotation_of_any_size_is_orthogonal(size: int, seed: int) -> None:
    R = rotation(size, torch.Generator().manual_seed(seed))
    assert torch.allclose(R @ R.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    if hadamard(size) is not None:
        # a single large channel ends up as 1 / sqrt(size) of itself everywhere
        assert torch.allclose(R.abs(), torch.full_like(R, size**-0.5), rtol=1e-12)


def test_rotation_spreads_a_planted_channel_over_all() -> None:
    """Rows of the table with one channel of 100 and normal others: the largest is 100 among 1s before, and at most
    100 / sqrt(32) + 4 σ afterwards."""
    model = decoder()
    with torch.no_grad():
        model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(2))  # type: ignore[operator,union-attr]
        model.embed_tokens.weight[:, 5] = 100.0  # type: ignore[index]
    assert float(rotate(model).embed_tokens.weight.abs().max()) < 100 / math.sqrt(32) + 4 * math.sqrt(1)  # type: ignore[operator,union-attr,arg-type]


@settings(max_examples=20)  # the reference goes through groups and scales one by one
@given(st.integers(0, 999), st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 8]), st.sampled_from([8, 16]))
def test_an_error_is_that_of_the_rounded_outputs_and_the_chosen_factors_never_have_more_than_none(
    seed: int, bits: int, group: int, activation_bits: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    s = TensorScheme(bits, group, activation_bits)
    x_BTI, counts = torch.randn(2, 10, 16, generator=g) * torch.randn(16, generator=g).exp(), VALID[:2, :10]
    linears = [nn.Linear(16, out, bias=bias) for out, bias in ((4, True), (2, False), (3, True))]
    for p in [p for m in linears for p in m.parameters()]:
        nn.init.normal_(p, generator=g).requires_grad_(False)
    schemes = [s, s, None]
    seen = Seen([x_BTI], [counts], linears, schemes, lambda modules, x: torch.cat([m(x) for m in modules], -1))

    def error(factor_I: Tensor) -> float:
        error = power = 0.0
        for m, scheme in zip(linears, schemes, strict=True):
            w = m.weight * factor_I
            held = (quantized_by_brute_force(w, scheme) if scheme else w).double()
            x = x_BTI[counts] / factor_I
            given = quantize_activations(x) if scheme and activation_bits == 8 else x
            bias = 0 if m.bias is None else m.bias.double()
            want = x_BTI[counts].double() @ m.weight.double().mT + bias
            error += float((given.double() @ held.mT + bias - want).square().sum())
            power += float(want.square().sum())
        return error / power

    best, ones = seen.best(proposals(seen)), torch.ones(16)
    # the reference sums in float64; 1e-3 of an error that is itself a difference of float32 numbers
    assert seen.error(best) == pytest.approx(error(best), rel=1e-3)
    assert seen.error(ones) == pytest.approx(error(ones), rel=1e-3)
    assert seen.error(best) <= seen.error(ones)


def quantized_by_brute_force(w: Tensor, s: TensorScheme) -> Tensor:
    """Every group with the scale of least squared error of those that `mse` tries, one by one."""
    high = 2 ** (s.bits - 1) - 1
    out = torch.empty_like(w)
    for row in range(len(w)):
        for part in range(0, w.shape[1], s.group_size or w.shape[1]):
            at = slice(part, part + (s.group_size or w.shape[1]))
            tried = [
                (w[row, at].abs().max() / (high + 0.5) * f).clamp(2.0**-14).bfloat16().float() for f in METHODS["mse"]
            ]
            held = [(w[row, at] / t).round().clamp(-high - 1, high) * t for t in tried]
            out[row, at] = min(held, key=lambda h: float((h - w[row, at]).square().sum()))
    return out


def planted(model: Decoder, times: float) -> Decoder:
    """The same function with one channel of every norm's output `times` larger, and its readers' columns smaller."""
    changed = copied(model)
    for block in changed.layers:
        for site in (0, 2):
            f = torch.ones(CONFIG.hidden_size)
            f[7] = 1 / times
            scale_inputs(block, site, f)  # type: ignore[arg-type]
    return changed


def test_smoothquant_gives_back_what_an_activation_outlier_costs() -> None:
    """A token's 32 roughly normal channels span about 4 to 5 standard deviations, with one of them 50 times larger some
    40 more: steps about 10 times coarser, and their error's square, which KL follows, about 100 times larger. Smoothed,
    the network is about as it was before anything was planted."""
    model = decoder(tied=False, init_std=0.15)
    spec = layout(model, "w8a8-channel", "float")
    hard = planted(model, 50)
    clean, harmed = kl(model, rounded_to_nearest(model, spec.scheme)), kl(model, rounded_to_nearest(hard, spec.scheme))
    smoothed = kl(model, rounded_to_nearest(smoothquant(hard, BATCHES, spec), spec.scheme))
    assert harmed > 25 * clean
    assert smoothed < 2 * clean


def test_awq_gives_back_what_a_weight_outlier_costs() -> None:
    """A column 50 times the others' size, whose inputs are as much smaller, takes a channel's 15 levels for itself: all
    other weights round to 0. With factors the network is about as it was before anything was planted."""
    model = decoder(tied=False, init_std=0.15)
    spec = layout(model, "w4a16-channel", "float")
    hard = planted(model, 1 / 50)
    harmed = kl(model, rounded_to_nearest(hard, spec.scheme))
    recovered = kl(model, rounded_to_nearest(awq(hard, BATCHES, spec), spec.scheme))
    assert recovered < harmed / 10
    assert recovered < 2 * kl(model, rounded_to_nearest(model, spec.scheme))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_twice_gives_the_same_bytes_and_no_module_more(name: str) -> None:
    model = decoder(tied=False)
    first, second = TRANSFORMS[name](model).state_dict(), TRANSFORMS[name](model).state_dict()
    assert list(first) == list(model.state_dict())
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_another_seed_gives_another_rotation() -> None:
    model = decoder()
    a, b = rotate(model, seed=0).state_dict(), rotate(model, seed=1).state_dict()
    assert not torch.equal(a["embed_tokens.weight"], b["embed_tokens.weight"])


def test_a_rotated_tied_model_has_a_head_of_its_own_and_norms_of_one() -> None:
    model = decoder(kind="qwen3")
    turned = rotate(model)
    assert not turned.cfg.tied
    assert set(turned.state_dict()) == set(model.state_dict()) | {"lm_head.weight"}
    for name, p in turned.named_parameters():
        if name.endswith("norm.weight") and "q_norm" not in name and "k_norm" not in name:
            assert torch.equal(p, torch.ones_like(p)), name


def test_activations_on_disk_give_the_same_and_leave_nothing(tmp_path: Path) -> None:
    model = decoder()
    spec = layout(model, "w4a8-channel", "float")
    there, here = awq(model, BATCHES, spec, on_disk=tmp_path), awq(model, BATCHES, spec)
    assert all(torch.equal(v, here.state_dict()[k]) for k, v in there.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_a_rotated_models_integers_survive_the_disk(tmp_path: Path) -> None:
    turned = rotate(decoder(hidden_size=32, intermediate_size=64))
    spec = layout(turned, "w4a8-g32")
    assert not spec.shared_head
    assert {EMBEDDING, HEAD} <= set(spec.tensors)
    tensors = nearest(turned, spec, METHODS["mse"])
    quantized.save(turned, tensors, spec, tmp_path)
    assert torch.equal(logits(quantized.load(tmp_path)), logits(quantized.apply(copied(turned), tensors, spec)))


def test_a_shared_head_stays_with_its_table() -> None:
    model = decoder()
    changed = awq(model, BATCHES, layout(model, "w4a16-channel"))
    assert changed.cfg.tied
    assert torch.equal(changed.embed_tokens.weight, model.embed_tokens.weight)  # type: ignore[arg-type]


def test_errors_are_measured_on_evenly_spread_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Batch(IDS, VALID, VALID, torch.arange(i, i + 3)) for i in range(0, 30, 3)]
    monkeypatch.setattr("gori.quantize.fold.TOKENS", 80)  # of 320
    few = thinned(rows)
    assert torch.cat([b.rows_B for b in few]).tolist() == list(range(0, 30, 4))
    assert all(torch.equal(b.ids_BT, IDS[b.rows_B % 3]) for b in few)
    monkeypatch.setattr("gori.quantize.fold.TOKENS", 320)
    assert torch.cat([b.rows_B for b in thinned(rows)]).tolist() == list(range(30))


def test_a_site_that_stays_float_keeps_its_weights() -> None:
    model = decoder()
    spec = mixed(model, "some", {"model.layers.1.mlp.down_proj.weight": TensorScheme(3, 0, 16)})
    changed = awq(model, BATCHES, spec).state_dict()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, changed[k])}
    assert moved == {"layers.1.mlp.down_proj.weight", "layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_mixture_of_experts_is_refused(name: str) -> None:
    model = decoder(kind="qwen3_moe", experts=4, experts_per_token=2)
    with pytest.raises(GoriError, match="mixture of experts is not quantized"):
        TRANSFORMS[name](model)
