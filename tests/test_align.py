"""A teacher's probabilities carried over to another tokenizer: small vocabularies against sums written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_folders import TEMPLATE, foreign_tokenizer, write_foreign
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gori.calls import ASSISTANT, END, PAD, USER
from gori.corpus import Corpus
from gori.data import Conversation, Turn, encode
from gori.distill.losses import sparse_loss
from gori.teacher import foreign_answers
from gori.teacher.align import Aligner
from gori.teacher.cache import Asked
from gori.teacher.cache_draw import largest
from gori.teacher.foreign import Loading, import_teacher, open_foreign
from gori.tokenizer import BYTE_OF, Tokenizer, template

MARKS = (PAD, END, USER, ASSISTANT)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe(merges: Sequence[str], special: Sequence[str], order: Sequence[int] | None = None) -> Inner:
    """A byte-level BPE of given merges, as in "a b" (Ġ is a space); `order` permutes the ids."""
    names = [*special, *BYTES, *("".join(m.split()) for m in merges)]
    ids = order if order is not None else range(len(names))
    vocab = dict(zip(names, ids, strict=True))
    pairs = [(m.split()[0], m.split()[1]) for m in merges]
    inner = Inner(models.BPE(vocab, pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    return inner


def teacher_of(merges: Sequence[str]) -> PreTrainedTokenizerFast:
    inner = bpe(merges, ("<|im_start|>", "<|im_end|>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", chat_template=TEMPLATE)


class Case:
    """A teacher and a student of some merges, and what is carried over of random distributions for one answer."""

    def __init__(self, teacher: Sequence[str], student: Sequence[str], answer: str) -> None:
        self.teacher, self.student = teacher_of(teacher), Tokenizer(bpe(student, MARKS))
        c = Conversation((Turn("user", "x"), Turn("assistant", answer)))
        self.example = encode(c, self.student)
        self.asked = Aligner(self.teacher, self.student, {}).ask((c, self.example))
        g = torch.Generator().manual_seed(0)
        size = (sum(self.asked.wanted), len(self.teacher))
        self.p = torch.randn(size, generator=g, dtype=torch.float64).mul(2).softmax(-1)
        assert self.asked.carry is not None
        self.out = self.asked.carry(self.p)

    def said(self, n: int, token: str) -> float:
        """The teacher's probability of a token at its n-th."""
        return float(self.p[n, self.teacher.convert_tokens_to_ids(token)])

    def got(self, n: int, token: str) -> float:
        """The student's probability of a token at its n-th."""
        return float(self.out[n, self.student.id(token)])

    def tokens(self) -> list[str]:
        loss = np.asarray(self.example.loss)
        return [str(self.student._inner.id_to_token(int(i))) for i in np.asarray(self.example.ids)[loss]]


def test_tokens_of_the_same_bytes_go_over_and_the_first_piece_of_the_others() -> None:
    case = Case(["a b"], ["Ġ a", "Ġa b", "a b"], "abcab")
    assert case.tokens() == ["Ġab", "c", "ab", END]
    assert case.asked.unknown == 0
    assert case.got(0, "Ġab") == pytest.approx(case.said(0, "ab"))
    assert case.got(0, "Ġa") == pytest.approx(case.said(0, "a"))
    others = sum(case.said(0, b) for b in BYTES if BYTE_OF[b] < 128 and b != "a")
    assert case.got(0, "Ġ") == pytest.approx(others)  # a space is what the student says first
    assert case.got(1, "c") == pytest.approx(case.said(1, "c"))
    assert case.got(1, "ab") == pytest.approx(case.said(1, "ab"))
    assert case.got(2, "ab") == pytest.approx(case.said(2, "ab"))
    assert case.got(3, END) == pytest.approx(case.said(3, "<|im_end|>"))
    assert case.got(3, "a") == pytest.approx(case.said(3, "a"))


