"""The decoder against transformers, on random checkpoints of each kind, through the files of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoders import random_decoder
from gori import checkpoint
from gori.errors import GoriError
from gori.model import KVCache, ModelConfig, RopeScaling, places
from gori.norm import RMSNorm

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)


def config(kind: str, **changes: object) -> ModelConfig:
    moe = {"experts": 4, "experts_per_token": 2} if kind == "qwen3_moe" else {}
    base = ModelConfig(
        kind=kind,  # type: ignore[arg-type]
        vocab_size=97,
        hidden_size=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16 if kind.startswith("qwen3") else 8,
        intermediate_size=48,
        init_std=0.2,
        **moe,  # type: ignore[arg-type]
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


CASES = {
    "llama": config("llama"),
    "llama untied": config("llama", tied=False),
    "llama without GQA": config("llama", kv_heads=4),
    "llama 3 rope": config("llama", rope_scaling=LLAMA3, rope_theta=500000.0),
    "qwen2": config("qwen2"),
    "qwen2 untied": config("qwen2", tied=False),
    "qwen3": config("qwen3"),
    "qwen3 untied": config("qwen3", tied=False),
    "qwen3_moe": config("qwen3_moe"),
    "qwen3_moe, weights not normed": config("qwen3_moe", norm_topk=False, tied=False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_decoder_gives_the_same_logits_in_transformers(case: str, tmp_path: Path) -> None:
    model = random_decoder(CASES[case])
    checkpoint.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = theirs(ids).logits, model(ids)
    # float32 sums in another order; logits are of order 10
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_transformers_gives_the_same_logits_here(case: str, tmp_path: Path) -> None:
    body = checkpoint.config_to_hf(CASES[case])
    torch.manual_seed(3)
    cfg = transformers.AutoConfig.for_model(**body)
    theirs = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.load(tmp_path)(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [12]])
def test_logits_with_a_cache_equal_those_without(case: str, chunks: list[int]) -> None:
    model = random_decoder(CASES[case])
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.cfg, batch=2, max_len=12)
    with torch.no_grad():
        parts = [model(part, cache) for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_hidden_states_of_wanted_positions_are_those_of_all_positions(case: str) -> None:
    model = random_decoder(CASES[case])
    g = torch.Generator().manual_seed(1)
    ids, wanted = torch.randint(0, 97, (3, 12), generator=g), torch.rand(3, 12, generator=g) < 0.4
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids, wanted_BT=wanted), model.hidden(ids)[wanted], atol=1e-5, rtol=1e-5)


def test_a_full_cache_is_refused() -> None:
    model = random_decoder(CASES["llama"])
    with pytest.raises(GoriError, match="5 tokens do not fit the KV cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.long), KVCache(model.cfg, batch=1, max_len=4))


def test_sharded_and_stacked_expert_files_are_read(tmp_path: Path) -> None:
    model = random_decoder(CASES["qwen3_moe"])
    checkpoint.save(model, tmp_path)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS)
    for i, block in enumerate(model.layers):
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"model.layers.{i}.mlp.experts")}
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = block.mlp.experts.gate_up.detach()
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = block.mlp.experts.down.detach()
    names = sorted(tensors)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / shard)
    index = {"weight_map": {k: shard for shard, keys in shards.items() for k in keys}}
    (tmp_path / f"{checkpoint.WEIGHTS}.index.json").write_text(json.dumps(index))
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path)(ids), model(ids))


def test_the_balance_loss_is_one_when_every_expert_is_used_alike_and_ignores_padding() -> None:
    model = random_decoder(CASES["qwen3_moe"]).train()
    assert model.balance() is None  # nothing was routed yet
    moe, *others = model.moe_layers()
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))

    def balanced(*given: Tensor) -> tuple[Tensor, Tensor]:
        moe(*given)
        found = model.balance()
        assert found is not None
        return found

    gate = moe.gate.weight.detach().clone()
    with torch.no_grad():
        moe.gate.weight.zero_()
    assert balanced(x)[0].item() == pytest.approx(1.0)  # equal probabilities, whatever the load
    with torch.no_grad():
        moe.gate.weight.copy_(gate)
    loss, load = balanced(x)
    probs = torch.nn.functional.linear(x, gate).softmax(-1).flatten(0, 1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
    torch.testing.assert_close(load[0], chosen.mean(0) / 2)
    assert loss.item() == pytest.approx(len(gate) * float((chosen.mean(0) / 2 * probs.mean(0)).sum()), rel=1e-5)
    padded = torch.cat((x, torch.full((2, 9, 32), 7.0)), dim=1)
    valid = torch.ones(2, 59, dtype=torch.bool)
    valid[:, 50:] = False
    assert balanced(padded, places(valid))[0].item() == pytest.approx(loss.item())
    for other in others:  # the mean over layers
        other.routed_2E = torch.ones(2, len(gate)) * torch.tensor([[2.0], [1.0]])
    total = balanced(x)[0].item()
    assert total == pytest.approx((loss.item() + len(others)) / (1 + len(others)), rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])  # below, at and above what eps = 1e-6 hides
def test_a_norms_gradient_in_closed_form_is_torchs(shape: tuple[int, ...], scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    x, along = (torch.randn(shape, generator=g) * scale for _ in range(2))
    norm = RMSNorm(shape[-1], 1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.5, generator=g)
    got = torch.autograd.grad(norm(x.requires_grad_()), [x, norm.weight], along)
    x64, w64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    plain = torch.nn.functional.rms_norm(x64, shape[-1:], w64, 1e-6)
    torch.testing.assert_close(norm(x).double(), plain, atol=0, rtol=1e-5)
    for mine, theirs in zip(got, torch.autograd.grad(plain, [x64, w64], along.double()), strict=True):
        # float32 against float64: an entry is a difference of numbers as large as the gradient's largest
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


BROKEN = {
    "model_type": ("gpt2", "model_type 'gpt2'"),
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "num_key_value_heads": (3, "3 key/value heads do not divide 4"),
    "hidden_size": (64, "has shape"),
    "num_hidden_layers": (4, "lacks"),
    "rope_parameters": ({"rope_type": "yarn", "rope_theta": 1.0}, "rope_type 'yarn'"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_config_that_gori_cannot_compute_is_refused_by_name(key: str, tmp_path: Path) -> None:
    checkpoint.save(random_decoder(CASES["llama"]), tmp_path)
    value, message = BROKEN[key]
    body = json.loads((tmp_path / "config.json").read_text())
    body[key] = value
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(GoriError, match=message):
        checkpoint.load(tmp_path)


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    checkpoint.save(random_decoder(CASES["llama"]), tmp_path)
    weights = tmp_path / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(GoriError, match="not a readable safetensors file"):
        checkpoint.load(tmp_path)
