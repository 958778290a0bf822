"""A small random teacher of the toy task, and its cache."""

from __future__ import annotations

from pathlib import Path

from decoders import random_decoder
from gori import checkpoint
from gori.corpus import Corpus
from gori.model import ModelConfig
from gori.recipe import Cache, Distill
from gori.teacher.cache import cache_teacher
from gori.tokenizer import copy_files

SHAPE = ModelConfig(
    kind="qwen3_moe", vocab_size=360, hidden_size=32, layers=2, heads=2, kv_heads=2, head_dim=16, intermediate_size=32,
    experts=4, experts_per_token=2, max_position=256, init_std=0.3,
)  # fmt: skip
SEED = 5


def write_teacher(out: Path, tokenizer: Path, seed: int = 0) -> Path:
    out.mkdir(parents=True)
    checkpoint.save(random_decoder(SHAPE, seed), out)
    copy_files(tokenizer, out)
    return out


def make_cache(
    teacher: Path, corpus: Corpus, tokenizer: Path, out: Path, tokenizers: str | None = None, **section: object
) -> Path:
    body = {"shard_rows": 8, "epochs": 2, **section}
    distill = Distill.model_validate({"init": "random", "tokenizers": tokenizers, "train": {"swap_values": 0.5}})
    cache_teacher(Cache.model_validate(body), distill, 256, teacher, corpus, tokenizer, SEED, out)
    return out