def test_inside_a_longer_token_the_teacher_is_conditioned_on_the_bytes_that_stand() -> None:
    case = Case(["a b", "ab c", "ab d", "abd d"], ["Ġ a", "Ġa b", "d d"], "abcx")
    assert case.tokens() == ["Ġab", "c", "x", END]
    begin = {t: case.said(0, t) for t in ("abc", "abd", "abdd")}
    assert case.got(0, "Ġab") == pytest.approx(sum(begin.values()) + case.said(0, "ab"))
    for token, text in (("c", "abc"), ("d", "abd"), ("dd", "abdd")):
        assert case.got(1, token) == pytest.approx(begin[text] / sum(begin.values()))
    assert float(case.out[1].sum()) == pytest.approx(1)


def test_a_longer_students_token_has_the_product_along_the_true_text() -> None:
    case = Case(["a b", "c d"], ["Ġ a", "Ġa b", "Ġab c"], "abcx")
    assert case.tokens() == ["Ġabc", "x", END]
    begins_with_c = case.said(1, "c") + case.said(1, "cd")
    assert case.got(0, "Ġabc") == pytest.approx(case.said(0, "ab") * begins_with_c)
    assert case.got(0, "Ġab") == 0  # what else may follow "ab" has no token of its own: it is the tail
    assert case.got(1, "x") == pytest.approx(case.said(2, "x"))


WORDS = st.text("abc ", min_size=1, max_size=12).map(str.strip).filter(bool)
MERGES = st.lists(st.sampled_from(["a b", "b c", "c a", "ab c", "bc a", "Ġ a", "Ġ b", "Ġa b"]), unique=True)


@given(MERGES, MERGES, WORDS)
def test_nothing_is_made_up(teacher: list[str], student: list[str], answer: str) -> None:
    """Sums stay within one, and every true token has a probability, whatever the two cut."""
    case = Case(_grown(teacher), _grown(student), answer)
    assert float(case.out.sum(1).max()) <= 1 + 1e-9
    loss = np.asarray(case.example.loss)
    true = torch.tensor(np.asarray(case.example.ids)[loss])
    assert float(case.out.gather(1, true.unsqueeze(1)).min()) > 0


def _grown(merges: list[str]) -> list[str]:
    """Merges whose parts exist, shortest first."""
    made, out = set("abcĠ"), []
    for m in sorted(merges, key=len):
        if set(m.split()) <= made:
            made.add("".join(m.split()))
            out.append(m)
    return out


def asked_of(own: Tokenizer, student: Tokenizer, corpus: Corpus, row: int) -> tuple[Asked, torch.Tensor]:
    """What a teacher with gori's own markup is asked, and random distributions for it."""
    hf = PreTrainedTokenizerFast(tokenizer_object=own._inner, eos_token=END, chat_template=template())
    c = corpus.train[row]
    asked = Aligner(hf, student, corpus.functions).ask((c, encode(c, student)))
    size = (sum(asked.wanted), own.vocab_size)
    return asked, torch.randn(size, generator=torch.Generator().manual_seed(row)).mul(3).softmax(-1)


@pytest.mark.parametrize("row", [0, 2, 26, -1])
def test_the_same_tokenizer_gives_exactly_the_plain_cache(toy_corpus: Corpus, toy_tokenizer: Path, row: int) -> None:
    own = Tokenizer.load(toy_tokenizer)
    asked, p = asked_of(own, own, toy_corpus, row)
    assert asked.unknown == 0
    assert (asked.ids, asked.wanted) == (asked.example.ids, asked.example.loss)
    assert asked.carry is not None
    assert torch.equal(asked.carry(p), p)


