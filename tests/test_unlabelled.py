"""Requests without answers: how they are read, what the teacher's answers come to, and students of each way of
distilling, as stages on disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_rows, write_rows
from hypothesis import given
from hypothesis import strategies as st

from gori import checkpoint
from gori.artifact import content_hash, read_manifest, would_make
from gori.calls import END, Call, render
from gori.corpus import Corpus
from gori.data import Conversation, Turn, encode, prompt_ids, read_conversations, read_prompts
from gori.distill.checks import check, check_recipe
from gori.distill.stage import train_student
from gori.distill.unlabelled import ROWS, answered, answers, mixed, prompts, read_answers
from gori.errors import GoriError
from gori.recipe import Distill, Recipe, Student, Teacher, Unlabelled, parse
from gori.teacher.stage import train_teacher
from gori.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "max_position": 200}
TRAIN = {"batch_tokens": 300, "muon_lr": 0.01, "adam_lr": 0.01, "warmup_steps": 4, "threads": 1}


@pytest.fixture(scope="module")
def teacher(toy_corpus: Corpus, toy_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts that has learned a little of the toy task."""
    out = tmp_path_factory.mktemp("run") / "teacher"
    section = Teacher.model_validate(
        {**SHAPE, "experts": 4, "intermediate_size": 32, "induction": False, "train": {**TRAIN, "steps": 110}}
    )
    train_teacher(section, toy_corpus, toy_tokenizer, 0, out)
    return out


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    said = [f"{place} 가자" for place in ("서울역", "강남역", "부산항")] + ["take me to Pier 39", "하늘이 왜 파래?"]
    path = tmp_path / "said.txt"
    path.write_text("\n".join(said) + "\n\n", encoding="utf-8")
    return path


def student(**more: Any) -> Student:
    return Student.model_validate({**SHAPE, "intermediate_size": 48, "induction": False} | more)


def distill(**more: Any) -> Distill:
    return Distill.model_validate({"train": {**TRAIN, "steps": 6}, **more})


def test_lines_of_text_and_conversations_without_an_answer_are_read_alike(tmp_path: Path, toy_corpus: Corpus) -> None:
    text, rows = tmp_path / "said.txt", tmp_path / "said.jsonl"
    text.write_text("서울역 가자\n\nopen it\n", encoding="utf-8")
    write_rows(rows, [{"messages": [{"role": "user", "content": s}]} for s in ("서울역 가자", "open it")])
    a, b = (read_prompts(p, toy_corpus.functions) for p in (text, rows))
    assert a == b
    assert [c.utterance for c in a] == ["서울역 가자", "open it"]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": []}]}',
         "last message is of role assistant"),
        ("a.jsonl", '{"messages": [{"role": "system", "content": "x"}]}', "last message is of role system"),
        ("a.jsonl", "said", "line 1 column 1: not JSON"),
        ("a.txt", "", "is empty"),
    ],
)  # fmt: skip
def test_other_lines_are_refused(tmp_path: Path, toy_corpus: Corpus, name: str, line: str, message: str) -> None:
    (tmp_path / name).write_text(line)
    with pytest.raises(GoriError, match=message):
        read_prompts(tmp_path / name, toy_corpus.functions)


