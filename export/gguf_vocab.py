"""A checkpoint folder's tokenizer in the terms of llama.cpp: pieces, merges, token types and a named pre-tokenizer.

llama.cpp splits a text before its merges by one of a fixed list of patterns that a file can only name. Where a
tokenizer's own pattern is not among them the vocabulary is carried all the same, and `exact` is false: such a file must
be given token ids. No torch and no tokenizers library: tokenizer.json is read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gori.artifact import read_object
from gori.errors import GoriError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""
BYTE_LEVEL, PIECES = "gpt2", "llama"
"""What llama.cpp calls byte-level BPE and BPE of pieces with ▁ and byte fallback."""
_CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    _CASES + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
    _CASES + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
}
"""A `Split` of tokenizer.json → llama.cpp's name of that pattern (src/llama-vocab.cpp)."""
GPT2, DIGITS = "gpt-2", "smollm"
NEAREST = GPT2
"""For a pattern that llama.cpp has not: of those it has, the one that gives gori's own vocabulary the fewest other
tokens (docs/gguf.md)."""
WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Pre-tokenizers for which llama.cpp takes a word that is a token without applying merges (`ignore_merges`)."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of tokens; ids are positions."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """For PIECES: llama.cpp joins the pair whose piece has the highest."""
    begin: int | None = None
    """The token that the tokenizer puts before every text."""
    end: int | None = None
    """The token that it puts behind."""
    unknown: int | None = None
    add_space: bool = False
    """Whether a text gets a space before its first piece."""
    exact: bool = True
    note: str = ""
    """What a user must know of texts."""


