"""runner.bin: what the C++ runner needs of an artifact besides the program, ready to be mapped.

The tokenizer (normalizer, pattern, merges), what stands around an utterance, and the grammar of calls, as named arrays
(gori/tables.py). A tokenizer that the runner would not read as Hugging Face's library does is refused here, with the
reason.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import normalizers

from gori import tables
from gori.artifact import read_object
from gori.calls import ASSISTANT, SYSTEM, USER, read_tools
from gori.errors import GoriError
from gori.export.pattern import compile_pattern
from gori.export.template import affixes, read_template
from gori.grammar import FILE, compile_grammar, speaks_calls
from gori.tokenizer import BYTE_OF, Tokenizer, eos_ids

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel cuts with by itself."""
HANGUL = range(0xAC00, 0xD7A4)
"""Composed and decomposed by arithmetic (Unicode 15.0, section 3.12), not by a table."""
LAST_APART = 0x30000
"""Past every character that decomposes or combines."""
NONE = 0xFFFFFFFF


def write(source: Path, directory: Path, system: str = "") -> str:
    """Write runner.bin for the tokenizer and tools of a checkpoint; why not, where the C++ runner cannot read them."""
    try:
        arrays = text_arrays(source) | prompt_arrays(source, system)
    except GoriError as e:
        return f"no {FILE}, so the C++ runner does not open this artifact: {e}"
    tools, tokenizer = source / "tools.json", Tokenizer.load(source)
    if tools.exists() and speaks_calls(functions := read_tools(tools), tokenizer):
        arrays |= compile_grammar(functions, tokenizer, eos_ids(source)).arrays
    else:
        arrays["marks"] = np.array([NONE, tokenizer.vocab_size, *eos_ids(source)], np.uint32)
    (directory / FILE).write_bytes(tables.dump(arrays))
    return ""


def prompt_arrays(source: Path, system: str) -> dict[str, NDArray[Any]]:
    """Tokens before and after an utterance, and what stands before its text."""
    tokenizer = Tokenizer.load(source)
    if tokenizer.has(USER):
        said = [tokenizer.id(SYSTEM), *tokenizer.encode(f" {system}")] if system else []
        before, lead, after = [*said, tokenizer.id(USER)], " ", [tokenizer.id(ASSISTANT)]
    else:
        template = read_template(source)
        if not template:
            raise GoriError(f"{source} has no chat template: nothing says what stands around an utterance")
        (opening, closing), (answer, _) = affixes(template, source)
        before, lead, after = tokenizer.encode_markup(opening), "", tokenizer.encode_markup(closing + answer)
    return {
        "prompt_before": np.array(before, np.uint32),
        "prompt_lead": np.frombuffer(lead.encode(), np.uint8),
        "prompt_after": np.array(after, np.uint32),
    }


def text_arrays(source: Path) -> dict[str, NDArray[Any]]:
    """The tokenizer as arrays; GoriError for one that is not byte-level BPE as the runner does it."""
    body = read_object(source / "tokenizer.json")
    tokenizer = Tokenizer.load(source)
    pattern = compile_pattern(pre_token_pattern(body.get("pre_tokenizer")))
    rows: list[int] = [len(pattern.alternatives)]
    for elements in pattern.alternatives:
        rows.append(len(elements))
        for bits, least, most, kind in elements:
            rows += [bits & NONE, bits >> 32, least, most, kind]
    nfc = _nfc(body.get("normalizer"))
    return {
        "pattern": np.array(rows, np.uint32),
        "block_of": pattern.block_of,
        "kind_of": pattern.kind_of,
        **(unicode_arrays() if nfc else {}),
        **merge_arrays(body, tokenizer),
        **tables.strings(tokenizer.pieces, "pieces"),
    }


