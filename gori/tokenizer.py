"""A byte-level BPE trained on one's own data, so made that a slot value has the same tokens wherever it stands.

Pre-tokens never join what a value's edge may cut: one Hangul syllable, a run of other letters, one or two digits, one
punctuation mark, each with at most one space before it. A value after a space is then tokenized alike in the utterance
("… 서울역으로 가자") and in the call ("<|arg:place|> 서울역"). Uses the tokenizers library alone: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gori.artifact import read_object, write_json
from gori.calls import END, PAD, Function, special_tokens
from gori.errors import GoriError

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SYSTEM_FILE = "system.txt"
"""What an exported model is told before every utterance."""
FILES = (FILE, CONFIG, TEMPLATE, "generation_config.json", "tools.json")
PATTERN = r" ?[가-힣]| ?[^\s\p{N}\p{P}\p{S}가-힣]+| ?\p{N}{1,2}| ?[\p{P}\p{S}]|\s"


class Tokenizer:
    """Text ↔ token ids. `encode` takes special tokens in the text as plain text, `encode_markup` as special tokens."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._plain = tokenizers.Tokenizer.from_str(inner.to_str())
        self._plain.encode_special_tokens = True
        self.vocab_size: int = inner.get_vocab_size()
        self._special = {i: t.content for i, t in inner.get_added_tokens_decoder().items()}

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        path = Path(directory) / FILE
        if not path.exists():
            raise GoriError(f"{path} does not exist: a checkpoint folder carries its tokenizer")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as e:  # the library raises bare Exception on a broken file
            raise GoriError(f"{path} is not a readable tokenizer: {e}") from e

    def id(self, token: str) -> int:
        """The id of a special token."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise GoriError(f"the tokenizer has no token {token!r}: it was not trained on these tools; train it again")
        return found

    def has(self, token: str) -> bool:
        return self._inner.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        return [e.ids for e in self._plain.encode_batch(list(texts), add_special_tokens=False)]

    def encode_markup(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens kept; bytes that are not UTF-8 become U+FFFD."""
        out, run = [], []
        for i in ids:
            if i in self._special:  # apart: the library reads a letter such as é in a special token's name as a byte
                out += [self._decode_plain(run), self._special[i]]
                run = []
            else:
                run.append(i)
        return "".join([*out, self._decode_plain(run)])

    def _decode_plain(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False) if ids else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (a special token: its name), for incremental decoding."""
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special:
            return token.encode()
        return bytes(BYTE_OF[c] for c in token)

    def normalize(self, text: str) -> str:
        """The text as it is cut into tokens: NFC, of the tokenizers that gori trains."""
        normalizer = self._inner.normalizer
        return normalizer.normalize_str(text) if normalizer is not None else text

    @cached_property
    def pieces(self) -> list[bytes]:
        """`piece` of every token."""
        return [self.piece(i) for i in range(self.vocab_size)]

    def piece(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for: none of a special token, which is no text."""
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, the chat template and generation_config.json."""
        (directory / FILE).write_text(self._inner.to_str(pretty=True) + "\n", encoding="utf-8")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "chat_template": template(),
        }
        write_json(directory / CONFIG, config)
        (directory / TEMPLATE).write_text(template(), encoding="utf-8")
        end = self.id(END)
        write_json(directory / "generation_config.json", {"eos_token_id": [end], "pad_token_id": self.id(PAD)})


def template() -> str:
    """The chat template (Jinja), the same text that gori.data.encode makes."""
    return resources.files("gori").joinpath("template.jinja").read_text(encoding="utf-8").rstrip("\n")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte → the byte."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = [b for b in range(256) if b not in keep]
    return {chr(b): b for b in keep} | {chr(256 + i): b for i, b in enumerate(spare)}


BYTE_OF = _byte_alphabet()
"""Of each character that stands for a byte in a vocabulary, the byte."""


def train(texts: Iterable[str], functions: dict[str, Function], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens, special tokens first; texts begin with a space as values do.

    NFC is applied, so decomposed Hangul (as macOS types it) becomes the syllables that were trained on.
    """
    special = special_tokens(functions)
    if vocab_size < 256 + len(special):
        raise GoriError(
            f"vocabulary of {vocab_size} is too small: 256 bytes and {len(special)} special tokens need "
            f"{256 + len(special)}; raise tokenizer.vocab_size"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def copy_files(source: Path, target: Path) -> None:
    """Copy tokenizer, template, generation config and tools from one checkpoint folder to another."""
    for name in FILES:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())


def eos_ids(directory: Path) -> list[int]:
    """The ids that end a turn, from generation_config.json (an int or a list there)."""
    path = Path(directory) / "generation_config.json"
    found = read_object(path).get("eos_token_id") if path.exists() else None
    if found is None:
        raise GoriError(f"{path} names no eos_token_id: generation would not stop")
    return found if isinstance(found, list) else [found]
