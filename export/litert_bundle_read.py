"""Takes a written .litertlm apart and compares every part with the files beside it.

It reads the bundle alone, by bytes: the sections by its header, the metadata by protobuf's wire format, whose field
numbers are those of LiteRT-LM's llm_metadata.proto. A bundle that carries anything besides what gori writes is refused.
No torch, and none of the builder's code.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from gori.artifact import read_object
from gori.errors import GoriError
from gori.export.template import affixes, read_template
from gori.runtime.flatbuffer import FormatError, mapped, metadata, root

BUNDLE, MAGIC, HEADER_AT = "model.litertlm", b"LITERTLM", 32
MODEL, FACTS, TOKENIZER = 3, 5, 6
SECTIONS = {MODEL: "model", FACTS: "metadata", TOKENIZER: "tokenizer"}
"""LiteRT-LM's numbers of the sections that gori writes, each once."""
STOP_TOKENS, PROMPTS, CONTEXT, KIND, JINJA = 2, 3, 5, 6, 7
"""Fields of LlmMetadata."""
GENERIC = b"\x0a\x00"
"""LlmModelType: a generic model, without settings."""
SIZE_BYTES = 8
"""Before the compressed tokenizer: its length as it is."""
DAMAGE = (ValueError, TypeError, OverflowError, MemoryError, RecursionError, zlib.error)
"""What damaged bytes end in, in the parser, in NumPy, UTF-8, JSON or zlib."""
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Files that a bundle is compared with: they travel beside it."""
PLAIN_CONTENT = """\
{%- set plain = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- if m.content is defined and m.content is sequence and m.content is not string -%}
{%- set plain.messages = plain.messages + [dict(m, content=m.content | map(attribute='text') | join(''))] -%}
{%- else -%}
{%- set plain.messages = plain.messages + [m] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""
"""Put before a template: LiteRT-LM hands a message's content over as a list of parts, templates expect text."""


def check_bundle(bundle: Path, model: memoryview) -> None:
    """GoriError unless a bundle holds this .tflite, and the tokenizer, stop tokens and template of its directory."""
    directory = bundle.parent
    try:
        found = sections(bundle)
        wrong = _differing(found, model, directory)
    except (OSError, *DAMAGE) as e:
        raise GoriError(f"{bundle} is not a .litertlm of gori's that can be read ({e}): export it again") from e
    if wrong:
        raise GoriError(f"{bundle} holds another {wrong}: export it again")


def _differing(found: dict[int, memoryview], model: memoryview, directory: Path) -> str:
    """What of a bundle is another's, and whose it should be; empty if nothing is."""
    if not same_bytes(found[MODEL], model):
        return "model than model.tflite beside it"
    text = directory / "tokenizer.json"
    if not text.exists() or not is_packed(found[TOKENIZER], text.read_bytes()):
        return "tokenizer than tokenizer.json beside it"
    facts = fields(bytes(found[FACTS]))
    stops, wanted = stop_ids(facts.pop(STOP_TOKENS, [])), end_ids(directory)
    if stops != wanted:
        return f"set of stop tokens ({stops}) than generation_config.json beside it ({wanted})"
    context = json.loads(metadata(root(model), "gori") or b"{}").get("context")
    if facts.pop(CONTEXT, None) != [context]:
        return f"context than the {context} of model.tflite beside it"
    template = read_template(directory)
    if facts.pop(JINJA, [b""]) != [(PLAIN_CONTENT + template if template else "").encode()]:
        return "chat template than chat_template.jinja or tokenizer_config.json beside it"
    if turns(facts.pop(PROMPTS, [b""])) != (list(affixes(PLAIN_CONTENT + template, directory)) if template else []):
        return "text around a turn than its template writes"
    if facts != {KIND: [GENERIC]}:
        return f"metadata than gori writes (fields {sorted(facts)}, expected {KIND} alone)"
    return ""


def sections(path: Path) -> dict[int, memoryview]:
    """Number of a section's kind → its bytes; FormatError (a ValueError) unless each of SECTIONS is there once."""
    data = mapped(path)
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise FormatError(f"it begins with {bytes(data[: len(MAGIC)])!r}")
    entries = root(data[HEADER_AT:]).table(1).tables(0)
    kinds = sorted(s.number(3, "<B") for s in entries)
    if kinds != sorted(SECTIONS):
        raise FormatError(f"it has sections {kinds}, expected {sorted(SECTIONS)}: {', '.join(SECTIONS.values())}")
    found = {}
    for s in entries:
        kind, begin, end = s.number(3, "<B"), s.number(1, "<Q"), s.number(2, "<Q")
        if not HEADER_AT < begin < end <= len(data):
            raise FormatError(f"its {SECTIONS[kind]} stands at {begin} to {end} of {len(data)} bytes")
        found[kind] = data[begin:end]
    return found


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Whether two files' content is the same, without a copy of either."""
    return len(a) == len(b) and hashlib.sha256(a).digest() == hashlib.sha256(b).digest()


def is_packed(section: memoryview, text: bytes) -> bool:
    """Whether a section holds a text: its length, then its bytes compressed."""
    if int.from_bytes(section[:SIZE_BYTES], "little") != len(text):
        return False
    stream = zlib.decompressobj()
    return stream.decompress(section[SIZE_BYTES:], len(text) + 1) == text and stream.eof


def stop_ids(tokens: list[Any]) -> list[int]:
    """Ids of TokenUnions (field 1: TokenIds, whose field 1 are ids, packed or not), each of one token."""
    found: list[int] = []
    for token in tokens:
        (ids,) = fields(token).get(1, [b""])
        for value in fields(ids).get(1, []):
            found += [value] if isinstance(value, int) else _Wire(value).integers()
    return found


def turns(prompts: list[Any]) -> list[tuple[str, str]]:
    """What PromptTemplates put before and behind a user's turn and a model's; of an empty message none."""
    (message,) = prompts
    around = [fields(turn) for _, (turn,) in sorted(fields(message).items())]
    return [(f.get(1, [b""])[0].decode(), f.get(2, [b""])[0].decode()) for f in around]


def end_ids(directory: Path) -> list[int]:
    """The ids that end an answer by generation_config.json, or else by config.json."""
    body: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        body |= read_object(directory / name) if (directory / name).exists() else {}
    eos = body.get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def fields(message: bytes) -> dict[int, list[Any]]:
    """A protobuf message by field number: integers, or bytes; FormatError for any other kind and for a cut end."""
    found: dict[int, list[Any]] = {}
    wire = _Wire(message)
    while wire.left:
        key = wire.integer()
        if key & 7 not in (0, 2):
            raise FormatError(f"its metadata has a field of wire type {key & 7}")
        found.setdefault(key >> 3, []).append(wire.take(wire.integer()) if key & 7 else wire.integer())
    return found


class _Wire:
    """Reads a protobuf message from its front."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise FormatError(f"its metadata ends within {count} bytes")
        self._at += count
        return self._data[self._at - count : self._at]

    def integer(self) -> int:
        """Seven bits a byte, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise FormatError("its metadata has an integer of more than 64 bits")

    def integers(self) -> list[int]:
        """All that is left."""
        found: list[int] = []
        while self.left:
            found.append(self.integer())
        return found
