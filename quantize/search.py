"""In which order a sweep tries candidates: all of a grid, or those that Optuna proposes from what it has seen.

A search is a generator: it yields candidates that may be measured at once and is sent their rows. It depends on the
seed and on those rows alone, so replaying finished rows leads to the same candidates: nothing of Optuna's is kept.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from gori.errors import GoriError
from gori.quantize.budget import Budget
from gori.quantize.space import Candidate

Row = Mapping[str, Any]
Search = Generator[list[Candidate], list[Row], None]

GENERATION = 8
"""Candidates that Optuna proposes before it hears of any of them, whatever the number of workers: the same trials
on any machine."""
OBJECTIVES = ("size_bytes", "calls", "kl_mean")
"""What Optuna looks for: small files that keep calls, with little KL. Speeds are measured at the end and steer nothing:
they are not the same twice."""
SAMPLERS = ("tpe", "nsga")
STALE = 200
"""Proposals in a row that were all tried before, after which the remaining candidates are tried in order."""


def grid(candidates: Sequence[Candidate]) -> Search:
    """All of them, in one generation."""
    yield list(candidates)


def optuna(candidates: Sequence[Candidate], trials: int, seed: int, budget: Budget | None, sampler: str) -> Search:
    """`trials` different ones among the candidates, by Optuna's multi-objective TPE (Ozaki et al., GECCO 2020) or
    NSGA-II (Deb et al. 2002), the budget's bounds as constraints."""
    if trials >= len(candidates):
        yield list(candidates)
        return
    study = _study(seed, sampler)
    known: dict[Candidate, Row] = {}
    while len(known) < trials:
        asked = _generation(study, candidates, known, min(GENERATION, trials - len(known)))
        rows = yield [c for c, _ in asked]
        for (c, trial), row in zip(asked, rows, strict=True):
            known[c] = row
            _tell(study, trial, row, budget)


def _study(seed: int, sampler: str) -> Any:
    try:
        import optuna as library
    except ImportError as e:
        raise GoriError("--search optuna needs optuna: pip install 'gori[sweep]'") from e
    logging.getLogger("optuna").setLevel(logging.WARNING)
    if sampler == "nsga":
        chosen: Any = library.samplers.NSGAIISampler(seed=seed, population_size=GENERATION)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)  # multivariate, group
            # of 240 candidates 60 trials found twice the front that random ones find, and without these hardly more
            chosen = library.samplers.TPESampler(seed=seed, n_startup_trials=GENERATION, multivariate=True, group=True)
    directions: list[Any] = ["minimize"] * len(OBJECTIVES)
    return library.create_study(directions=directions, sampler=chosen)


def _generation(
    study: Any, candidates: Sequence[Candidate], known: dict[Candidate, Row], count: int
) -> list[tuple[Candidate, Any]]:
    """`count` candidates that were not tried, each with its trial; a proposal of one that was is taken back."""
    asked: dict[Candidate, Any] = {}
    stale = 0
    while len(asked) < count and stale < STALE:
        trial = study.ask()
        c = _suggest(trial, candidates)
        if c in known or c in asked:
            stale += 1
            _tell(study, trial, None, None)
        else:
            asked[c], stale = trial, 0
    rest = [c for c in candidates if c not in known and c not in asked]
    return [*asked.items(), *((c, None) for c in rest[: count - len(asked)])]


def _suggest(trial: Any, candidates: Sequence[Candidate]) -> Candidate:
    """Choose part by part, each among what is left: every proposal can be made. A part's name holds the earlier choice
    where that decides what there is to choose from."""
    left, before = list(candidates), ""
    for part in ("target", "student", "scheme", "bits_per_weight", "embedding", "method"):
        every, some = dict.fromkeys(getattr(c, part) for c in candidates), {getattr(c, part) for c in left}
        choices = [v for v in every if v in some]
        if len(choices) > 1:
            name = part if len(choices) == len(every) else f"{part} of {before}"
            picked = choices[trial.suggest_categorical(name, list(range(len(choices))))]
        else:
            picked = choices[0]
        left = [c for c in left if getattr(c, part) == picked]
        before = f"{before}/{picked}"
    return left[0]


def _tell(study: Any, trial: Any, row: Row | None, budget: Budget | None) -> None:
    """Report a trial: its figures, or that there are none (the candidate failed, or was proposed before)."""
    from optuna.trial import TrialState

    if trial is None:
        return
    values = objectives(row) if row is not None and row["state"] == "done" else None
    if values is None:
        study.tell(trial, state=TrialState.FAIL)
        return
    for name, miss in misses(row, budget).items() if row is not None and budget is not None else ():
        trial.set_constraint(name, miss)
    study.tell(trial, values)


def objectives(row: Row) -> list[float] | None:
    """A row's figures as Optuna minimises them; None where one was not measured. Where the float student is never exact
    there are no calls to keep, and none decide."""
    size_bytes, calls, kl_mean = (row["metrics"].get(name) for name in OBJECTIVES)
    if size_bytes is None or kl_mean is None:
        return None
    return [float(size_bytes), -float(calls or 0.0), float(kl_mean)]


def misses(row: Row, budget: Budget) -> dict[str, float]:
    """How far each bound is missed, of those that are known before speeds are measured; 0 is met."""
    return {v["name"]: v["miss"] for v in budget.verdict(row["metrics"]) if v["miss"] is not None}
