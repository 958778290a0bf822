"""Answers of which only some functions may be called, one has to be, or at most so many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gori.calls import parse, read_tools
from gori.grammar import compile_grammar, load_grammar
from gori.runtime.constrain import Constraint, PromptError, Vocabulary, choose_allowed
from gori.tokenizer import Tokenizer, eos_ids

SAID = "서울역 가자"


@pytest.fixture(scope="module")
def tokenizer(toy_tokenizer: Path) -> Tokenizer:
    return Tokenizer.load(toy_tokenizer)


@pytest.fixture(scope="module")
def vocabulary(toy_tokenizer: Path, tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(load_grammar(toy_tokenizer), tokenizer.pieces)


def walk(constraint: Constraint, tokenizer: Tokenizer, seed: int) -> str:
    """An answer of random tokens among those that are allowed."""
    rng, ids = np.random.default_rng(seed), []
    while not constraint.done:
        logits = rng.normal(size=tokenizer.vocab_size).astype(np.float32)
        ids.append(choose_allowed(logits, constraint, lambda x: int(x.argmax())))
        constraint.advance(ids[-1])
    return tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("seed", range(12))
def test_a_random_answer_calls_only_what_it_may(
    seed: int, vocabulary: Vocabulary, tokenizer: Tokenizer, toy: Path
) -> None:
    functions = read_tools(toy / "tools.json")
    names = list(functions)
    for only in ({0}, {1, 2}, set(range(len(names)))):
        for must_call in (False, True):
            for most_calls in (1, 2):
                constraint = Constraint(vocabulary, SAID, 40, only, must_call, most_calls)
                calls = parse(walk(constraint, tokenizer, seed), functions)
                assert {c.name for c in calls} <= {names[i] for i in only}
                assert bool(calls) or not must_call
                assert len(calls) <= most_calls


def test_where_nothing_may_be_called_none_is_the_only_answer(vocabulary: Vocabulary) -> None:
    constraint = Constraint(vocabulary, SAID, 40, only=())
    assert constraint.forced() == vocabulary.none


def test_all_functions_are_allowed_where_none_are_named(vocabulary: Vocabulary) -> None:
    assert Constraint(vocabulary, SAID, 40).allowed()[0] == [
        vocabulary.none,
        *(row[0] for row in vocabulary.functions),
    ]


@pytest.mark.parametrize("budget", [2, 3, 4, 5, 6])
def test_a_call_that_has_to_be_fits_its_budget_or_is_refused(
    budget: int, tokenizer: Tokenizer, toy_tokenizer: Path
) -> None:
    functions = read_tools(toy_tokenizer / "tools.json")
    functions["navigate"] = replace(functions["navigate"], required=("place",))
    vocabulary = Vocabulary(compile_grammar(functions, tokenizer, eos_ids(toy_tokenizer)), tokenizer.pieces)
    at = list(functions).index("navigate")
    if budget < 4:  # the function, its argument, a word and the end mark
        with pytest.raises(PromptError, match="has to be a call, but the shortest needs 4: allow more"):
            Constraint(vocabulary, SAID, budget, {at}, must_call=True)
    else:
        answer = walk(Constraint(vocabulary, SAID, budget, {at}, must_call=True), tokenizer, 1)
        assert parse(answer, functions)[0].name == "navigate"
    with pytest.raises(PromptError, match="has to be a call, but none can be made"):
        Constraint(vocabulary, SAID, budget, only=(), must_call=True)
