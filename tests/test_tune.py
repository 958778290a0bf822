"""Tuning of scales and quantization-aware training: gradients, what is returned, and that this is what was trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decoders import batches, random_decoder
from gori import quantized
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.quantize.calibration import of_examples
from gori.quantize.fake import FakeLinear, FakeTable, Rounding, Weight, integers, pulled, scale_of, student
from gori.quantize.fidelity import Reference
from gori.quantize.fitting import Trained
from gori.quantize.layout import layout, mixed
from gori.quantize.qat import latents, qat
from gori.quantize.rtn import METHODS, nearest, portable
from gori.quantize.tune import tune
from gori.quantized import EMBEDDING, Quantization, QuantizedTensor, TensorScheme, quantize_activations
from students import LLAMA, of

SEEN = batches(200, rows=120)
SHORT = {"epochs": 4, "step_tokens": 128}
CASES = {
    "tied and shared": (of("qwen3"), "w3a8-g32", None),
    "tied, table apart": (LLAMA, "w4a16-g32", "w8-channel"),
    "untied, biases": (of("qwen2", tied=False), "w2a8-g64", "w4-g32"),
    "float table": (LLAMA, "w4a8-channel", "float"),
}


def case(name: str) -> tuple[Decoder, Quantization]:
    cfg, scheme, embedding = CASES[name]
    model = random_decoder(cfg).requires_grad_(False)
    return model, layout(model, scheme, embedding)


def trained(name: str, model: Decoder, spec: Quantization, **more: object) -> Trained:
    if name == "tune":
        return tune(model, nearest(model, spec, METHODS["mse"]), spec, SEEN, **{**SHORT, **more})  # type: ignore[arg-type]
    return qat(model, spec, SEEN, **{**SHORT, **more})  # type: ignore[arg-type]


def settled(model: Decoder, spec: Quantization, t: Trained) -> Decoder:
    """What a checkpoint of the result computes with."""
    return quantized.apply(t.settle(copy.deepcopy(model)), t.tensors, spec)


@given(st.integers(0, 999), st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2]))
def test_gradients_pass_straight_through_both_roundings(seed: int, bits: int, groups: int) -> None:
    g = torch.Generator().manual_seed(seed)
    high = 2 ** (bits - 1)
    u = (torch.rand(3, 8, generator=g, dtype=torch.float64) - 0.5) * 2.4 * high
    log = torch.randn(3, groups, generator=g, dtype=torch.float64) * 0.3 - 2
    grad = torch.randn(3, 8, generator=g, dtype=torch.float64)
    # autograd of the same product with the roundings' results added as constants: the definition of straight-through
    v, log2 = u.clone().requires_grad_(), log.clone().requires_grad_()
    clamped = v.clamp(-high - 0.5, high - 0.5)
    q = clamped + (integers(u, bits) - clamped).detach()
    s = log2.exp() + (scale_of(log) - log2.exp()).detach()
    (q.view(3, groups, -1) * s.unsqueeze(-1)).view(3, 8).backward(grad)
    got_u, got_log = pulled(grad, u, log, bits)
    torch.testing.assert_close(got_u, v.grad)
    # a portable scale is within 2^-8 of the exponential, by which d exp / d log differs from the scale itself
    torch.testing.assert_close(got_log, log2.grad, rtol=2.0**-7, atol=1e-12)
    assert pulled(grad, integers(u, bits).to(torch.int8), log, bits)[0] is None


def test_a_layers_gradients_are_those_of_a_float_layer_with_the_same_weight() -> None:
    g = torch.Generator().manual_seed(0)
    held = Weight(torch.randn(6, 64, generator=g) * 3, torch.randn(6, 2, generator=g) - 3, TensorScheme(4, 32, 8))
    bias = torch.nn.Parameter(torch.randn(6, generator=g))
    layer, x = FakeLinear(held, bias, Rounding()), torch.randn(2, 5, 64, generator=g).requires_grad_()
    want_x = x.detach().clone().requires_grad_()
    W = held.dequantized().detach().requires_grad_()
    given_x = want_x + (quantize_activations(want_x) - want_x).detach()
    target = torch.randn(2, 5, 6, generator=g)
    (torch.nn.functional.linear(given_x, W, bias) * target).sum().backward()
    want_bias = bias.grad
    bias.grad = None
    (layer(x) * target).sum().backward()
    assert W.grad is not None
    want_u, want_log = pulled(W.grad, held.w_OI.detach(), held.log_OG.detach(), 4)
    for got, want in (
        (x.grad, want_x.grad),
        (bias.grad, want_bias),
        (held.w_OI.grad, want_u),
        (held.log_OG.grad, want_log),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_model_that_learns_computes_bit_for_bit_what_the_checkpoint_will(name: str) -> None:
    model, spec = case(name)
    tensors = nearest(model, spec, METHODS["mse"])
    floats = {n: Weight(latents(_weight(model, n), t), t.scale.log(), t.scheme) for n, t in tensors.items()}
    fixed = {n: Weight(t.q, t.scale.log(), t.scheme) for n, t in tensors.items()}
    want = quantized.apply(copy.deepcopy(model), tensors, spec)
    ids = SEEN[0].ids_BT
    with torch.no_grad():
        for weights in (floats, fixed):
            assert torch.equal(student(model, spec, weights)(ids), want(ids))


def _weight(model: Decoder, name: str) -> Tensor:
    from gori.quantize.layout import weight_of

    return weight_of(model, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["tune", "qat"])
def test_training_brings_a_model_nearer_and_leaves_integers_and_portable_scales(name: str, how: str) -> None:
    model, spec = case(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = nearest(model, spec, METHODS["mse"])
    found = trained(how, model, spec, lr=0.002, epochs=8, **({"latent_lr": 0.02} if how == "qat" else {}))
    assert min(e["kl"] for e in found.log) <= found.log[0]["kl"]
    few_bits = min(s.bits for s in spec.tensors.values()) < 4  # with more of them random weights have little to gain
    if few_bits:
        reference = Reference(model, SEEN)
        first = reference.compare(quantized.apply(copy.deepcopy(model), start, spec)).kl_mean
        assert reference.compare(settled(model, spec, found)).kl_mean < first
    for n, t in found.tensors.items():
        assert torch.equal(t.scale, portable(t.scale))
        high = 2 ** (t.scheme.bits - 1)
        assert int(t.q.min()) >= -high
        assert int(t.q.max()) < high
        assert t.scheme == spec.tensors[n]
        assert how == "qat" or torch.equal(t.q, start[n].q)
    changed = any(not torch.equal(t.q, start[n].q) for n, t in found.tensors.items())
    assert changed == (how == "qat") or not few_bits
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("how", ["tune", "qat"])
def test_what_is_returned_is_the_best_that_the_held_out_rows_saw(how: str) -> None:
    model, spec = case("tied, table apart")
    wild = trained(how, model, spec, lr=5.0)  # every step makes it worse
    start = nearest(model, spec, METHODS["mse"])
    assert min(e["kl"] for e in wild.log) == wild.log[0]["kl"]
    assert all(torch.equal(t.q, start[n].q) and torch.equal(t.scale, start[n].scale) for n, t in wild.tensors.items())
    assert all(torch.equal(v, model.get_parameter(n)) for n, v in wild.floats.items())


@pytest.mark.parametrize("how", ["tune", "qat"])
def test_the_same_seed_gives_the_same_integers_also_from_files(how: str, tmp_path: Path) -> None:
    model, spec = case("tied and shared")
    a, b, other = (trained(how, model, spec, seed=s, on_disk=d) for s, d in ((3, None), (3, tmp_path), (4, None)))
    for n, t in a.tensors.items():
        assert torch.equal(t.q, b.tensors[n].q)
        assert torch.equal(t.scale, b.tensors[n].scale)
    assert any(not torch.equal(t.scale, other.tensors[n].scale) for n, t in a.tensors.items())
    assert list(tmp_path.iterdir()) == []


def test_latents_begin_in_the_cells_of_the_integers_that_were_chosen() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(4, 32, generator=g)
    t = QuantizedTensor(
        torch.randint(-8, 8, (4, 32), generator=g).to(torch.int8), torch.full((4, 1), 0.125), TensorScheme(4, 0, 16)
    )
    u = latents(W, t, margin=0.2)
    assert torch.equal(integers(u, 4).to(torch.int8), t.q)
    assert ((u - t.q).abs() <= 0.2 + 1e-6).all()


def test_a_layout_of_several_schemes_trains_and_another_teacher_is_heard() -> None:
    model = random_decoder(LLAMA).requires_grad_(False)
    schemes = dict(layout(model, "w4a8-g32", "w8-channel").tensors)
    schemes["model.layers.0.mlp.down_proj.weight"] = TensorScheme(8, 0, 8)
    spec = mixed(model, "mixed", schemes)
    teacher = random_decoder(LLAMA, seed=7).requires_grad_(False)
    own, other = (trained("qat", model, spec, lr=0.003, latent_lr=0.02, teacher=t) for t in (None, teacher))
    assert {n: t.scheme for n, t in other.tensors.items()} == schemes
    assert other.log[-1]["kl"] > 10 * own.log[-1]["kl"]  # of a stranger it can learn little in two epochs
    nearer = Reference(teacher, SEEN)
    assert nearer.compare(settled(model, spec, other)).kl_mean < nearer.compare(settled(model, spec, own)).kl_mean


def test_two_bits_of_a_small_decoder_learn_much_of_what_rounding_lost() -> None:
    cfg = ModelConfig(
        kind="qwen3", vocab_size=200, hidden_size=64, layers=1, heads=2, kv_heads=2, head_dim=32, intermediate_size=64,
        max_position=64, init_std=0.2,
    )  # fmt: skip
    model = random_decoder(cfg).requires_grad_(False)
    spec = layout(model, "w2a16-g32", "w8-channel")
    found = qat(model, spec, SEEN, epochs=20, step_tokens=128, lr=0.01, latent_lr=0.03)
    # measured: to 0.61 on one processor, below 0.6 on others; a gradient of the wrong sign or of nothing stays at the
    # start, which is then returned
    assert min(e["kl"] for e in found.log) < 0.75 * found.log[0]["kl"]


def test_one_row_is_too_few_to_learn_from() -> None:
    model, spec = case("tied, table apart")
    one = of_examples([_example()], pad=0).batches
    with pytest.raises(GoriError, match="training needs 2 at least"):
        qat(model, spec, one)


def _example() -> object:
    from gori.data import Example

    return Example([1, 2, 3, 4], [False, False, True, True])


def test_a_tied_table_is_one_weight_used_twice() -> None:
    model, spec = case("tied and shared")
    t = nearest(model, spec, METHODS["mse"])
    fake = student(model, spec, {n: Weight(x.q, x.scale.log(), x.scheme) for n, x in t.items()})
    assert isinstance(fake.embed_tokens, FakeTable)
    assert fake.head is fake.embed_tokens
    fake(SEEN[0].ids_BT).square().mean().backward()
    grad = fake.embed_tokens.held.log_OG.grad
    assert grad is not None
    assert math.isfinite(float(grad.sum()))
    assert EMBEDDING in t