def test_the_answers_are_the_teachers_own_and_only_valid_ones(
    teacher: Path, asked: Path, toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "distill"
    more = {"files": [str(asked)], "share": 0.25}
    places = (teacher, toy_corpus, toy_tokenizer, 0, out)
    assert train_student(student(), distill(unlabelled=more), *places)
    told = read_manifest(tmp_path / "distill-answers")["metrics"]
    rows = read_conversations(tmp_path / "distill-answers" / ROWS, toy_corpus.functions)
    assert told == {"requests": 5, "valid": len(rows), "refused": 5 - len(rows)}
    assert len(rows) > 1
    model, tokenizer = checkpoint.load(teacher).eval(), Tokenizer.load(toy_tokenizer)
    for c in rows:  # one at a time and without a cache: each token is the teacher's likeliest
        ids = prompt_ids(c, tokenizer)
        with torch.no_grad():
            for _ in range(60):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
                if ids[-1] == tokenizer.id(END):
                    break
        assert answered(c, tokenizer.decode(ids[len(prompt_ids(c, tokenizer)) : -1]), toy_corpus.functions) == c
    body = read_manifest(out)
    assert body["inputs"]["answers"] == content_hash(tmp_path / "distill-answers")
    n = body["metrics"]["unlabelled"]
    assert n["rows"] - n["labelled"] == pytest.approx(n["rows"] / 4, abs=1)
    assert str(asked) not in json.dumps(body)
    assert not train_student(student(), distill(unlabelled=more), *places)  # unchanged
    assert not would_make(lambda: train_student(student(), distill(unlabelled=more), *places))


def test_an_answer_with_bytes_that_are_no_text_is_left_out(toy_corpus: Corpus) -> None:
    c = next(c for c in toy_corpus.train if c.utterance == "take me to Pier 39")
    right, broken = (render([Call("navigate", {"place": place})]) for place in ("Pier 39", "Pier \ufffd\ufffd"))
    assert answered(c, right, toy_corpus.functions) == c
    assert answered(c, broken, toy_corpus.functions) is None
    said = Conversation((Turn("user", "take me to Pier \ufffd"), c.turns[-1]))  # the user's own are text
    assert answered(said, broken, toy_corpus.functions) is not None


def test_answered_rows_that_the_student_cannot_read_are_counted(
    toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(toy_tokenizer)
    write_rows(tmp_path / ROWS, toy_rows())
    lengths = sorted(len(encode(c, tokenizer).ids) for c in toy_corpus.train)
    room = lengths[len(lengths) // 2]
    fitting, too_long = read_answers(tmp_path, toy_corpus, tokenizer, room)
    assert [len(encode(c, tokenizer).ids) <= room for c in fitting] == [True] * sum(n <= room for n in lengths)
    assert too_long == sum(n > room for n in lengths) > 0
    with pytest.raises(GoriError, match=rf"none of the {len(lengths)} answered requests fits student.max_position 5"):
        read_answers(tmp_path, toy_corpus, tokenizer, 5)


def test_drawn_answers_are_a_function_of_the_seed(teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    model, tokenizer = checkpoint.load(teacher).eval(), Tokenizer.load(toy_tokenizer)
    rows = toy_corpus.train[:9]
    a, b, c, greedy = (answers(model, rows, tokenizer, t, s) for t, s in ((1.5, 0), (1.5, 0), (1.5, 1), (0.0, 0)))
    assert a == b != c
    assert answers(model, rows, tokenizer, 1e-4, 5) == greedy


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.05, 0.95))
def test_a_mixture_has_the_share_that_was_asked_for_and_every_row_of_both(a: int, b: int, share: float) -> None:
    found = mixed([f"labelled {i}" for i in range(a)], [f"answered {i}" for i in range(b)], share)
    counts = Counter(found)
    mine, theirs = ([n for row, n in counts.items() if row.startswith(kind)] for kind in ("labelled", "answered"))
    assert (len(mine), len(theirs)) == (a, b)
    assert max(mine) - min(mine) <= 1
    assert max(theirs) - min(theirs) <= 1
    assert min(max(mine), max(theirs)) == 1  # one side as it is
    assert abs(sum(theirs) - share * len(found)) <= 1


def test_students_on_the_way_are_taken_from_each_other_and_told(
    teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "distill"
    step = {"layers": 2, "hidden_size": 32, "steps": 3}
    steps = [{**step, "intermediate_size": 64}, {**step, "intermediate_size": 56}]
    places = (teacher, toy_corpus, toy_tokenizer, 0, out)
    settings = distill(progressive=steps, losses={"forward_kl": 1.0, "hidden": 0.1})
    assert would_make(lambda: train_student(student(hidden_size=24), settings, *places))
    assert not list(tmp_path.iterdir())
    assert train_student(student(hidden_size=24), settings, *places)
    told = read_manifest(out)["metrics"]["progressive"]
    assert [t["directory"] for t in told] == ["distill-1", "distill-2"]
    assert told[1]["content"] == read_manifest(out)["inputs"]["source"] == content_hash(tmp_path / "distill-2")
    assert read_manifest(tmp_path / "distill-2")["inputs"]["source"] == content_hash(tmp_path / "distill-1")
    assert "source" not in read_manifest(tmp_path / "distill-1")["inputs"]
    assert [e["stage"] for e in read_manifest(out)["lineage"]].count("distill") == 2
    assert checkpoint.load(out).cfg.hidden_size == 24
    assert not train_student(student(hidden_size=24), settings, *places)


def test_a_shallower_student_takes_the_layer_that_the_teachers_answers_miss_more(
    teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "distill"
    assert train_student(student(layers=1), distill(depth="perplexity"), teacher, toy_corpus, toy_tokenizer, 0, out)
    tokenizer, losses = Tokenizer.load(toy_tokenizer), {}
    for layer in ("0", "1"):
        fewer, found = checkpoint.load(teacher).eval(), []
        del fewer.layers[int(layer)]
        for c in toy_corpus.train:
            e = encode(c, tokenizer)
            with torch.no_grad():
                log_p = fewer(torch.tensor([e.ids]))[0].double().log_softmax(-1)
            found += [-float(log_p[i - 1, e.ids[i]]) for i in range(1, len(e.ids)) if e.loss[i]]
        losses[layer] = sum(found) / len(found)
    initialised = read_manifest(out)["metrics"]["initialised"]
    (left_out,) = initialised["left_out"]
    assert left_out["loss_without"] == pytest.approx(losses, abs=1e-3)
    assert left_out["layer"] == int(min(losses, key=lambda layer: losses[layer]))
    assert [x["teacher_layer"] for x in initialised["layers"]] == [1 - left_out["layer"]]


def test_on_policy_students_can_be_asked_unlabelled_requests(
    teacher: Path, asked: Path, toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path
) -> None:
    more = {"unlabelled": {"files": [str(asked)], "answers": "student"}, "on_policy": {"share": 1.0, "start": 0.5}}
    settings = distill(**more, labelled_rows=7, losses={"jsd@0.3": 1.0, "attention": 0.1})
    assert train_student(student(), settings, teacher, toy_corpus, toy_tokenizer, 0, tmp_path / "distill")
    log = [json.loads(line) for line in (tmp_path / "distill" / "log.jsonl").read_text().splitlines()]
    assert [e["on_policy"] for e in log] == [0, 0, 0, 1, 1, 1]
    assert all(e["attention"] >= 0 for e in log)
    assert "unlabelled/0" in read_manifest(tmp_path / "distill")["inputs"]


FILES = {"files": ["x.txt"]}


@pytest.mark.parametrize(
    ("more", "cached", "message"),
    [
        ({"on_policy": {}}, True, "distill.on_policy has rows that the cache lacks"),
        ({"unlabelled": FILES}, True, "distill.unlabelled has rows"),
        ({"labelled_rows": 3}, True, "distill.labelled_rows has rows"),
        ({"losses": {"forward_kl": 1.0, "hidden": 1.0}}, True, "hidden needs the teacher itself"),
        ({"losses": {"ce": 1.0}, "on_policy": {}}, False, "give a divergence a weight"),
        ({"unlabelled": {**FILES, "answers": "student"}}, False, "needs on-policy steps"),
        ({"width": "pca"}, False, "needs a head of its own"),
        ({"layers": [0], "progressive": [{"layers": 1, "hidden_size": 8, "intermediate_size": 8, "steps": 1}]}, False,
         "takes another student's"),
        ({"losses": {"reverse_kl": 1.0}}, True, "reverse_kl needs the whole distribution: of a cached teacher"),
        ({"on_policy": {"start": 0.4}, "teacher_until": 0.4}, False, "heard until distill.teacher_until 0.4"),
        ({"init": "random", "depth": "influence"}, False, "distill.depth says how weights are taken"),
        ({"init": "random", "fit": False}, False, "distill.fit says how weights are taken"),
        ({"pairs": [(1, 1)]}, False, "compared by hidden, cosine and attention"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_any_work(more: dict[str, Any], cached: bool, message: str) -> None:
    with pytest.raises(GoriError, match=message):
        check(distill(**more), student(), cached)


def asking(**sections: Any) -> Recipe:
    """A recipe of the built-in task whose student is half as deep as its teacher."""
    body: dict[str, Any] = {"name": "r", "data": {"builtin": "incar"}, "student": {"layers": 2}}
    return parse({**body, **sections}, "the test")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"student": {"layers": 9}}, "student of 9 layers cannot be initialised from a teacher of 4"),
        ({"student": {"hidden_size": 256}}, "hidden_size 256 exceeds the teacher's 128"),
        ({"distill": {"layers": [0, 7]}}, r"layers \[0, 7\] are not 2 of the teacher's 0..3"),
        ({"distill": {"progressive": [{"layers": 1, "hidden_size": 128, "intermediate_size": 256, "steps": 1}]}},
         "student of 2 layers cannot be initialised from a teacher of 1"),
        ({"distill": {"init": "random"}, "student": {"layers": 1}}, "induction needs 2 layers"),
        ({"distill": {"unlabelled": {"files": ["nowhere.txt"]}}}, "nowhere.txt does not exist"),
    ],
)  # fmt: skip
def test_what_a_later_stage_would_refuse_is_refused_with_the_recipe(sections: dict[str, Any], message: str) -> None:
    check_recipe(asking())
    check_recipe(asking(student={"layers": 1}))  # every weight is taken: no circuit is written
    with pytest.raises(GoriError, match=message):
        check_recipe(asking(**sections))


def test_a_request_without_room_for_an_answer_is_named(toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.txt"
    file.write_text("hello\n\n" + "very " * 60 + "long\n", encoding="utf-8")
    section, tokenizer = Unlabelled(files=[str(file)]), Tokenizer.load(toy_tokenizer)
    assert len(prompts(section, toy_corpus.functions, tokenizer, 500)) == 2
    with pytest.raises(GoriError, match=r"said.txt: request 2 has \d+ tokens and max_position is 32: shorten"):
        prompts(section, toy_corpus.functions, tokenizer, 32)


def test_more_labelled_rows_than_there_are_is_refused(
    teacher: Path, toy_corpus: Corpus, toy_tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(GoriError, match=r"distill.labelled_rows 100000 exceeds the \d+ rows of data.train"):
        train_student(
            student(), distill(labelled_rows=100000), teacher, toy_corpus, toy_tokenizer, 0, tmp_path / "distill"
        )
