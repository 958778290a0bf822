"""`gori eval`: figures counted by hand, logits of whole batches against one token after the other, gates and errors."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from decoders import random_decoder
from gori import checkpoint, cli, evaluate
from gori.data import Conversation, prompt_ids
from gori.errors import GateError, GoriError
from gori.model import Decoder, ModelConfig
from gori.runtime import eval_report, forced
from gori.runtime.evaluation import compare, evaluate_model, functions_of, read_splits
from gori.runtime.session import open_session
from gori.statistics import kept_interval, mcnemar, pair
from gori.summary import fidelity
from gori.tokenizer import Tokenizer, copy_files

CFG = ModelConfig(
    kind="qwen3", vocab_size=360, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48,
    max_position=64, init_std=0.2,
)  # fmt: skip
Outcome = tuple[int, str, str]


@pytest.fixture
def gori(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as done:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


def written(model: Decoder, tokenizer: Path, out: Path) -> Path:
    out.mkdir()
    checkpoint.save(model, out)
    copy_files(tokenizer, out)
    return out


@pytest.fixture(scope="module")
def models(toy_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random checkpoint and the same with a little noise on its weights."""
    root = tmp_path_factory.mktemp("models")
    reference = written(random_decoder(CFG), toy_tokenizer, root / "reference")
    noisy, noise = random_decoder(CFG), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in noisy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=noise))
    return written(noisy, toy_tokenizer, root / "noisy"), reference


@pytest.fixture
def rows(models: tuple[Path, Path], toy: Path) -> list[Conversation]:
    return read_splits([toy / "train.jsonl"], functions_of(models[1]))["train"]


answered = st.lists(st.tuples(st.sampled_from(["ko", "en"]), st.booleans(), st.booleans()), min_size=1, max_size=60)


def as_answers(rows: list[tuple[str, bool, bool]], which: int) -> list[dict[str, Any]]:
    return [{"split": "s", "utterance": str(i), "language": r[0], "exact": r[which]} for i, r in enumerate(rows)]


@settings(max_examples=40)
@given(answered)
def test_fidelity_counts_rows_of_each_language_and_the_worse_one_decides(rows: list[tuple[str, bool, bool]]) -> None:
    found = fidelity(as_answers(rows, 1), as_answers(rows, 2))
    assert found["exact"] == sum(a for _, a, _ in rows) / len(rows)
    assert found["lost"] == sum(b and not a for _, a, b in rows)
    assert found["gained"] == sum(a and not b for _, a, b in rows)
    assert found["mcnemar_p"] == mcnemar(found["lost"], found["gained"])
    kept = {}
    for k in {language for language, _, _ in rows}:
        a, b = [x for language, x, _ in rows if language == k], [x for language, _, x in rows if language == k]
        assert found["exact_by_language"][k] == sum(a) / len(a)
        interval = kept_interval(pair(a, b))
        assert found["kept_by_language_ci"][k] == (None if interval is None else list(interval))
        if any(b):
            kept[k] = sum(a) / sum(b)
    assert {k: v for k, v in found["kept_by_language"].items() if v is not None} == pytest.approx(kept)
    assert found["calls"] == (pytest.approx(min(kept.values())) if kept else None)
    if kept:
        assert found["calls_ci"][0] <= found["calls"] <= found["calls_ci"][1]
        assert kept[found["calls_language"]] == pytest.approx(found["calls"])


def test_answers_to_other_rows_are_refused() -> None:
    with pytest.raises(GoriError, match="answered different rows"):
        fidelity(as_answers([("ko", True, True)] * 2, 1), as_answers([("ko", True, True)] * 3, 1))