def _nfc(normalizer: Mapping[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    if normalizer.get("type") == "Sequence" and len(normalizer.get("normalizers", ())) == 1:
        normalizer = normalizer["normalizers"][0]
    if normalizer != {"type": "NFC"}:
        raise GoriError(f"the tokenizer's normalizer is {json.dumps(normalizer)}, the runner knows NFC and none")
    return True


def pre_token_pattern(pre: Mapping[str, Any] | None) -> str:
    """The pattern that cuts a text before the merges."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    *splits, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(splits) > 1:
        raise GoriError(f"the tokenizer's pre-tokenizer is {json.dumps(pre)}, the runner knows one Split and ByteLevel")
    if not splits:
        if not last.get("use_regex", True):
            raise GoriError("the tokenizer cuts no pre-tokens, the runner wants a pattern")
        return GPT2
    split = splits[0]
    regex = split.get("pattern", {}).get("Regex")
    if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert") or regex is None:
        raise GoriError(f"the tokenizer splits by {json.dumps(split)}, the runner knows an isolated Regex")
    if last.get("use_regex", True):
        raise GoriError("the tokenizer cuts by two patterns, the runner by one")
    return regex


def merge_arrays(body: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, NDArray[Any]]:
    """First tokens of bytes, and the merges as a table sorted by pair: left << 32 | right → rank and token."""
    model = body["model"]
    odd = [k for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    plain = [t["content"] for t in body.get("added_tokens", []) if not t.get("special")]
    if model.get("type") != "BPE" or odd or model.get("byte_fallback") or plain:
        raise GoriError(
            f"the tokenizer is a {model.get('type')} with {', '.join(odd + plain[:3]) or 'byte fallback'}: "
            "the runner knows byte-level BPE with special tokens alone"
        )
    vocab: dict[str, int] = model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    pairs = np.array([vocab[a] << 32 | vocab[b] for a, b in merges], np.uint64)
    order = np.argsort(pairs, kind="stable")
    missing = [hex(b) for c, b in BYTE_OF.items() if c not in vocab]
    if missing:
        raise GoriError(f"the tokenizer has no token for the byte {missing[0]}: not every text has tokens")
    first = {b: vocab[c] for c, b in BYTE_OF.items()}
    return {
        "byte_token": np.array([first[b] for b in range(256)], np.uint32),
        "merge_pair": pairs[order],
        "merge_rank": order.astype(np.uint32),
        "merge_to": np.array([vocab[a + b] for a, b in merges], np.uint32)[order],
        "whole_words": np.array([bool(model.get("ignore_merges"))], np.uint8),
    }


@cache
def unicode_arrays() -> dict[str, NDArray[Any]]:
    """Canonical decompositions, combining classes and compositions, as far as the tokenizers library knows them: its
    tables are of another Unicode version than Python's."""
    asked = (*range(0x0A), *range(0x0B, 0x3400), *range(0xA000, 0xD800), *range(0xE000, LAST_APART))
    points = [c for c in asked if c not in HANGUL]
    nfd = normalizers.NFD()
    apart = nfd.normalize_str("\n".join(map(chr, points))).split("\n")
    changed = {c: d for c, d in zip(points, apart, strict=True) if d != chr(c)}
    # U+0334 is of class 1, so it moves before every mark of a higher one
    marks = {c: m for c in points if (m := unicodedata.combining(chr(c)))}
    moved = nfd.normalize_str("\n".join(f"a{chr(c)}\u0334" for c in marks)).split("\n")
    combining = {c: m for (c, m), text in zip(marks.items(), moved, strict=True) if m == 1 or text[1] == "\u0334"}
    composed = {}
    for c in changed:
        parts = unicodedata.decomposition(chr(c)).split()
        if len(parts) == 2 and normalizers.NFC().normalize_str(changed[c]) == chr(c):
            composed[int(parts[0], 16) << 32 | int(parts[1], 16)] = c
    keys = sorted(composed)
    return {
        "apart": np.array(list(changed), np.uint32),
        "apart_at": np.cumsum([0, *map(len, changed.values())]).astype(np.uint32),
        "apart_to": np.array([ord(x) for d in changed.values() for x in d], np.uint32),
        "marks_of": np.array(list(combining), np.uint32),
        "mark_class": np.array(list(combining.values()), np.uint8),
        "pair": np.array(keys, np.uint64),
        "pair_to": np.array([composed[k] for k in keys], np.uint32),
    }
