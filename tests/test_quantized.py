"""Integers and scales: nearest by brute force, exact in bfloat16 and float16, the same after a trip over the disk."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gori import checkpoint, quantized
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.quantize.rtn import METHODS, portable, round_to_nearest, rtn
from gori.quantize.schemes import ALIASES, EMBEDDINGS, SCHEMES, canonical, embedding_scheme, matching_embedding, scheme
from gori.quantize.stage import quantize
from gori.quantized import EMBEDDING, HEAD, TensorScheme, pack, pack_int4, quantize_activations, unpack, unpack_int4

CONFIG = ModelConfig(
    kind="qwen2", vocab_size=40, hidden_size=128, layers=2, heads=4, kv_heads=2, head_dim=32, intermediate_size=128,
    init_std=0.3, max_position=32,
)  # fmt: skip
IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))


def decoder(**changes: object) -> Decoder:
    return Decoder(dataclasses.replace(CONFIG, **changes)).initialise(torch.Generator().manual_seed(0)).eval()  # type: ignore[arg-type]


def weights(seed: int, out: int, width: int, log_size: float) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 10.0**log_size


@given(
    st.integers(0, 999), st.integers(1, 3), st.sampled_from([(8, 2), (8, 4), (6, 0), (12, 6)]), st.sampled_from([4, 8]),
    st.floats(-8, 5),
)  # fmt: skip
def test_every_integer_is_the_nearest_that_the_stored_scale_allows(
    seed: int, out: int, shape: tuple[int, int], bits: int, log_size: float
) -> None:
    width, group = shape
    w = weights(seed, out, width, log_size)
    t = round_to_nearest(w, TensorScheme(bits, group, 16))
    allowed = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    scale = t.scale.repeat_interleave(group or width, dim=1)
    error = (w - t.dequantize()).abs()
    best = (w.unsqueeze(-1) - allowed * scale.unsqueeze(-1)).abs().amin(-1)
    # one part in 10^6: the products are rounded to float32
    assert (error <= best * (1 + 1e-6) + w.abs().max() * 1e-7).all()
    assert torch.isin(t.q, allowed).all()


@given(st.integers(0, 999), st.sampled_from([4, 8]), st.floats(-3, 3))
def test_a_groups_largest_weight_loses_at_most_what_the_half_step_range_and_the_scales_rounding_cost(
    seed: int, bits: int, log_size: float
) -> None:
    w = weights(seed, 4, 32, log_size)
    t = round_to_nearest(w, TensorScheme(bits, 8, 16))
    half_step = t.scale.repeat_interleave(8, dim=1) / 2
    # a bfloat16 scale is off by 2^-9 of itself, which the largest integer multiplies
    slack = t.scale.repeat_interleave(8, dim=1) * 2.0 ** (bits - 1) * 2.0**-8
    assert ((w - t.dequantize()).abs() <= half_step + slack).all()


@given(st.integers(0, 999), st.sampled_from([4, 8]), st.floats(-3, 3))
def test_searched_scales_have_the_least_squared_error_of_those_tried(seed: int, bits: int, log_size: float) -> None:
    w = weights(seed, 3, 32, log_size)
    s = TensorScheme(bits, 8, 16)

    def errors(factors: tuple[float, ...]) -> Tensor:
        return (w - round_to_nearest(w, s, "w", factors).dequantize()).square().view(3, 4, 8).sum(-1)

    each = torch.stack([errors((f,)) for f in METHODS["mse"]])
    torch.testing.assert_close(errors(METHODS["mse"]), each.amin(0), atol=0, rtol=1e-6)


def test_searched_scales_lose_less_of_normal_weights_in_4_bits_and_the_method_is_recorded(tmp_path: Path) -> None:
    model = decoder()
    lost = {}
    for method in METHODS:
        tensors, spec = rtn(model, "w4a16-g32", method=method)
        assert spec.method == method
        name, t = next(iter(tensors.items()))
        w = model.get_parameter(name.removeprefix("model.")).detach()
        lost[method] = float((w - t.dequantize()).square().mean())
    assert lost["mse"] < 0.9 * lost["rtn"]  # 12 to 15 % less for groups of 32 normal weights


@given(st.floats(0, 1e6, width=32) | st.floats(0, 2.0**-10, width=32))
def test_a_portable_scale_is_exact_in_bfloat16_and_in_float16_and_near_the_one_asked_for(value: float) -> None:
    x = torch.tensor([value])
    p = portable(x)
    assert torch.equal(p.to(torch.bfloat16).float(), p)
    assert torch.equal(p.to(torch.float16).float(), p)
    inside = x.clamp(2.0**-14, 65280.0)
    assert (p - inside).abs().item() <= inside.item() * 2.0**-8
    assert 2.0**-14 <= p.item() <= 65280.0


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 999))
def test_int4_is_packed_two_a_byte_low_nibble_first(rows: int, pairs: int, seed: int) -> None:
    q = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed), q)
    low, high = int(packed[0, 0]) & 15, int(packed[0, 0]) >> 4
    assert [low - 16 * (low > 7), high - 16 * (high > 7)] == q[0, :2].tolist()


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_integers_of_any_width_are_packed_without_a_bit_to_spare(bits: int, rows: int, eights: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q = torch.randint(low, high, (rows, 8 * eights), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack(q, bits)
    assert packed.numel() * 8 == q.numel() * bits
    assert torch.equal(unpack(packed, bits), q)
    # one long number for each row, the first value in its lowest bits
    as_number = int.from_bytes(packed[0].numpy().tobytes(), "little")
    values = [(as_number >> (bits * i)) % 2**bits for i in range(8 * eights)]
    assert values == [int(v) % 2**bits for v in q[0]]


def test_int4_of_group_32_is_ggufs_q4_0_and_int8_its_q8_0() -> None:
    # Q4_0 keeps 32 values as d * (n - 8) with n in 0..15 and d in float16; Q8_0 as d * q with q in int8
    w = weights(3, 16, 64, 0.0)
    for name, low, high in (("Q4_0", -8, 7), ("Q8_0", -128, 127)):
        t = round_to_nearest(w, scheme(name))
        assert (scheme(name).group_size, t.scale.shape) == (32, (16, 2))
        assert low <= t.q.min()
        assert t.q.max() <= high
        d = t.scale.to(torch.float16).float().repeat_interleave(32, dim=1)
        assert torch.equal(d * t.q.float(), t.dequantize())


@given(st.integers(0, 999), st.floats(-4, 4), st.floats(-3, 3), st.integers(1, 40))
def test_activations_are_rounded_as_torch_rounds_them_per_token(
    seed: int, log_size: float, shift: float, n: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.ao.quantization.fx._decomposed  # registers the reference operators
    x = weights(seed, n, 9, log_size) + shift * 10**log_size
    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    q = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    want = ops.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)
    got = quantize_activations(x)
    # the reference adds the zero point before it rounds: only a value half way between two steps may take the other one
    step = scale.float().view(-1, 1)
    half_way = ((x / step).frac().abs() - 0.5).abs() < 1e-4
    off = (got - want).abs() / step
    assert (off[~half_way] < 1e-3).all()
    assert (off < 1.001).all()


def test_zero_is_exact_and_a_row_of_zeros_stays_one() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 7.1], [0.0, -2.0, -0.3], [5.0, 6.0, 0.0]])
    got = quantize_activations(x)
    assert torch.equal(got == 0, x == 0)


@pytest.mark.parametrize("name", [*SCHEMES, *ALIASES])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_under_any_scheme_is_what_is_loaded(name: str, tied: bool, tmp_path: Path) -> None:
    model = decoder(tied=tied)
    tensors, spec = rtn(model, name)
    assert spec.scheme == canonical(name) in SCHEMES
    quantized.save(model, tensors, spec, tmp_path)
    back_spec, back, _ = quantized.read(tmp_path)
    assert back_spec == spec
    for key, t in tensors.items():
        assert torch.equal(back[key].q, t.q), key
        assert torch.equal(back[key].scale, t.scale), key
    loaded = quantized.load(tmp_path)
    with torch.no_grad():
        got, here = loaded(IDS), quantized.apply(decoder(tied=tied), tensors, spec)(IDS)
        assert torch.equal(got, here)
        if scheme(name).activation_bits == 16:  # then a float decoder with the dequantized weights is the same network
            plain = decoder(tied=False)
            state = plain.state_dict() | {k.removeprefix("model."): t.dequantize() for k, t in tensors.items()}
            if spec.shared_head:
                state["lm_head.weight"] = tensors[EMBEDDING].dequantize()
            plain.load_state_dict(state)
            torch.testing.assert_close(got, plain(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_tied_head_shares_the_embeddings_integers_only_where_bits_and_groups_agree(embedding: str) -> None:
    tensors, spec = rtn(decoder(), "w4a8-g32", embedding)
    e = embedding_scheme(embedding)
    assert (EMBEDDING in tensors) == (e is not None)
    assert spec.shared_head == (embedding == "w4-g32") == (HEAD not in tensors)
    assert spec.head_activation_bits == (8 if spec.shared_head else 16)
    if not spec.shared_head:
        assert tensors[HEAD].scheme == SCHEMES["w4a8-g32"]
    assert (EMBEDDING in spec.float_tensors) == (e is None)
    model = quantized.apply(decoder(), tensors, spec)
    assert model.cfg.tied == spec.shared_head
    with torch.no_grad():
        assert torch.isfinite(model(IDS)).all()


def test_every_linear_is_quantized_and_what_stayed_float_is_named() -> None:
    model = decoder()
    tensors, spec = rtn(model, "w8a8-channel")
    assert len(tensors) == 2 * 7 + 1
    named = {checkpoint.to_hf_name(n) for n, _ in model.named_parameters()}
    assert set(tensors) | {checkpoint.to_hf_name(n) for n in spec.float_tensors} == named


@pytest.mark.parametrize("name", SCHEMES)
def test_a_schemes_name_says_what_it_holds(name: str) -> None:
    s = scheme(name)
    granularity = f"g{s.group_size}" if s.group_size else "channel"
    assert name == f"w{s.bits}a{s.activation_bits}-{granularity}"
    assert matching_embedding(name) == f"w{s.bits}-{granularity}"


def test_a_group_that_does_not_divide_is_refused_with_the_divisors() -> None:
    with pytest.raises(GoriError) as caught:
        round_to_nearest(torch.zeros(2, 100), TensorScheme(4, 32, 16), "layers.3.mlp.down_proj")
    assert str(caught.value) == (
        "group size 32 does not divide in_features 100 of layers.3.mlp.down_proj: its divisors are "
        "1, 2, 4, 5, 10, 20, 25, 50, 100; choose such a width or a scheme ending in -channel"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    w = torch.zeros(2, 4)
    w[1, 2] = bad
    with pytest.raises(GoriError, match="holds NaN or infinity"):
        round_to_nearest(w, TensorScheme(8, 0, 16), "w")


def test_an_odd_width_has_no_int4() -> None:
    with pytest.raises(GoriError, match="in_features 5 of w is odd"):
        round_to_nearest(torch.zeros(2, 5), TensorScheme(4, 0, 16), "w")


@pytest.mark.parametrize(
    ("call", "name", "near"),
    [(scheme, "w4a8-g23", "w4a8-g32"), (scheme, "q4_0", "Q4_0"), (embedding_scheme, "w4-g31", "w4-g32")],
)
def test_an_unknown_scheme_is_refused_with_the_nearest(call: object, name: str, near: str) -> None:
    with pytest.raises(GoriError, match=f"{name!r} is unknown: did you mean '{near}'"):
        call(name)  # type: ignore[operator]


def test_a_mixture_of_experts_and_a_quantized_folder_are_refused(tmp_path: Path) -> None:
    moe = decoder(kind="qwen3_moe", experts=2, experts_per_token=1)
    with pytest.raises(GoriError, match="distill a dense student"):
        rtn(moe, "w8a8-channel")
    model = decoder()
    (tmp_path / "q").mkdir()
    quantized.save(model, *rtn(model, "w8a8-channel"), tmp_path / "q")
    with pytest.raises(GoriError, match="is quantized already"):
        quantize(tmp_path / "q", "w4a8-g32", None, "rtn", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_folder_with_a_tensor_or_a_field_amiss_is_refused(tmp_path: Path) -> None:
    model = decoder()
    quantized.save(model, *rtn(model, "w4a8-g32"), tmp_path)
    body = json.loads((tmp_path / quantized.SCHEMA).read_text())
    bad = {
        "lacks the tensor model.x.q": {"tensors": {**body["tensors"], "model.x": body["tensors"][EMBEDDING]}},
        "does not have the fields": {"tensors": []},
        r"scale has shape \[40, 4\], expected \[40, 2\]": {
            "tensors": {**body["tensors"], EMBEDDING: {**body["tensors"][EMBEDDING], "group_size": 64}}
        },
    }  # fmt: skip
    for message, change in bad.items():
        (tmp_path / quantized.SCHEMA).write_text(json.dumps({**body, **change}))
        with pytest.raises(GoriError, match=message):
            quantized.read(tmp_path)
    (tmp_path / quantized.SCHEMA).write_text("[]")
    with pytest.raises(GoriError, match="expected an object"):
        quantized.read(tmp_path)


def test_the_bytes_that_are_counted_are_those_in_the_file(tmp_path: Path) -> None:
    model = decoder()
    tensors, spec = rtn(model, "w4a8-g32")
    quantized.save(model, tensors, spec, tmp_path)
    stored = checkpoint.read_tensors(tmp_path)
    for name, t in tensors.items():
        q, scale = stored[f"{name}.q"], stored[f"{name}.scale"]
        assert t.packed_bytes() == q.numel() * q.element_size() + scale.numel() * scale.element_size()