def vocabulary(source: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint folder whose table has `size` rows.

    Raises GoriError for a kind of tokenizer that llama.cpp's two BPEs do not compute, and for one with more tokens
    than rows.
    """
    path = source / "tokenizer.json"
    if not path.exists():
        placeholders = [f"<{i}>" for i in range(size)]
        note = "the checkpoint has no tokenizer.json: token ids in and out, no text"
        return Vocabulary(BYTE_LEVEL, NEAREST, placeholders, [NORMAL] * size, exact=False, note=note)
    body = read_object(path)
    try:
        return _convert(body, size, path)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise GoriError(f"{path} is not a tokenizer of the tokenizers library ({e!r}): save it again") from e


def _convert(body: dict[str, Any], size: int, path: Path) -> Vocabulary:
    model, steps = body["model"], _steps(body.get("pre_tokenizer"), "pretokenizers")
    kinds = {s["type"] for s in steps}
    if model["type"] != "BPE" or not (model.get("byte_fallback") or "ByteLevel" in kinds):
        raise GoriError(
            f"{path} is a {model['type']} without byte-level pieces or byte fallback, which llama.cpp computes neither "
            "of: retrain the student with gori's tokenizer, or export a copy of the folder without tokenizer.json, "
            "which then takes token ids only"
        )
    tokens, types = _tokens(body, size, path)
    begin, end = _added_around(body.get("post_processor"))
    unknown = model["vocab"].get(model.get("unk_token"))
    if "ByteLevel" not in kinds:
        return _pieces(body, tokens, types, begin, end, unknown)
    pre, why = _pre_tokenizer(steps, bool(model.get("ignore_merges")))
    normal, plain = _normalizer(body.get("normalizer"))
    notes = [*([why] if why else []), *([normal] if normal else [])]
    return Vocabulary(
        BYTE_LEVEL, pre, tokens, types, [_merge(m) for m in model["merges"]], begin=begin, end=end, unknown=unknown,
        exact=not why and plain, note="; ".join(notes),
    )  # fmt: skip


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pre-tokenizer, normalizer or post-processor as a flat list."""
    if step is None:
        return []
    return [s for part in step[inner] for s in _steps(part, inner)] if step["type"] == "Sequence" else [step]


def _tokens(body: dict[str, Any], size: int, path: Path) -> tuple[list[str], list[int]]:
    """Every row's text and type; rows without a token get a name of their own."""
    model = body["model"]
    texts = {int(i): t for t, i in model["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    if model.get("byte_fallback"):
        types |= {i: BYTE for i, t in texts.items() if len(t) == 6 and t.startswith("<0x") and t.endswith(">")}
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        types[unknown] = UNKNOWN
    for t in body.get("added_tokens") or []:
        texts[t["id"]] = t["content"]
        if types.get(t["id"]) != UNKNOWN:
            types[t["id"]] = CONTROL if t["special"] else USER_DEFINED
    if texts and max(texts) >= size:
        raise GoriError(
            f"{path} has a token of id {max(texts)} and the model a table of {size} rows: they are not of one "
            "checkpoint; copy the tokenizer that the model was trained with"
        )
    taken = set(texts.values())
    names = [texts.get(i, f"<unused {i}>") for i in range(size)]
    if any(i not in texts and n in taken for i, n in enumerate(names)):
        raise GoriError(f"{path} has a token named like an unused row, <unused …>: rename it")
    return names, [types.get(i, UNUSED) for i in range(size)]


def _merge(merge: str | list[str]) -> str:
    """`left right`; the library has written both forms, and a byte-level piece has no space in it."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _added_around(processor: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """The tokens that a post-processor puts before and behind a text."""
    for step in _steps(processor, "processors"):
        if step["type"] == "TemplateProcessing":
            ids = step["special_tokens"]
            parts = [p["SpecialToken"]["id"] if "SpecialToken" in p else "" for p in step["single"]]
            begin, end = parts[0], parts[-1] if len(parts) > 1 else ""
            return (ids[begin]["ids"][0] if begin else None), (ids[end]["ids"][0] if end else None)
    return None, None


def _pre_tokenizer(steps: list[dict[str, Any]], whole_words: bool) -> tuple[str, str]:
    """llama.cpp's name for the steps before byte-level BPE, and why it is only the nearest; empty if it is the same."""
    name = _named(steps)
    if name is None:
        pattern = next((s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split"), "")
        said = f"the pattern {pattern!r}" if pattern else ", ".join(s["type"] for s in steps)
        return NEAREST, f"llama.cpp has no pre-tokenizer like {said}; named {NEAREST}: give token ids, not text"
    if whole_words != (name in WHOLE_WORDS_FIRST):
        return name, f"ignore_merges is {whole_words}, llama.cpp's {name} has it otherwise: give token ids, not text"
    return name, ""


def _named(steps: list[dict[str, Any]]) -> str | None:
    last = steps[-1]
    own_pattern = last.get("use_regex", True)
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and own_pattern:
        return GPT2
    if len(steps) != 2:
        return None
    before = steps[0]
    if before["type"] == "Digits" and before.get("individual_digits") and own_pattern:
        return DIGITS
    if before["type"] == "Split" and before["behavior"] == "Isolated" and not before["invert"] and not own_pattern:
        return PATTERNS.get(before["pattern"].get("Regex", ""))
    return None


def _normalizer(normalizer: dict[str, Any] | None) -> tuple[str, bool]:
    """What must be done to a text before llama.cpp sees it, in words, and whether that is nothing but NFC."""
    kinds = [s["type"] for s in _steps(normalizer, "normalizers")]
    if not kinds:
        return "", True
    if kinds == ["NFC"]:
        return "llama.cpp does not normalize: give text in NFC", True
    return f"llama.cpp does not normalize as {', '.join(kinds)}: give token ids, not text", False


def _pieces(
    body: dict[str, Any],
    tokens: list[str],
    types: list[int],
    begin: int | None,
    end: int | None,
    unknown: int | None,
) -> Vocabulary:
    """BPE with byte fallback over pieces in which ▁ is a space (Llama 2). llama.cpp joins by the score of what comes
    out; here that is the rank of the merge that first gives it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(body["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    added = {t["content"] for t in body.get("added_tokens") or []}
    add_space = any(
        s["type"] == "Prepend" or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never")
        for s in [*_steps(body.get("normalizer"), "normalizers"), *_steps(body.get("pre_tokenizer"), "pretokenizers")]
    )
    return Vocabulary(
        PIECES, "default", [t.replace("▁", " ") if t in added else t for t in tokens], types,
        scores=[-float(ranks.get(t, len(ranks))) for t in tokens], begin=begin, end=end, unknown=unknown,
        add_space=add_space,
    )  # fmt: skip
