"""What a .gguf says of tokens, against the tokenizers library: llama.cpp's own tokenization of the same texts, the
types of tokens, the chat template, and which tokenizers are refused.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gori.errors import GoriError
from gori.export import gguf as target
from gori.export.gguf_vocab import PATTERNS
from gori.export.weights import Options, read_weights
from gori.runtime import gguf as runtime
from gori.runtime.session import open_session
from gori.tokenizer import PATTERN
from students import CHUNK, CONTEXT, LLAMA, Case, write_checkpoint

TEXTS = (
    "에어컨 좀 켜 줘", "조수석 창문을 반만 열어 줄래?", "실내 온도 23.5도로 맞추고 라디오 꺼 줘",
    "turn on the air conditioning", "it's 23 degrees, isn't it?", "Navigate to 221B Baker Street!",
    "서울시 강남구 12345번지", "  두 칸  띄기 ", "USB를 켜\n줘", "naïve café — “ok”", "日本語 テスト",
    "call 010-1234-5678",
)  # fmt: skip


def byte_level(pattern: str | None, **model: object) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on TEXTS; `pattern` None is GPT-2's own."""
    t = tokenizers.Tokenizer(models.BPE(**model))  # type: ignore[arg-type]
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    t.pre_tokenizer = pre_tokenizers.Sequence([*split, byte]) if split else byte
    t.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|user|>"]
    t.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return t


def pieces() -> tokenizers.Tokenizer:
    """BPE over pieces with ▁ and byte fallback, as Llama 2's: a merge for every split of a piece, in their order."""
    letters = sorted({c for text in TEXTS[:7] for c in text.replace(" ", "▁")})
    words = [
        "▁t",
        "on",
        "▁on",
        "er",
        "▁tu",
        "rn",
        "▁turn",
        "에어",
        "에어컨",
        "▁에어컨",
        "23",
        "▁켜",
        "▁줘",
        "eg",
        "▁the",
    ]
    known = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    vocab = {p: i for i, p in enumerate(known)}
    parts = [(p[:k], p[k:]) for p in words for k in range(1, len(p))]
    merges = [(a, b) for a, b in parts if a in vocab and b in vocab]
    t = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    t.add_special_tokens(["<s>", "</s>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def by_name(name: str) -> str:
    return next(p for p, n in PATTERNS.items() if n == name)


TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "qwen2": lambda: byte_level(by_name("qwen2")),
    "llama-bpe": lambda: byte_level(by_name("llama-bpe"), ignore_merges=True),
    "gpt-2": lambda: byte_level(None),
    "default": pieces,
}
"""llama.cpp's name of the pre-tokenizer → a tokenizer that it must compute."""


def write(source: Path, out: Path, eos_ids: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    """The file alone; what the writer says of its tokenizer."""
    out.mkdir()
    return target.write(read_weights(source), out, Options(source, CONTEXT, CHUNK, 1, eos_ids))["tokenizer"]


def with_tokenizer(t: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    size = t.get_vocab_size() + 3  # rows that no token has
    source = write_checkpoint(Case(dataclasses.replace(LLAMA, vocab_size=size), "w8a8-channel"), tmp_path / "c")
    t.save(str(source / "tokenizer.json"))
    return source


def llama_cpp_tokens(session: object, text: str, special: bool = False) -> list[int]:
    """llama.cpp's own tokenization of a text."""
    assert isinstance(session, runtime.GgufSession)
    lib = session._library
    lib.llama_get_model.restype, lib.llama_get_model.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    kinds = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)
    lib.llama_tokenize.argtypes = (*kinds, ctypes.c_bool, ctypes.c_bool)
    raw = text.encode()
    ids = (ctypes.c_int32 * (len(raw) + 8))()
    vocab = lib.llama_model_get_vocab(lib.llama_get_model(session._context))
    count = lib.llama_tokenize(vocab, raw, len(raw), ids, len(ids), special, special)
    return list(ids[:count])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_texts_into_the_checkpoints_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    source = with_tokenizer(tokenizer, tmp_path)
    found = write(source, tmp_path / "out")
    assert (found["pre"], found["exact"]) == (name, True)
    session = open_session(tmp_path / "out")
    for text in TEXTS:
        assert llama_cpp_tokens(session, text) == tokenizer.encode(text, add_special_tokens=False).ids, text
    # what stands before every text, and a special token in it
    marked = f"에어컨{'</s>' if name == 'default' else '<|end|>'}"
    assert llama_cpp_tokens(session, marked, special=True) == tokenizer.encode(marked).ids


def test_a_pattern_that_llama_cpp_has_not_is_said_so_and_most_texts_are_cut_alike(tmp_path: Path) -> None:
    tokenizer = byte_level(PATTERN)
    source = with_tokenizer(tokenizer, tmp_path)
    found = write(source, tmp_path / "out", eos_ids=())
    assert (found["pre"], found["exact"]) == ("gpt-2", False)
    assert "give token ids, not text" in found["note"]
    session = open_session(tmp_path / "out" / "model.gguf")
    same = [llama_cpp_tokens(session, t) == tokenizer.encode(t).ids for t in TEXTS]
    assert sum(same) >= len(TEXTS) - 2  # digits in threes and more may be cut elsewhere
    assert session.info.eos_ids == ()


def test_the_file_carries_the_template_and_the_types_of_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level(by_name("qwen2"))
    source = with_tokenizer(tokenizer, tmp_path)
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    write(source, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    end, size = tokenizer.token_to_id("<|end|>"), tokenizer.get_vocab_size()
    assert (types[end], types[end + 5], types[size:]) == (3, 1, [5, 5, 5])
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 3


def test_a_tokenizer_that_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    source = with_tokenizer(byte_level(None), tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(source / "tokenizer.json"))
    with pytest.raises(GoriError, match="is a WordLevel without byte-level pieces or byte fallback"):
        write(source, tmp_path / "out")


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, "w8a8-channel"), tmp_path / "c")
    byte_level(None).save(str(source / "tokenizer.json"))
    with pytest.raises(GoriError, match=r"a token of id \d+ and the model a table of 200 rows"):
        write(source, tmp_path / "out")
