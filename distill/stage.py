"""The distill stage: teacher folder + recipe → a dense student, and the control run that shows what a teacher gave.

Students on the way and a teacher's answers to unlabelled requests stand beside OUT as directories of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gori import checkpoint
from gori.artifact import Manifest, ancestry, content_hash, make, read_manifest
from gori.calls import END, PAD
from gori.corpus import Corpus, hashes
from gori.data import Conversation, Example, encode, prompt_ids
from gori.distill import unlabelled
from gori.distill.basis import basis_of, observe
from gori.distill.checks import check, on_the_way
from gori.distill.divergences import STATES, parse
from gori.distill.initialise import Taken, from_teacher
from gori.distill.objective import (
    Draws,
    Inside,
    cached_loss,
    divergence_loss,
    needs_teacher,
)
from gori.distill.states import check_pairs, default_pairs
from gori.errors import GoriError
from gori.model import Decoder, parameter_count
from gori.ranks import current
from gori.recipe import Distill, Student
from gori.teacher.cache_read import CachedRows
from gori.teacher.sharding import WHOLE_BYTES, can_be_whole
from gori.teacher.stage import answer_loss, device, fresh, run_loop, shape_config, training_state, write_trained
from gori.teacher.train import Loss
from gori.tokenizer import Tokenizer

CALIBRATION_ROWS = 256
TOKENS_A_NEURON = 8
"""Calibration tokens for each neuron of the student's MLP, at least, where there are as many: least squares on fewer
learn their accidents."""


@dataclass(frozen=True)
class Places:
    """What a student is made of and where it goes."""

    teacher: Path
    corpus: Corpus
    tokenizer: Path
    seed: int
    out: Path
    cache: Path | None = None
    """A cached teacher, which is then compared with in the teacher's place."""
    source: Path | None = None
    """A larger student whose weights are taken in place of the teacher's."""
    answers: Path | None = None
    """The teacher's answers to unlabelled requests."""


@dataclass(frozen=True)
class Sample:
    """Calibration rows, one a tensor `[1, T]`."""

    ids: list[Tensor]
    """int64"""
    answers: list[Tensor]
    """bool: the tokens of the assistant's answers."""


def load_teacher(directory: Path, tokenizer: Tokenizer) -> Decoder:
    """A teacher folder whose tokenizer is the student's."""
    teacher = checkpoint.load(directory)
    if (directory / "tokenizer.json").exists() and teacher.cfg.vocab_size != tokenizer.vocab_size:
        raise GoriError(
            f"teacher {directory} has a vocabulary of {teacher.cfg.vocab_size}, the student's tokenizer "
            f"{tokenizer.vocab_size}: distill with the teacher's own tokenizer"
        )
    return teacher.eval()


def train_student(
    student: Student,
    distill: Distill,
    teacher_dir: Path,
    corpus: Corpus,
    tokenizer_dir: Path,
    seed: int,
    out: Path,
    cache_dir: Path | None = None,
) -> bool:
    """Distill a student into `out`; returns whether it ran. With a cache the teacher is read for first weights only.

    Each student on the way is `out`-1, `out`-2, …, the teacher's answers to unlabelled requests `out`-answers.
    """
    check(distill, student, cache_dir is not None)
    places = Places(teacher_dir, corpus, tokenizer_dir, seed, out, cache_dir)
    if distill.unlabelled and distill.unlabelled.answers == "teacher":
        places = replace(places, answers=out.with_name(f"{out.name}-answers"))
        assert places.answers is not None
        unlabelled.write_answers(distill.unlabelled, teacher_dir, tokenizer_dir, corpus, seed, places.answers)
    for i, step in enumerate(distill.progressive, 1):
        way = replace(places, out=out.with_name(f"{out.name}-{i}"))
        larger = on_the_way(student, step)
        update = {"train": distill.train.model_copy(update={"steps": step.steps}), "pairs": None, "progressive": []}
        _train("distill", larger, _taking(distill, way).model_copy(update=update), way)
        places = replace(places, source=way.out)
    return _train("distill", student, _taking(distill, places), places)


def _taking(distill: Distill, places: Places) -> Distill:
    """With first weights from the student on the way, where there is one."""
    return distill.model_copy(update={"init": "teacher"}) if places.source else distill


