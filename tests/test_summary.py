"""Figures from answers: shares per language, agreement of two models, gates on dotted paths; `gori init`'s split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.calls import read_tools
from gori.errors import GoriError
from gori.gates import check, value_at, verdicts
from gori.init import write_recipe
from gori.recipe import load
from gori.summary import agreement, by_split, read_answers, split_entry

rows = st.lists(st.fixed_dictionaries({"exact": st.booleans(), "language": st.sampled_from(["ko", "en"])}), min_size=1)


@given(rows)
def test_shares_are_counts_over_counts_and_languages_make_the_whole(answers: list[dict[str, Any]]) -> None:
    entry = split_entry(answers)
    assert entry["n"] == len(answers)
    assert entry["exact"] * len(answers) == pytest.approx(sum(a["exact"] for a in answers))
    parts = {k: sum(a["language"] == k for a in answers) for k in ("ko", "en")}
    assert {k for k in parts if k in entry} == {k for k, n in parts.items() if n}
    assert sum(entry.get(k, 0) * n for k, n in parts.items()) == pytest.approx(entry["exact"] * entry["n"])


def test_an_answer_with_any_character_in_it_is_read_back(tmp_path: Path) -> None:
    said = ["a\u2028b", "\x85", "가\x0b", "\ufffd", '"', "\r\n"]
    path = tmp_path / "evaluate" / "m" / "answers.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"answer": s}, ensure_ascii=False) + "\n" for s in said), encoding="utf-8")
    assert [r["answer"] for r in read_answers(tmp_path, "m")] == said


def test_models_agree_where_their_calls_are_the_same_or_their_texts_where_neither_calls(toy: Path) -> None:
    functions = read_tools(toy / "tools.json")
    call = "<|call:open_window|><|arg:zone|> rear<|arg:percent|> 5"
    turned = "<|call:open_window|><|arg:percent|> 5<|arg:zone|> rear"
    pairs = [
        (call, turned, True),
        (call, "<|none|>", False),
        ("what", "what", True),
        ("what", call, False),
        ("a", "b", False),
    ]
    for a, b, same in pairs:
        assert agreement([{"answer": a}], [{"answer": b}], functions) == same
    assert agreement([{"answer": a} for a, _, _ in pairs], [{"answer": b} for _, b, _ in pairs], functions) == 0.4


def test_rows_are_grouped_by_their_split_in_order() -> None:
    found = by_split([{"split": s, "i": i} for i, s in enumerate("abab")])
    assert {k: [r["i"] for r in v] for k, v in found.items()} == {"a": [0, 2], "b": [1, 3]}


SUMMARY: dict[str, Any] = {
    "name": "x",
    "accuracy": {"student": {"test": {"exact": 0.9}}, "teacher": {"test": {"exact": 1.0}}},
    "agreement": {"executorch/w4a8-g32": 0.99},
    "bytes": {"executorch": 9},
    "targets": ["executorch"],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("accuracy.student.test.exact", 0.9), ("accuracy.student.test.exact / accuracy.teacher.test.exact", 0.9),
        ("agreement.executorch/w4a8-g32", 0.99), ("bytes.executorch", 9.0),
    ],
)  # fmt: skip
def test_a_gates_path_leads_to_its_number(path: str, value: float) -> None:
    assert value_at(SUMMARY, path) == pytest.approx(value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("accuracy.studnet.test.exact", "accuracy has no 'studnet': did you mean 'student'"),
        ("acuracy.x", "the summary has no 'acuracy': did you mean 'accuracy'"),
        ("accuracy", "does not lead to a number"),
        ("bytes.executorch.x", "bytes.executorch has no 'x'"), ("name", "does not lead to a number"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_refused(path: str, message: str) -> None:
    with pytest.raises(GoriError, match=message):
        value_at(SUMMARY, path)


@pytest.mark.parametrize(
    ("bound", "met"),
    [(">= 0.9", True), ("> 0.9", False), ("<= 0.9", True), ("<0.9", False), (">= 9e-1", True), ("< 1", True)],
)
def test_a_bound_is_met_as_its_sign_says(bound: str, met: bool) -> None:
    (found,) = verdicts({"accuracy.student.test.exact": bound}, {}, SUMMARY)
    assert found["met"] is met


@pytest.mark.parametrize("bound", ["0.9", "", ">= x", "== 1", ">= 1.2.3", ">= ."])
def test_a_bound_that_cannot_be_read_is_refused(bound: str) -> None:
    with pytest.raises(GoriError, match=r"write a comparison, as in '>= 0\.8'"):
        check({"a": bound})


@pytest.mark.parametrize(("budget", "met"), [(9, True), (8, False)])
def test_a_budget_of_bytes_is_a_gate_on_every_exported_file(budget: int, met: bool) -> None:
    (found,) = verdicts({}, {"bytes": budget}, SUMMARY)
    assert (found["name"], found["met"]) == ("bytes.executorch", met)


def many(toy: Path, path: Path, count: int) -> Path:
    row = (toy / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    path.write_text("".join(row.replace("가자", f"가자 {i}") + "\n" for i in range(count)), encoding="utf-8")
    return path


def parts(directory: Path) -> dict[str, set[str]]:
    return {p.stem: set(p.read_text(encoding="utf-8").splitlines()) for p in directory.glob("*.jsonl")}


def test_init_splits_each_distinct_row_once_and_a_file_that_grows_keeps_its_split(toy: Path, tmp_path: Path) -> None:
    for count in (200, 300):
        data = many(toy, tmp_path / "calls.jsonl", count)
        write_recipe(tmp_path / str(count), [data, data], toy / "tools.json")
    small, large = parts(tmp_path / "200"), parts(tmp_path / "300")
    assert set(small) == {"train", "dev", "test"}
    assert sum(map(len, small.values())) == len(set.union(*small.values())) == 200
    assert all(small[k] <= large[k] for k in small)
    assert 5 < len(small["test"]) < 40


@pytest.mark.parametrize("name", ["mine", "2024", "a: b", "yes", "내것"])
def test_the_recipe_that_init_writes_is_valid_whatever_its_directory_is_called(
    name: str, toy: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / name, [many(toy, tmp_path / "calls.jsonl", 200)], toy / "tools.json")
    recipe = load(path)
    assert recipe.name == name
    assert Path(recipe.data.train or "").exists()


def test_init_refuses_what_it_cannot_split_and_writes_nothing(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    with pytest.raises(GoriError, match=r"--data needs --tools FILE"):
        write_recipe(out, [toy / "train.jsonl"], None)
    with pytest.raises(GoriError, match="3 rows are too few"):
        write_recipe(out, [many(toy, tmp_path / "calls.jsonl", 3)], toy / "tools.json")
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(GoriError, match="is not empty: name a new directory"):
        write_recipe(out, [], None)
