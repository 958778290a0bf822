"""The tokenizer: a value has the same tokens wherever it stands, text survives, and transformers reads it alike."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gori import tokenizer
from gori.calls import ASSISTANT, END, MARKERS, USER, Call, Function, special_tokens
from gori.corpus import Corpus
from gori.data import Conversation, Turn, as_messages, encode, prompt_ids
from gori.errors import GoriError
from gori.runtime.generate import Utf8Stream
from gori.tokenizer import Tokenizer

HANGUL = [chr(c) for c in range(ord("가"), ord("힣") + 1)]
words = st.text(st.sampled_from(HANGUL + list("abcdefgXYZ 0123456789&-.'")), min_size=1, max_size=14)
values = words.map(lambda s: " ".join(s.split())).filter(bool)


@pytest.fixture(scope="module")
def ours(toy_tokenizer: Path) -> Tokenizer:
    return Tokenizer.load(toy_tokenizer)


@pytest.fixture(scope="module")
def theirs(toy_tokenizer: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(toy_tokenizer)


def holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


@given(values, st.sampled_from(["으로 가자", "로 안내해줘", "을 틀어", " 틀어줘", "", ", please", "?"]))
def test_a_value_has_the_same_tokens_in_the_utterance_and_in_the_call(ours: Tokenizer, value: str, after: str) -> None:
    said = ours.encode(f" 지금 {value}{after}")
    (call,) = (Call("navigate", {"place": value}),)
    answer = encode(Conversation((Turn("assistant", None, (call,)),)), ours).ids
    begin, end = answer.index(ours.id("<|arg:place|>")) + 1, answer.index(ours.id(END))
    assert ours.decode(answer[begin:end]) == f" {value}"
    assert holds(said, answer[begin:end])


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_in_nfc(ours: Tokenizer, text: str) -> None:
    # characters younger than the interpreter's Unicode tables may be composed by the library alone
    if all(unicodedata.category(c) != "Cn" for c in text):
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


def test_every_hangul_syllable_comes_back_composed_or_decomposed(ours: Tokenizer) -> None:
    text = "".join(HANGUL)
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode(unicodedata.normalize("NFD", text)) == ours.encode(text)


@given(st.lists(st.sampled_from([*MARKERS, "<|call:navigate|>", "<|arg:place|>", "x", " ", "가"])).map("".join))
def test_special_tokens_in_a_users_words_are_words(ours: Tokenizer, toy_corpus: Corpus, text: str) -> None:
    special = {ours.id(t) for t in special_tokens(toy_corpus.functions)}
    ids = ours.encode(text)
    assert not special & set(ids)
    assert ours.decode(ids) == text
    said = encode(Conversation((Turn("user", text), Turn("assistant", text))), ours).ids
    assert [t for t in said if t in special] == [ours.id(USER), ours.id(ASSISTANT), ours.id(END)]


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_transformers_gives_the_same_ids_and_text(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerFast, text: str
) -> None:
    ids = ours.encode_markup(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)


CONVERSATIONS = {
    "a call": [Turn("user", "서울역 가자"), Turn("assistant", None, (Call("navigate", {"place": "서울역"}),))],
    "no function": [Turn("user", "왜?"), Turn("assistant", None, ())],
    "text": [Turn("system", "be kind"), Turn("user", "hi\nthere"), Turn("assistant", 'say "가" & <b>')],
    "a list": [Turn("user", "a"), Turn("assistant", None, (Call("navigate", {"stops": ["집", "Pier 39"]}),))],
    "numbers and booleans": [
        Turn("user", "a"),
        Turn("assistant", None, (
            Call("set_temperature", {"degrees": 22.5, "zone": "front"}),
            Call("set_temperature", {"degrees": -3}),
            Call("open_window", {"percent": 50, "child_lock": True}),
            Call("open_window", {"child_lock": False}),
        )),
    ],
    "several turns": [
        Turn("user", "a"), Turn("assistant", None, ()), Turn("user", "it's \"b\""), Turn("assistant", "예"),
        Turn("user", "c"), Turn("assistant", None, (Call("navigate", {"place": "it's <b> & \"q\""}),)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_chat_template_gives_the_ids_that_gori_encodes(
    case: str, ours: Tokenizer, theirs: transformers.PreTrainedTokenizerFast
) -> None:
    c = Conversation(tuple(CONVERSATIONS[case]))
    text = theirs.apply_chat_template(as_messages(c), tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == encode(c, ours).ids
    prompt = theirs.apply_chat_template(as_messages(c)[:-1], tokenize=False, add_generation_prompt=True)
    assert theirs(prompt, add_special_tokens=False)["input_ids"] == prompt_ids(c, ours)


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12), st.floats(-1e9, 1e9), st.booleans()
)
def test_the_chat_template_writes_values_as_gori_does(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerFast, value: str, number: float, yes: bool
) -> None:
    value = value.strip()
    if "<|" in value:
        return
    calls = (
        Call("navigate", {"place": value}),
        Call("set_temperature", {"degrees": number}),
        Call("open_window", {"child_lock": yes}),
    )
    c = Conversation((Turn("assistant", None, calls),))
    text = theirs.apply_chat_template(as_messages(c), tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == encode(c, ours).ids


def test_loss_is_on_what_every_assistants_turn_says_and_its_end_mark(ours: Tokenizer) -> None:
    c = Conversation(tuple(CONVERSATIONS["several turns"]))
    e = encode(c, ours)
    said = ours.decode([t for t, on in zip(e.ids, e.loss, strict=True) if on])
    assert said == '<|none|><|end|> 예<|end|><|call:navigate|><|arg:place|> it\'s <b> & "q"<|end|>'


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_bytes_of_tokens_joined_are_the_texts_utf8(ours: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    ids = ours.encode(text)
    assert b"".join(map(ours.token_bytes, ids)).decode() == ours.decode(ids)


@given(st.text(st.sampled_from([*HANGUL[::97], "a", " ", "🚗"]), max_size=12), st.booleans())
def test_a_stream_gives_out_only_whole_characters_and_all_of_them(ours: Tokenizer, text: str, cut: bool) -> None:
    ids = ours.encode(text)
    stream = Utf8Stream(ours)
    pieces = [stream.push(t) for t in (ids[:-1] if cut else ids)]
    assert "\ufffd" not in "".join(pieces)
    assert text.startswith("".join(pieces))
    rest = stream.close()
    assert rest in ("", "\ufffd")
    if not cut:
        assert "".join(pieces) == text


def test_a_syllable_split_over_tokens_appears_when_its_last_byte_does(ours: Tokenizer) -> None:
    split = next(s for s in HANGUL if len(ours.encode(s)) == 3)  # bytes: the toy corpus never holds it
    stream = Utf8Stream(ours)
    assert [stream.push(t) for t in ours.encode(split)] == ["", "", split]
    assert stream.push(ours.encode(split)[0]) == ""
    assert stream.close() == "\ufffd"


@pytest.mark.parametrize("name", ["창문_열기", "größe", "naïve fn", "a.b-c"])
def test_functions_with_any_letters_in_their_names_survive_decoding(name: str, toy_corpus: Corpus) -> None:
    functions = {name: Function(name, "", {name: {"type": "string"}})}
    t = tokenizer.train(["가나다 abc"] * 3, functions, 300)
    text = f"<|call:{name}|><|arg:{name}|> größe 가"
    ids = t.encode_markup(text)
    assert ids[:2] == [t.id(f"<|call:{name}|>"), t.id(f"<|arg:{name}|>")]
    assert t.decode(ids) == text
    assert b"".join(map(t.token_bytes, ids)).decode() == text


def test_the_same_texts_train_the_same_file(toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path) -> None:
    from gori.corpus import training_texts

    tokenizer.train(training_texts(toy_corpus.train), toy_corpus.functions, 360).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (toy_tokenizer / name).read_bytes()


def test_a_vocabulary_without_room_for_bytes_and_special_tokens_is_refused(toy_corpus: Corpus) -> None:
    need = 256 + len(special_tokens(toy_corpus.functions))
    with pytest.raises(GoriError, match=f"need {need}; raise tokenizer.vocab_size"):
        tokenizer.train(["a"], toy_corpus.functions, need - 1)
    assert tokenizer.train(["a"], toy_corpus.functions, need).vocab_size == need


def test_a_broken_or_missing_tokenizer_is_refused(tmp_path: Path, toy_tokenizer: Path) -> None:
    with pytest.raises(GoriError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    whole = (toy_tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(GoriError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(GoriError, match="has no token '<|call:fly|>'".replace("|", r"\|")):
        Tokenizer.load(toy_tokenizer).id("<|call:fly|>")


def test_end_marks_are_read_from_an_int_or_a_list_and_missing_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    for body, want in (({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 9]}, [7, 9])):
        path.write_text(json.dumps(body))
        assert tokenizer.eos_ids(tmp_path) == want
    for text, message in (("{}", "names no eos_token_id"), ("{", "is not JSON"), ("[]", "expected an object")):
        path.write_text(text)
        with pytest.raises(GoriError, match=message):
            tokenizer.eos_ids(tmp_path)
