"""Functions with every kind of argument, and a tokenizer trained on them, for the tests of the grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gori import tokenizer
from gori.calls import Function, read_tools
from gori.grammar import COPIED, compile_grammar
from gori.runtime.constrain import Vocabulary
from gori.tokenizer import Tokenizer, eos_ids


def string(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def many(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


KINDS: dict[str, dict[str, Any]] = {
    "enum": string(enum=["driver", "driver side", "앞좌석", "뒷좌석 왼쪽", "d"]),
    "few": {"type": "integer", "minimum": -3, "maximum": 12},
    "level": {"type": "integer", "enum": [1, 2, 30]},
    "degrees": {"type": "number", "minimum": 16, "maximum": 30},
    "fine": {"type": "number", "exclusiveMinimum": -0.5, "maximum": 0.75},
    "open_number": {"type": "number"},
    "count": {"type": "integer"},
    "large": {"type": "integer", "minimum": -20, "maximum": 123456},
    "below": {"type": "integer", "exclusiveMaximum": -7},
    "on": {"type": "boolean"},
    "text": string(),
    "time": string(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$"),
    "plate": string(pattern=r"^\d{2,3}[가-힣] ?\d{4}$"),
    "copied": string(**{COPIED: True}),
    "copies": many(string(**{COPIED: True})),
    "texts": many(string()),
    "numbers": many({"type": "number", "maximum": 5}),
    "zones": many(string(enum=["front", "rear", "앞"])),
    "object": {"type": "object"},
    "objects": many({"type": "object"}),
}
FUNCTIONS: dict[str, tuple[list[str], list[str]]] = {
    "all": (list(KINDS), []),
    "nothing": ([], []),
    "strict": (["enum", "few", "degrees", "fine", "on", "text"], ["enum", "few", "degrees", "on", "text"]),
    "copying": (["copied", "copies", "count"], ["copied", "copies"]),
    "formed": (["plate", "time"], ["time"]),
    "structures": (["object", "objects", "numbers", "zones", "texts"], ["objects", "zones"]),
    "ranges": (["large", "below", "open_number", "level", "count"], ["large", "below"]),
}
"""Name → arguments, those of them that are required."""
SAID = (
    "",
    " ",
    "서울역  앞으로\u3000가자 \t",
    "call Kim-Lee at 010 1234",
    "<|call:all|>",
    "가<|나",
    "é\u0301 😀",
    "\x00 a",
    "d" * 300,
)


def tools() -> list[dict[str, Any]]:
    return [
        {"name": n, "parameters": {"type": "object", "properties": {k: KINDS[k] for k in keys}, "required": required}}
        for n, (keys, required) in FUNCTIONS.items()
    ]


def write(directory: Path) -> dict[str, Function]:
    """tools.json and a tokenizer of them; the functions."""
    (directory / "tools.json").write_text(json.dumps(tools(), ensure_ascii=False), encoding="utf-8")
    functions = read_tools(directory / "tools.json")
    words = " driver side 앞좌석 뒷좌석 왼쪽 front rear true false 서울역 앞으로 가자 16 22.5 30 Kim-Lee 가 나 é"
    tokenizer.train([words, ' {"a": [1, null]}'] * 20, functions, 460).save(directory)
    return functions


def vocabulary(directory: Path) -> Vocabulary:
    trained = Tokenizer.load(directory)
    grammar = compile_grammar(read_tools(directory / "tools.json"), trained, eos_ids(directory))
    return Vocabulary(grammar, trained.pieces)