def expected(folders: tuple[Path, Path], rows: list[Conversation]) -> tuple[list[float], list[float], list[bool]]:
    """KL, change of -log p and equal top-1 of each answer token, one forward pass of one prefix each, in float64."""
    mine, theirs = (checkpoint.load(f).double() for f in folders)
    tokenizer = Tokenizer.load(folders[0])
    kl, change, same = [], [], []
    for c in rows:
        prompt, r = prompt_ids(c, tokenizer), forced.as_row(c, tokenizer)
        for end in range(len(prompt), len(r.ids)):
            with torch.no_grad():
                q, p = (m(torch.tensor([r.ids[:end]]))[0, -1].log_softmax(-1) for m in (mine, theirs))
            kl.append(float((p.exp() * (p - q)).sum()))
            change.append(float(p[r.ids[end]] - q[r.ids[end]]))
            same.append(bool(p.argmax() == q.argmax()))
    return kl, change, same


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_the_comparison_is_that_of_each_prefix_alone(
    batch_tokens: int, models: tuple[Path, Path], rows: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forced, "BATCH_TOKENS", batch_tokens)
    some = rows[::3]
    kl, change, same = expected(models, some)
    found = compare(*models, some)
    assert (found["rows"], found["answer_tokens"]) == (len(some), len(kl))
    # float32 against float64
    assert found["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["kl_max"] == pytest.approx(max(kl), rel=1e-3)
    assert found["top1"] == pytest.approx(np.mean(same))
    assert found["perplexity_ratio"] == pytest.approx(math.exp(np.mean(change)), rel=1e-5)
    assert found["kl_mean"] > 0.001


def test_batches_and_a_session_give_the_same_logits_in_the_rows_order(
    models: tuple[Path, Path], rows: list[Conversation]
) -> None:
    tokenizer = Tokenizer.load(models[0])
    some = [forced.as_row(c, tokenizer) for c in rows]
    together = list(forced.eager_answers(checkpoint.load(models[0]))(some))
    alone = list(forced.engine_answers(open_session(models[0]))(some))
    for r, a, b in zip(some, together, alone, strict=True):
        assert a.shape == (len(r.answer), CFG.vocab_size)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_each_token_is_told_apart_by_its_row(models: tuple[Path, Path], rows: list[Conversation]) -> None:
    tokenizer = Tokenizer.load(models[0])
    some = [forced.as_row(c, tokenizer) for c in rows]
    mine, theirs = (forced.eager_answers(checkpoint.load(m)) for m in models)
    found = forced.compare(mine, theirs, some)
    for i in (0, len(some) // 2, len(some) - 1):
        one = forced.compare(mine, theirs, some[i : i + 1])
        assert (found.row_N == i).sum() == len(some[i].answer)
        np.testing.assert_allclose(found.nll_N[found.row_N == i], one.nll_N, atol=1e-5)


@given(st.integers(0, 99))
def test_divergence_is_the_kl_of_the_two_softmaxes(seed: int) -> None:
    a, b = np.random.default_rng(seed).normal(size=(2, 4, 7)).astype(np.float32) * 3
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (b, a))
    wanted = [3, 0, 6, 2]
    row = forced.Row([1, *wanted], 1)
    found = forced.compare(lambda _: iter([a]), lambda _: iter([b]), [row])
    np.testing.assert_allclose(found.kl_N, (p * np.log(p / q)).sum(-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.nll_N, -np.log(q[range(4), wanted]))
    np.testing.assert_allclose(found.nll_reference_N, -np.log(p[range(4), wanted]))
    np.testing.assert_allclose(np.exp(evaluate.log_softmax(a)).sum(-1), 1)
    assert (forced.compare(lambda _: iter([a]), lambda _: iter([a]), [row]).kl_N == 0).all()


def test_a_model_of_another_vocabulary_or_without_numbers_is_refused() -> None:
    row, a = forced.Row([1, 2], 1), np.zeros((1, 7), np.float32)
    with pytest.raises(GoriError, match="vocabulary of 7 and the reference one of 8"):
        forced.compare(lambda _: iter([a]), lambda _: iter([np.zeros((1, 8), np.float32)]), [row])
    with pytest.raises(GoriError, match="the reference gives logits that are not numbers"):
        forced.compare(lambda _: iter([a]), lambda _: iter([a * np.nan]), [row])
    with pytest.raises(GoriError, match="a row of 65 tokens exceeds the context of 64"):
        next(forced.eager_answers(random_decoder(CFG))([forced.Row([0] * 65, 1)]))


def test_rows_are_drawn_alike_each_time_and_fewer_are_some_of_more(models: tuple[Path, Path], toy: Path) -> None:
    functions, path = functions_of(models[0]), toy / "train.jsonl"
    few, more, every = (read_splits([path], functions, n)["train"] for n in (5, 12, 10**6))
    assert (len(few), len(more)) == (5, 12)
    assert [c for c in every if c in more] == more
    assert [c for c in more if c in few] == few
    assert every == read_splits([path], functions)["train"]


def test_one_file_gives_one_entry_and_several_give_each_and_all(
    models: tuple[Path, Path], toy: Path, gori: Callable[..., Outcome]
) -> None:
    mine, theirs = models
    single = gori("eval", mine, "--data", toy / "test.jsonl", "--json")
    body = json.loads(single[1])
    assert set(body) == {"exact", "n", "ko", "en", "exact_ci", "ko_ci", "en_ci"}
    code, out, err = gori(
        "eval", mine, "--data", toy / "test.jsonl", "--data", toy / "dev.jsonl", "--against", theirs, "--json"
    )
    assert code == 0, err
    both = json.loads(out)
    assert {k: both["splits"]["test"][k] for k in body} == body
    assert both["n"] == sum(s["n"] for s in both["splits"].values()) == both["rows"]
    assert both["kl_mean_ci"][0] < both["kl_mean"] < both["kl_mean_ci"][1] < both["kl_max"]
    assert both["reference"]["n"] == both["n"]
    functions = functions_of(mine)
    tests = read_splits([toy / "test.jsonl", toy / "dev.jsonl"], functions)
    answers = [evaluate_model(m, tests, functions, "") for m in models]
    wanted = eval_report.body(answers[0], answers[1], functions, {})
    assert json.loads(json.dumps(wanted)) == {k: both[k] for k in wanted}


def test_an_artifact_is_compared_by_its_engine_and_may_be_named_by_its_file(
    artifact: Path, toy: Path, gori: Callable[..., Outcome]
) -> None:
    source = artifact.parent / "student"
    found = []
    for path in (artifact, artifact / "model.gguf"):
        code, out, err = gori("eval", path, "--data", toy / "test.jsonl", "--against", source, "--json")
        assert code == 0, err
        found.append(json.loads(out))
    assert found[0] == found[1]
    # the same integers in two engines: float32 summed in another order, and llama.cpp's float16 cache
    assert 0 < found[0]["kl_mean"] < 1e-3


FIGURES: dict[str, Any] = {
    "exact": 0.9,
    "exact_ci": [0.85, 0.94],
    "calls": 0.98,
    "calls_ci": [0.95, 1.01],
    "kept_by_language": {"ko": 0.98, "en": None},
    "kept_by_language_ci": {"ko": [0.95, 1.01], "en": None},
    "splits": {"test": {"ko": 0.8, "ko_ci": [0.7, 0.9]}},
    "lost": 3,
    "reference": {"exact": 0.92},
}


@pytest.mark.parametrize(
    ("gate", "value", "met", "decided"),
    [
        ("calls >= 0.94", 0.98, True, True),
        ("calls>=0.97", 0.98, True, False),
        ("calls >= 0.99", 0.98, False, False),
        ("calls > 1.01", 0.98, False, False),
        ("calls >= 1.02", 0.98, False, True),
        ("exact < .95", 0.9, True, True),
        ("kept_by_language.ko >= 0.96", 0.98, True, False),
        ("kept_by_language.en >= 0.96", None, False, False),
        ("splits.test.ko >= 0.6", 0.8, True, True),
        ("lost <= 2", 3, False, None),
        ("exact / reference.exact >= 0.9", 0.9 / 0.92, True, None),
    ],
)
def test_a_gate_is_the_figures_verdict_and_its_interval_says_whether_it_is_decided(
    gate: str, value: float | None, met: bool, decided: bool | None
) -> None:
    (verdict,) = eval_report.judge([eval_report.read_gate(gate)], FIGURES)
    assert (verdict["value"], verdict["met"], verdict["decided"]) == (value, met, decided)
    (line,) = eval_report.gate_lines([verdict], 300)
    assert ("not decided by 300 rows" in line) == (decided is False and value is not None)
    if met:
        eval_report.refuse_missed([verdict])
    else:
        with pytest.raises(GateError, match="1 of 1 gates missed"):
            eval_report.refuse_missed([verdict])


@pytest.mark.parametrize(
    ("kept", "interval", "word"),
    [(0.98, (0.95, 1.01), "within noise"), (0.9, (0.85, 0.95), "worse"), (1.1, (1.02, 1.2), "better")],
)
def test_a_difference_is_named_noise_where_its_interval_holds_no_change(
    kept: float, interval: tuple[float, float], word: str
) -> None:
    rows = [(k, True, True) for k in ("ko", "en") for _ in range(20)]
    zeros = eval_report.token_fidelity([0.1] * 2, [0.0] * 2, [0.0] * 2, [True] * 2, [0, 1])
    answers = [{**a, "answer": ""} for a in as_answers(rows, 1)]
    figures = eval_report.body(answers, answers, {}, zeros)
    figures |= {"kept": kept, "kept_ci": list(interval)}
    said = io.StringIO()
    Console(width=200, file=said).print(eval_report.table(figures))
    (line,) = [t for t in said.getvalue().splitlines() if t.startswith("exact ") and "of 40 rows" in t]
    assert line.rstrip().endswith(f": {word}")


def test_gates_are_judged_after_everything_is_printed(
    models: tuple[Path, Path], toy: Path, gori: Callable[..., Outcome]
) -> None:
    mine, theirs = models
    command = ["eval", mine, "--data", toy / "test.jsonl", "--against", theirs, "--gate", "kl_mean <= 1e-9"]
    code, out, err = gori(*command, "--gate", "exact >= 0", "--json")
    assert code == 3
    assert "1 of 2 gates missed: kl_mean is " in err
    gates = json.loads(out)["gates"]
    assert [(g["name"], g["met"], g["decided"]) for g in gates] == [
        ("kl_mean", False, True),
        ("exact", True, False),
    ]
    code, out, _ = gori(*command)
    assert code == 3
    assert "gate kl_mean <= 1e-09: " in out
    assert "perplexity" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "calls >= 0.9"], "gate 'calls' compares with a reference: give one with --against"),
        (["--gate", "exat >= 0.9"], "did you mean 'exact'"),
        (["--gate", "exact = 0.9"], "write a comparison"),
        (["--gate", "exact >= much"], "write a comparison"),
        (["--gate", ">= 0.9"], "names no figure"),
        (["--gate", "exact_ci >= 0.9"], "does not lead to a number"),
        (["--gate", "splits.test.exact >= 0.9"], "no 'splits'"),
        (["--data", "TOY/../{0}/test.jsonl"], "two data files are named test"),
        (["--data", "TOY/none.jsonl"], "none.jsonl does not exist"),
        (["--against", "TOY"], "tokenizer.json does not exist"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_computed(
    arguments: list[str], message: str, models: tuple[Path, Path], toy: Path, gori: Callable[..., Outcome]
) -> None:
    given = [a.replace("TOY", str(toy)).replace("{0}", toy.name) for a in arguments]
    code, out, err = gori("eval", models[0], "--data", toy / "test.jsonl", *given)
    assert (code, out) == (1, ""), err
    assert message in err
    assert "Traceback" not in err
    assert "evaluate " not in err


def test_a_reference_with_other_tokens_is_refused(
    models: tuple[Path, Path], toy: Path, toy_corpus: Any, tmp_path: Path, gori: Callable[..., Outcome]
) -> None:
    from gori import corpus, tokenizer

    other = tmp_path / "tokenizer"
    other.mkdir()
    tokenizer.train(corpus.training_texts(toy_corpus.train), toy_corpus.functions, 320).save(other)
    (other / "tools.json").write_bytes((toy / "tools.json").read_bytes())
    reference = written(random_decoder(CFG), other, tmp_path / "other")
    code, out, err = gori("eval", models[0], "--data", toy / "test.jsonl", "--against", reference)
    assert (code, out) == (1, "")
    assert "into different tokens: compare models of one tokenizer" in err