def test_permuted_ids_give_the_same_loss(toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    own = Tokenizer.load(toy_tokenizer)
    order = np.random.default_rng(0).permutation(own.vocab_size).tolist()
    other = Tokenizer(_permuted(own, order))
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(40, 16, generator=g), torch.randn(own.vocab_size, 16, generator=g)
    moved = torch.empty_like(head)
    moved[order] = head
    losses = []
    for student, matrix in ((own, head), (other, moved)):
        asked, p = asked_of(own, student, toy_corpus, -1)
        assert asked.carry is not None
        soft = largest(asked.carry(p), 40).soft
        targets = torch.tensor(np.asarray(asked.example.ids)[np.asarray(asked.example.loss)])
        ids, weights = torch.from_numpy(soft.ids).long(), torch.from_numpy(soft.weights)
        losses.append(
            sparse_loss(hidden[: len(p)], matrix, ids, weights, targets, {"forward_kl": 0.7, "ce": 0.3}, tail=True)[0]
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def _permuted(own: Tokenizer, order: Sequence[int]) -> Inner:
    import json

    body = json.loads(own._inner.to_str())
    body["model"]["vocab"] = {t: order[i] for t, i in body["model"]["vocab"].items()}
    for token in body["added_tokens"]:
        token["id"] = order[token["id"]]
    body["added_tokens"].sort(key=lambda t: t["id"])
    return Inner.from_str(json.dumps(body))


def test_of_a_call_the_values_are_carried_over_and_the_rest_is_the_truth(
    toy_corpus: Corpus, toy_tokenizer: Path
) -> None:
    student = Tokenizer.load(toy_tokenizer)
    c = next(c for c in toy_corpus.train if c.utterance == "take me to Main Street")
    example = encode(c, student)
    asked = Aligner(foreign_tokenizer(), student, toy_corpus.functions).ask((c, example))
    answer = np.asarray(example.ids)[np.asarray(example.loss)].tolist()
    special = [i for i in answer if not student.piece(i)]
    assert asked.unknown == len(special) == 3  # the function, the argument, the end
    p = torch.full((sum(asked.wanted), 320), 1 / 320)
    assert asked.carry is not None
    out = asked.carry(p)
    for n, i in enumerate(answer):
        assert (float(out[n, i]) == 1) == (i in special)
        assert float(out[n, i]) > 0


def test_greedy_answers_of_a_batch_are_those_of_rows_alone(tmp_path: Path) -> None:
    import_teacher(write_foreign(tmp_path / "of", "qwen3_moe"), Loading(dtype="float32"), tmp_path / "t")
    teacher = open_foreign(tmp_path / "t")
    prompts = [teacher.tokenizer(t)["input_ids"] for t in ("turn the heat", "서울역까지", "x")]
    together = foreign_answers.greedy(teacher, prompts, 10_000)
    assert together == [foreign_answers.greedy(teacher, [p], 1)[0] for p in prompts]
    ids = torch.tensor([prompts[0]])
    for token in together[0][:20]:
        assert token == int(teacher.model(ids).logits[0, -1].argmax())
        ids = torch.cat((ids, torch.tensor([[token]])), 1)


def test_what_the_teacher_wrote_becomes_the_label_and_what_cannot_be_read_does_not(
    toy_corpus: Corpus, toy_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Tokenizer.load(toy_tokenizer)
    rows = [(c, encode(c, student)) for c in toy_corpus.train[:3]]
    wrote = ['{"name": "navigate", "arguments": {"place": "집"}}', '{"name": "fly", "arguments": {}}', "Sorry."]
    monkeypatch.setattr(foreign_answers, "texts", lambda *_: wrote)
    found, told = foreign_answers.written(None, rows, student, toy_corpus.functions, 1000)  # type: ignore[arg-type]
    assert student.decode(list(found[0].ids)).endswith("<|call:navigate|><|arg:place|> 집<|end|>")
    assert found[1].ids == rows[1][1].ids
    assert student.decode(list(found[2].ids)).endswith("<|none|><|end|>")
    assert told == {"rows_from_truth": 1.0}
    for e in found:
        assert e.soft is not None
        assert e.soft.ids[:, 0].tolist() == np.asarray(e.ids)[np.asarray(e.loss)].tolist()
        assert (e.soft.weights == 1).all()