def train_control(
    student: Student,
    distill: Distill,
    teacher_dir: Path,
    corpus: Corpus,
    tokenizer_dir: Path,
    seed: int,
    out: Path,
    cache_dir: Path | None = None,
) -> bool:
    """The same student, steps, batches and rates on the true answers alone, from `distill.control`'s first weights."""
    assert distill.control != "none"
    alone = {"losses": {"ce": 1.0}, "on_policy": None, "unlabelled": None, "progressive": [], "pairs": None}
    control = distill.model_copy(update={**alone, "init": distill.control})
    return _train("control", student, control, Places(teacher_dir, corpus, tokenizer_dir, seed, out, cache_dir))


def _train(stage: str, student: Student, distill: Distill, places: Places) -> bool:
    """One student; `distill.progressive` is only noted here."""
    if (distill.labelled_rows or 0) > len(places.corpus.train):
        raise GoriError(
            f"distill.labelled_rows {distill.labelled_rows} exceeds the {len(places.corpus.train)} rows of data.train"
        )
    not_read: dict[str, Any] = {"control": True, "unlabelled": {"files"}}
    if stage == "control":
        not_read |= {"temperature": True, "teacher_until": True}
    settings = {"student": student.model_dump(), **distill.model_dump(exclude=not_read)}
    cached = CachedRows(places.cache) if places.cache else None
    living = needs_teacher(distill.losses) and cached is None
    directories = {"tokenizer": places.tokenizer}
    if living or (distill.init == "teacher" and not places.source):
        directories["teacher"] = places.teacher
    if distill.init == "teacher" and places.source:
        directories["source"] = places.source
    if places.answers:
        directories["answers"] = places.answers
    inputs = {**hashes(places.corpus), **{label: content_hash(path) for label, path in directories.items()}}
    if cached:
        inputs["cache"] = cached.content
        cached.check(
            tokenizer=inputs["tokenizer"],
            teacher=inputs.get("teacher"),
            train=inputs["train"] if stage == "distill" and not places.source else None,  # said once a run
            temperature=distill.temperature,
            max_position=student.max_position,
        )
    if distill.unlabelled and not places.answers:
        inputs |= unlabelled.hashes(distill.unlabelled)
    manifest = Manifest(stage, stage, places.seed, settings, inputs)
    manifest.lineage = ancestry(directories | ({"cache": places.cache} if places.cache else {}))
    tokenizer = Tokenizer.load(places.tokenizer)

    def build(tmp: Path) -> None:
        labelled = places.corpus.train[: distill.labelled_rows]
        sample = Sample([], [])
        if {"teacher", "source"} & directories.keys():
            sample = calibration(labelled, tokenizer, student.intermediate_size)
        teacher = load_teacher(places.teacher, tokenizer) if "teacher" in directories else None
        source = load_teacher(places.source, tokenizer) if places.source else teacher
        model, taken = first_weights(student, distill, source, sample, tokenizer, places.seed)
        report = {"from": "source" if places.source else "teacher", **taken.report} if taken else {"from": "random"}
        if distill.on_policy and current().world > 1 and not can_be_whole(model):
            raise GoriError(
                f"on-policy steps under torchrun hold the student whole on every rank, and its weights exceed "
                f"{WHOLE_BYTES >> 30} GiB: distill it in one process, or without distill.on_policy"
            )
        loss = answer_loss(0.0, distill.train.compile)
        if cached and needs_teacher(distill.losses):
            until, compiled = distill.teacher_until, distill.train.compile
            loss = cached_loss(distill.losses, distill.temperature, until, tail=cached.tail, compiled=compiled)
        elif living:
            assert teacher is not None
            inside = _inside(distill, model, teacher, None if places.source else taken, sample.ids)
            loss = _living(distill, teacher.to(device()), inside, places, tokenizer, student.max_position)
        rows, more = labelled, {}
        if distill.unlabelled and places.answers:
            given = (places.answers, places.corpus, tokenizer, student.max_position)
            more_rows, too_long = unlabelled.read_answers(*given)
            rows = unlabelled.mixed(labelled, more_rows, distill.unlabelled.share)
            more["unlabelled"] = read_manifest(places.answers)["metrics"] | {
                "too_long": too_long,
                "rows": len(rows),
                "labelled": len(labelled),
            }
        if distill.progressive:
            more["progressive"] = [
                _told(places.out.with_name(f"{places.out.name}-{i + 1}")) for i in range(len(distill.progressive))
            ]
        if teacher:
            more["share_of_teacher"] = parameter_count(model) / parameter_count(teacher)
        done = run_loop(
            model.to(device()),
            replace(places.corpus, train=list(rows)),
            tokenizer,
            loss,
            distill.train,
            places.seed + 1,
            places.out,
            manifest.fingerprint,
            cached.epoch if cached and not (stage == "control" and cached.hard) else None,
        )
        write_trained(tmp, model, places.tokenizer, done, manifest, initialised=report, **more)

    return make(places.out, manifest, build, scratch=training_state(places.out), by_all=True)


