"""What a student can be asked for, refused before anything is trained. Knows the recipe, and reads no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gori import checkpoint
from gori.distill.divergences import STATES, parse
from gori.distill.initialise import check_shapes
from gori.distill.losses import check_sparse, check_terms
from gori.distill.objective import has_divergence
from gori.errors import GoriError
from gori.induction import check_room
from gori.model import ModelConfig
from gori.recipe import Distill, Recipe, Step, Student
from gori.teacher.stage import shape_config

TAKING = ("layers", "depth", "width", "experts", "fit")
"""Settings that say how first weights are taken from a teacher."""


def check_recipe(r: Recipe, student: bool = True) -> None:
    """GoriError where the student, the way to it and its teacher do not go together; shapes only if a `student` is made
    in this run."""
    check(r.distill, r.student, r.cache is not None)
    for f in r.distill.unlabelled.files if r.distill.unlabelled else ():
        if not Path(f).is_file():
            raise GoriError(f"distill.unlabelled.files: {f} does not exist: name files of requests")
    chain = _chain(r) if student else []
    for smaller, larger in zip(chain[1:], chain, strict=False):
        layers = r.distill.layers if len(chain) == 2 else None
        check_shapes(smaller, larger, layers)


def on_the_way(student: Student, step: Step) -> Student:
    """The larger student of a step of `progressive`."""
    return student.model_copy(update=step.model_dump(exclude={"steps"}))


def _chain(r: Recipe) -> list[ModelConfig]:
    """Shapes from the one that weights are taken of to the student's; the student's alone with random weights."""
    vocabulary = 1 << 16  # one tokenizer serves them all
    way = [on_the_way(r.student, step) for step in r.distill.progressive]
    students = [shape_config(s, s.kind, vocabulary) for s in (*way, r.student)]
    if r.distill.init == "random":
        if r.student.induction:
            check_room(students[0])
        return students
    t = r.teacher
    if t.path is None:
        experts = {"experts": t.experts, "experts_per_token": t.experts_per_token}
        source = shape_config(t, "qwen3_moe", vocabulary, **experts)
    elif (Path(t.path) / "config.json").exists():
        source = checkpoint.read_config(Path(t.path))
    else:
        return students
    # a student turns queries and keys, and reads tokens, as what it is taken from
    same = {"vocab_size": source.vocab_size, "rope_theta": source.rope_theta, "rope_scaling": source.rope_scaling}
    return [source, *(replace(s, **same) for s in students)]


def check(distill: Distill, student: Student, cached: bool) -> None:
    """Refuse what does not go together, before anything is trained."""
    check_terms(distill.losses)
    inside = [name for name, w in distill.losses.items() if w and parse(name)[0] in STATES]
    taken = distill.init == "teacher" or distill.progressive
    if not taken and (named := [k for k in TAKING if getattr(distill, k) != _default(k)]):
        raise GoriError(
            f"distill.{named[0]} says how weights are taken from the teacher, and distill.init is random: leave one out"
        )
    if distill.pairs and not inside:
        raise GoriError("distill.pairs are compared by hidden, cosine and attention: give one of them a weight")
    if cached and inside:
        raise GoriError(f"loss term {inside[0]} needs the teacher itself: leave it out, or leave the cache out")
    if cached and (distill.on_policy or distill.unlabelled or distill.labelled_rows):
        what = next(k for k in ("on_policy", "unlabelled", "labelled_rows") if getattr(distill, k))
        raise GoriError(f"distill.{what} has rows that the cache lacks: leave one of the two out")
    if cached:
        check_sparse(distill.losses)
    if distill.on_policy and distill.on_policy.start >= distill.teacher_until:
        raise GoriError(
            f"distill.on_policy starts at {distill.on_policy.start} of the steps, and the teacher is heard until "
            f"distill.teacher_until {distill.teacher_until}: lower the one or raise the other"
        )
    if distill.on_policy and not has_divergence(distill.losses):
        raise GoriError(
            "distill.on_policy compares the student's own answers with the teacher: give a divergence a weight"
        )
    if distill.unlabelled and distill.unlabelled.answers == "student" and not distill.on_policy:
        raise GoriError("distill.unlabelled.answers student needs on-policy steps: add distill.on_policy")
    if distill.width == "pca" and student.tied and distill.init == "teacher":
        raise GoriError(
            "distill.width pca needs a head of its own: set student.tied to false, or take width importance"
        )
    if distill.progressive and distill.layers:
        raise GoriError("distill.layers names the teacher's, and the last of several students takes another student's")


def _default(name: str) -> object:
    return Distill.model_fields[name].get_default(call_default_factory=True)
