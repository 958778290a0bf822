"""Folders of tiny random models of transformers' own classes, sharded, with a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

TEXTS = (
    "turn the heat up to 21 degrees and play some music",
    "서울역까지 가는 길을 알려 줘",
    '{"name": "set_temp", "arguments": {"zone": "driver"}}',
)
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16384, "initializer_range": 0.2, "eos_token_id": 1,
    "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda v: Qwen3MoeConfig(**SMALL, **MOE, vocab_size=v, moe_intermediate_size=32, head_dim=16),
    "mixtral": lambda v: MixtralConfig(**SMALL, vocab_size=v, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda v: OlmoeConfig(**SMALL, **MOE, vocab_size=v),
    "deepseek_v3": lambda v: DeepseekV3Config(
        **SMALL, vocab_size=v, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16,
    ),
}  # fmt: skip


def foreign_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def write_foreign(folder: Path, kind: str, vocab_size: int = 320, shard: str = "20KB", seed: int = 0) -> Path:
    """A random model of `kind`; weights in float32, in shards."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](vocab_size))
    model.save_pretrained(folder, max_shard_size=shard)
    foreign_tokenizer().save_pretrained(folder)
    return folder