def first_weights(
    student: Student,
    distill: Distill,
    source: Decoder | None,
    sample: Sample,
    tokenizer: Tokenizer,
    seed: int,
) -> tuple[Decoder, Taken | None]:
    """A student before training, and what it took where it takes weights."""
    cfg = shape_config(student, student.kind, tokenizer.vocab_size)
    if distill.init == "random":
        return fresh(cfg, student.induction, seed + 1), None
    assert source is not None
    # queries and keys are turned as the source turns its own
    cfg = replace(cfg, rope_theta=source.cfg.rope_theta, rope_scaling=source.cfg.rope_scaling)
    model = fresh(cfg, False, seed + 1)  # every weight is taken
    taken = from_teacher(
        model,
        source,
        sample.ids,
        distill.layers,
        depth=distill.depth,
        width=distill.width,
        score=distill.experts.score,
        how=distill.experts.how,
        fit=distill.fit,
        answers=sample.answers,
    )
    return model, taken


def _inside(
    distill: Distill, student: Decoder, teacher: Decoder, taken: Taken | None, sample: Sequence[Tensor]
) -> Inside | None:
    """What states are compared on: the layers and the basis that the student took, or as deep ones and the principal
    directions of the teacher's stream where widths differ."""
    if not any(w and parse(name)[0] in STATES for name, w in distill.losses.items()):
        return None
    depth, width = student.cfg.layers, student.cfg.hidden_size
    pairs: list[tuple[int, int]] = distill.pairs or default_pairs(depth, teacher.cfg.layers)
    if taken and not distill.pairs and depth > 1:
        pairs = [(i, taken.layers[i]) for i in range(1, depth)]
    check_pairs(pairs, depth, teacher.cfg.layers)
    basis = taken.basis if taken else None
    if basis is None and width < teacher.cfg.hidden_size:
        basis = basis_of(observe(teacher, sample, "pca"), width, "pca")
    if basis is None and width > teacher.cfg.hidden_size:
        raise GoriError(
            f"hidden and cosine bring the teacher's {teacher.cfg.hidden_size} dimensions to the student's {width}: "
            "take a student that is not wider, or leave them out"
        )
    return Inside(pairs, None if basis is None else basis.to(device()))


def _living(
    distill: Distill, teacher: Decoder, inside: Inside | None, places: Places, tokenizer: Tokenizer, room: int
) -> Loss:
    """The loss against a living teacher; `room` is the student's context."""
    draws = None
    if p := distill.on_policy:
        prompts = None
        if distill.unlabelled and distill.unlabelled.answers == "student":
            asked = unlabelled.prompts(distill.unlabelled, places.corpus.functions, tokenizer, room)
            prompts = [prompt_ids(c, tokenizer) for c in asked]
        draws = Draws(p.share, p.temperature, p.start, places.seed, tokenizer.id(END), tokenizer.id(PAD), prompts)
    until, compiled = distill.teacher_until, distill.train.compile
    return divergence_loss(
        teacher, distill.losses, distill.temperature, until, inside=inside, draws=draws, compiled=compiled
    )


def _told(directory: Path) -> dict[str, Any]:
    """What the last student's manifest says of one on the way."""
    m = read_manifest(directory)["metrics"]
    told = {k: m[k] for k in ("parameters", "train_seconds", "final")}
    return {"directory": directory.name, "content": content_hash(directory), **told}


def calibration(rows: Sequence[Conversation], tokenizer: Tokenizer, neurons: int) -> Sample:
    """The first training rows, enough for an MLP of as many neurons."""
    examples: list[Example] = []
    tokens = 0
    for c in rows:
        if len(examples) >= CALIBRATION_ROWS and tokens >= TOKENS_A_NEURON * neurons:
            break
        examples.append(encode(c, tokenizer))
        tokens += len(examples[-1].ids)
    return Sample([torch.tensor([e.ids]) for e in examples], [torch.tensor([e.loss]) for e in examples])
