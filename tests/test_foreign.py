"""Students that gori did not train: Hugging Face folders of three kinds, sharded, in bfloat16, with a vocabulary and a
tokenizer of their own, from `transformers` to a file that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gori import quantized
from gori.export.build import export
from gori.export.verify import verify_one
from gori.quantize.stage import quantize
from gori.runtime.session import open_session

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 32,
}  # fmt: skip
ROPE3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": ROPE3}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"head_dim": 16}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
}


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE as Llama 3 and Qwen have: theirs cannot be fetched here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"turn on the light {i}" for i in range(300)] + [f"실내 온도 {i}도로 맞춰 줘" for i in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def write_foreign(kind: str, directory: Path, *, tied: bool, vocab_size: int = 1000) -> torch.nn.Module:
    """What `save_pretrained` leaves: bfloat16 weights in several shards and an index."""
    config_class, model_class, more = KINDS[kind]
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **more, "vocab_size": vocab_size, "tie_word_embeddings": tied})
    model = model_class(config).to(torch.bfloat16).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data += torch.randn_like(p) * (0.02 if name.endswith("bias") else 0.2)
    model.save_pretrained(directory, max_shard_size="100KB")
    assert (directory / "model.safetensors.index.json").exists()
    write_tokenizer(directory, 400)
    return model


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("target", ["gguf", "litert"])
def test_a_folder_of_transformers_is_quantized_exported_and_verified(
    kind: str, tied: bool, target: str, tmp_path: Path
) -> None:
    write_foreign(kind, tmp_path / "hf", tied=tied)
    quantize(tmp_path / "hf", "w4a8-g32", None, "rtn", tmp_path / "w4")
    manifest = export(target, tmp_path / "w4", tmp_path / "out", context=48, chunk=16)
    assert manifest["metrics"]["tensors_read_back"] == 15 + (not tied)
    row = verify_one(tmp_path / "out")
    assert row.ok, row.problem
    assert row.here["answers"] == 12  # utterances in both languages, through the folder's own tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_folder_exports_as_transformers_computes_it(kind: str, tmp_path: Path) -> None:
    write_foreign(kind, tmp_path / "hf", tied=True)
    model = KINDS[kind][1].from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    export("gguf", tmp_path / "hf", tmp_path / "out", context=48, chunk=16)
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = model(ids).logits[0, -1].log_softmax(-1)
    got = torch.from_numpy(open_session(tmp_path / "out").prefill(ids[0].tolist())).log_softmax(-1)
    # bfloat16 weights are exact in float32; what remains is float32 summed in another order
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_a_vocabulary_of_164_thousand_goes_the_same_way(tmp_path: Path) -> None:
    write_foreign("qwen2", tmp_path / "hf", tied=True, vocab_size=164000)
    quantize(tmp_path / "hf", "w8a8-channel", None, "rtn", tmp_path / "w8")
    manifest = export("gguf", tmp_path / "w8", tmp_path / "out", context=32, chunk=16)
    assert manifest["metrics"]["tensors_read_back"] == 15
    assert open_session(tmp_path / "out").info.vocab_size == 164000
    assert quantized.read(tmp_path / "w8")[0].shared_head


def test_generation_settings_of_the_folder_reach_the_file(tmp_path: Path) -> None:
    write_foreign("llama", tmp_path / "hf", tied=True)
    body = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(body | {"eos_token_id": [2, 7]}))
    export("gguf", tmp_path / "hf", tmp_path / "out", context=48, chunk=16)
    info = open_session(tmp_path / "out").info
    assert (info.eos_ids, info.bos_id) == ((2, 7), 1)
