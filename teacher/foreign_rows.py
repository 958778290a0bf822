"""A conversation in an imported teacher's own chat template, as token ids, with the place of each assistant's turn.

Knows nothing of students: what of a turn can be carried over to their tokens is gori.teacher.align's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gori.calls import Function
from gori.data import Conversation, as_messages
from gori.errors import GoriError, one_line
from gori.tokenizer import BYTE_OF


@dataclass(frozen=True)
class Said:
    """An assistant's turn as the template writes it: its bytes, and its tokens' places in the row."""

    text: bytes
    first: int
    """The row's token with which it begins."""
    at: list[int]
    """Byte of `text` at which each of its tokens begins, and where the last one ends; empty where its tokens are not
    exactly its bytes (a tokenizer that normalizes, or a token that reaches over its beginning)."""


def definitions(functions: Mapping[str, Function]) -> list[dict[str, Any]]:
    """Functions as the definitions that chat templates take."""
    return [
        {
            "type": "function",
            "function": {
                "name": f.name,
                "description": f.description,
                "parameters": {"type": "object", "properties": dict(f.properties), "required": list(f.required)},
            },
        }
        for f in functions.values()
    ]


def messages(c: Conversation) -> list[dict[str, Any]]:
    """As a template takes them: a turn of calls has empty content besides, which some templates read."""
    return [{"content": "", **m} for m in as_messages(c)]


def rendered(tokenizer: Any, turns: Sequence[dict[str, Any]], tools: Any, *, ask: bool = False) -> str:
    """A conversation's text; `ask`: with what opens the assistant's next turn."""
    if not tokenizer.chat_template:
        raise GoriError("the teacher's tokenizer has no chat template: put its chat_template.jinja into its folder")
    try:
        text = tokenizer.apply_chat_template(
            list(turns), tools=tools or None, tokenize=False, add_generation_prompt=ask
        )
    except Exception as e:  # Jinja's errors, and any that a template raises
        raise GoriError(f"the teacher's chat template refuses a row: {one_line(e)}") from e
    assert isinstance(text, str)
    return text


def spoken_by(tokenizer: Any, c: Conversation, tools: Any, bytes_of: Sequence[bytes]) -> tuple[list[int], list[Said]]:
    """The row's token ids and its assistant's turns, found by the prefix method: what the template writes of the turns
    before, ready for an answer, begins what it writes of one turn more."""
    turns = messages(c)
    whole = rendered(tokenizer, turns, tools)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    starts = [a for a, _ in encoded["offset_mapping"]]
    found = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = rendered(tokenizer, turns[:i], tools, ask=True), rendered(tokenizer, turns[: i + 1], tools)
        if not (after.startswith(before) and whole.startswith(after)):
            raise GoriError(
                f"the teacher's chat template does not write an answer after what opens it ({before[-40:]!r}): its "
                "answers cannot be found; use distill.tokenizers=sequence"
            )
        found.append(_said(after[len(before) :].encode(), ids, starts, len(before), bytes_of))
    return ids, found


def _said(text: bytes, ids: Sequence[int], starts: Sequence[int], begin: int, bytes_of: Sequence[bytes]) -> Said:
    first = next((n for n, a in enumerate(starts) if a >= begin), len(ids))
    at = [0]
    while at[-1] < len(text) and first + len(at) <= len(ids):
        at.append(at[-1] + len(bytes_of[ids[first + len(at) - 1]]))
    tokens = b"".join(bytes_of[i] for i in ids[first : first + len(at) - 1])
    return Said(text, first, at if tokens == text else [])


def token_bytes(tokenizer: Any) -> tuple[list[bytes], dict[int, str]]:
    """The bytes that each token stands for (a special token: its name), and the special ones' names by id.

    Byte-level vocabularies (GPT-2's alphabet) and those of SentencePiece (`▁` for a space, `<0x0A>` for a byte)."""
    if not tokenizer.is_fast:
        raise GoriError(f"{type(tokenizer).__name__} is no fast tokenizer: put its tokenizer.json into its folder")
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    out = []
    for i, token in enumerate(tokens):
        if i in special or token is None:
            out.append(special.get(i, "").encode())
        elif byte_level:
            out.append(bytes(BYTE_OF[c] for c in token))
        elif len(token) == 6 and token.startswith("<0x"):
            out.append(bytes([int(token[3:5], 16)]))
        else:
            out.append(token.replace("▁", " ").encode())
    return out, special


def template_of(directory: Path) -> str:
    """An imported teacher's chat template; empty where it has none."""
    path = directory / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else ""
