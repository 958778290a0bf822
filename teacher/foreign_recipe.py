"""What a recipe can ask of its teacher, refused before any work is done.

Knows the recipe and nothing of how its stages work.
"""

from __future__ import annotations

from pathlib import Path

from gori.artifact import content_hash
from gori.calls import ASSISTANT, END, PAD, USER
from gori.errors import GoriError
from gori.recipe import Recipe
from gori.teacher.cache_read import CachedRows
from gori.tokenizer import TEMPLATE, Tokenizer

TEACHER = "teacher.json"
"""What tells an imported teacher's folder from a checkpoint."""


def is_imported(directory: Path) -> bool:
    return (Path(directory) / TEACHER).exists()


def speaks_gori(directory: Path) -> bool:
    """Whether a folder's tokenizer has the marks of gori's own rows."""
    if not (directory / "tokenizer.json").exists():
        return False
    tokenizer = Tokenizer.load(directory)
    return all(tokenizer.has(mark) for mark in (USER, ASSISTANT, END, PAD))


def check_teacher(r: Recipe) -> None:
    """GoriError where the teacher, its cache and the student's tokenizer do not go together."""
    finished = r.cache.path if r.cache else None
    if finished:
        _check_finished(r, finished)
    if r.distill.tokenizers and not r.cache:
        raise GoriError(f"distill.tokenizers {r.distill.tokenizers} works through a cache: add a section `cache: {{}}`")
    if not r.teacher.path or not is_imported(Path(r.teacher.path)):
        if r.distill.tokenizers and not finished:
            raise GoriError(
                f"distill.tokenizers {r.distill.tokenizers} is for an imported teacher with another tokenizer, and "
                "this one has the student's: leave it out"
            )
        return
    _check_imported(r, Path(r.teacher.path))


def _check_finished(r: Recipe, cache: str) -> None:
    """What a finished cache fixes is not asked for otherwise beside it."""
    assert r.cache
    rows, train = CachedRows(Path(cache)), r.distill.train
    if more := sorted(r.cache.model_fields_set - {"path"}):
        raise GoriError(
            f"cache.{more[0]} is for a cache that is made, and cache.path names {cache}: leave out one of them"
        )
    asked = {f"distill.train.{k}": getattr(train, k) for k in train.model_fields_set & {"swap_values", "invent_values"}}
    if r.distill.tokenizers:
        asked["distill.tokenizers"] = r.distill.tokenizers
    for key, value in asked.items():
        made = rows.setting(key.rpartition(".")[2])
        if value != made:
            raise GoriError(f"{key} is {value}, and the cache {cache} was made with {made}: leave it out, or set it so")
    taking = next((k for k in ("init", "control") if getattr(r.distill, k) == "teacher"), None)
    if taking and not r.teacher.path:
        raise GoriError(
            f"distill.{taking} teacher takes a teacher's weights, which the cache {cache} lacks: name its folder as "
            f"teacher.path, or set distill.{taking} to random"
        )
    teacher = content_hash(Path(r.teacher.path)) if r.teacher.path else None
    rows.check(teacher=teacher, temperature=r.distill.temperature, max_position=r.student.max_position)


def _check_imported(r: Recipe, teacher: Path) -> None:
    if not r.cache:
        raise GoriError(f"teacher {teacher} is imported, a student learns from its cache: add a section `cache: {{}}`")
    for key in ("init", "control"):
        if getattr(r.distill, key) == "teacher":
            raise GoriError(
                f"distill.{key} teacher takes weights of gori's own decoder, and {teacher} is an imported teacher: use "
                f"distill.{key} random, or name its checkpoint folder as teacher.path"
            )
    own = speaks_gori(teacher)
    if own and r.distill.tokenizers:
        raise GoriError(f"teacher {teacher} has the tokenizer that the student takes: leave out distill.tokenizers")
    if not own and not r.distill.tokenizers and not r.cache.path:
        raise GoriError(
            f"teacher {teacher} has another tokenizer than the student: set distill.tokenizers to align (its "
            "distributions, carried over by bytes) or to sequence (answers that it writes)"
        )
    template = teacher / TEMPLATE
    if not own and not (template.exists() and template.read_text(encoding="utf-8").strip()):
        raise GoriError(f"teacher {teacher} has no chat template: put {TEMPLATE} into its folder and import it again")
