"""The C++ runner's tokenizer against Hugging Face's: the same tokens of any text, for gori's own and for byte-level BPE
of other families, trained here with their patterns."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gori.export import runner_file
from gori.tokenizer import Tokenizer
from runner_probe import Probe

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
TURN = "{% for m in messages %}<|im|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
SYLLABLES = [chr(c) for c in range(0xAC00, 0xD7A4)]
DECOMPOSED = unicodedata.normalize("NFD", "".join(SYLLABLES))


def texts() -> Iterator[str]:
    """Enough of each kind of character that merges are learnt."""
    for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md")):
        yield path.read_text(encoding="utf-8")
    yield (
        "서울역으로 가자. 온도를 22.5도로 맞춰줘!\r\n\r\n\t창문 좀 열어 줄래?   it's I'LL we've don't\n  1234567890 "
        * 20
    )
    yield DECOMPOSED


def trained(pattern: str | None, *, nfc: bool = False, whole: bool = False) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    if nfc:
        inner.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|im|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts(), trainer)
    return inner


FAMILIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "qwen2": lambda: trained(SHORT + WORDS % "", nfc=True),
    "llama3": lambda: trained(SHORT + WORDS % "{1,3}", whole=True),
    "gpt2": lambda: trained(None),
}


@pytest.fixture(scope="module", params=["gori", *FAMILIES])
def pair(
    request: pytest.FixtureRequest, toy_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Probe, Tokenizer]]:
    """The runner's tokenizer and the library's."""
    source = toy_tokenizer
    if request.param != "gori":
        source = tmp_path_factory.mktemp(request.param)
        FAMILIES[request.param]().save(str(source / "tokenizer.json"))
        (source / "chat_template.jinja").write_text(TEMPLATE)
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    out = tmp_path_factory.mktemp("runner")
    assert runner_file.write(source, out) == ""
    probe = Probe(out / "runner.bin")
    yield probe, Tokenizer.load(source)
    probe.close()


def same(pair: tuple[Probe, Tokenizer], text: str) -> None:
    ours, theirs = pair
    assert ours.tokens(text) == theirs.encode(text), ascii(text[:80])
    assert ours.normalized(text) == theirs.normalize(text), ascii(text[:80])


MARKS = [chr(c) for c in range(0x300, 0x370)] + list(
    "\u1dc0\u20d0\u302a\u3099\u309a\u0591\u064b\u094d\u0f71\u0f74\u0344"
)
JAMO = [chr(c) for c in range(0x1100, 0x1200)]
PIECES = [
    *"aeoAZzé가힣あ漢字 \t\n\r\x0b\x85\xa0\u2028\u3000'\"<|>.,!?-_09½Ⅷ²",
    "'S",
    "'lL",
    "\r\n",
    "  ",
    "😀",
    "👩‍👩‍👧",
    "\U0001d15e",
]


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_has_the_librarys_tokens(pair: tuple[Probe, Tokenizer], text: str) -> None:
    same(pair, text)


@given(st.lists(st.sampled_from([*PIECES, *MARKS, *JAMO, *SYLLABLES[::97]]), max_size=40).map("".join))
def test_marks_in_any_order_and_jamo_have_the_librarys_tokens(pair: tuple[Probe, Tokenizer], text: str) -> None:
    same(pair, text)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_utf8_are_read_as_python_reads_them(pair: tuple[Probe, Tokenizer], raw: bytes) -> None:
    ours, theirs = pair
    assert ours.tokens(raw) == theirs.encode(raw.decode(errors="replace"))


@given(
    st.lists(st.sampled_from([b"\xe0", b"\xa0", b"\xed", b"\x9f", b"\xf0", b"\x90", b"\xf4", b"\x8f", b"\xc1", b"a"]))
)
def test_cut_characters_are_read_as_python_reads_them(pair: tuple[Probe, Tokenizer], parts: list[bytes]) -> None:
    raw = b"".join(parts)
    assert pair[0].tokens(raw) == pair[1].encode(raw.decode(errors="replace"))


def each_character(pair: tuple[Probe, Tokenizer], *ranges: range) -> None:
    points = [c for r in ranges for c in r if not 0xD800 <= c < 0xE000]
    for begin in range(0, len(points), 4096):
        same(pair, " ".join(map(chr, points[begin : begin + 4096])))


def test_every_assigned_character_has_the_librarys_tokens(pair: tuple[Probe, Tokenizer]) -> None:
    # the large blocks of ideographs are of one kind, so every 17th of them stands for its neighbours
    small = (
        range(0x3400),
        range(0x4DC0, 0x4E00),
        range(0x9FF0, 0xAC00),
        range(0xD7A0, 0x17000),
        range(0x1AFF0, 0x20000),
    )
    each_character(
        pair, *small, *(range(r.start, r.stop, 17) for r in (range(0x3400, 0xAC00), range(0x17000, 0x110000, 7)))
    )


@pytest.mark.slow
def test_every_character_of_unicode_has_the_librarys_tokens(pair: tuple[Probe, Tokenizer]) -> None:
    each_character(pair, range(0x110000))


def test_every_hangul_syllable_has_the_librarys_tokens_composed_or_not(pair: tuple[Probe, Tokenizer]) -> None:
    for between in ("", " ", "\u0301"):
        same(pair, between.join(SYLLABLES))
        same(pair, between.join(unicodedata.normalize("NFD", s) for s in SYLLABLES))
    # a final consonant that stands apart joins the syllable before it
    same(pair, "".join(s + chr(0x11A7 + i % 29) for i, s in enumerate(SYLLABLES)))


def test_every_mark_composes_with_every_base_as_the_library_has_it(pair: tuple[Probe, Tokenizer]) -> None:
    combining = [chr(c) for c in range(0x300, 0x2FA20) if unicodedata.combining(chr(c))]
    bases = [chr(c) for c in range(0x2FA20) if unicodedata.decomposition(chr(c)) and not 0xAC00 <= c < 0xD7A4]
    rng = random.Random(0)
    for _ in range(40):
        rows = (rng.choice(bases) + "".join(rng.choices(combining, k=rng.randint(1, 4))) for _ in range(400))
        same(pair, "".join(rows))


@pytest.mark.parametrize(
    "letter", ["a", "가", "\u1100\u1161", "é", " ", "\n", " \n", "1", "!", "\u0301", "\x00", "ab", "'s"]
)
def test_ten_kilobytes_of_one_thing_have_the_librarys_tokens(pair: tuple[Probe, Tokenizer], letter: str) -> None:
    same(pair, letter * (10_000 // len(letter.encode())))
    same(pair, "x" + letter * (10_000 // len(letter.encode())) + "y")


def test_a_tokenizer_that_the_runner_would_read_otherwise_is_refused_with_the_reason(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(["a b"], trainers.BpeTrainer(special_tokens=["<|user|>"], show_progress=False))
    inner.save(str(tmp_path / "tokenizer.json"))
    assert "Whitespace" in runner_file.write(tmp_path, tmp_path)
    assert not (tmp_path / "runner.bin").exists()
