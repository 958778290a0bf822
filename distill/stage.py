"""The distill stage: teacher folder + recipe → a dense student, and the control run that shows what a teacher gave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gori import checkpoint
from gori.artifact import Manifest, ancestry, content_hash, make
from gori.corpus import Corpus, hashes
from gori.data import encode
from gori.distill.initialise import from_teacher
from gori.distill.losses import check_terms, distillation_loss
from gori.errors import GoriError
from gori.model import Decoder, parameter_count
from gori.recipe import Distill, Student
from gori.teacher.stage import answer_loss, device, fresh, run_loop, shape_config, training_state, write_trained
from gori.teacher.train import Loss, TrainBatch
from gori.tokenizer import Tokenizer

CALIBRATION_ROWS = 256


def divergence_loss(teacher: Decoder, weights: dict[str, float], temperature: float, until: float = 1.0) -> Loss:
    """The weighted distillation terms at the answers' positions; the teacher runs without gradient.

    From the share `until` of the steps on, the true answers alone: a student that has caught up with its teacher learns
    nothing more from it (early-stopped distillation: Cho and Hariharan, arXiv 1910.01348, section 4).
    """
    teacher.requires_grad_(False)
    alone = answer_loss(0.0)
    needs_teacher = any(w for k, w in weights.items() if k != "ce")

    def loss(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        if batch.progress >= until:
            return alone(model, batch)
        hidden = batch.answer_hidden(model)
        taught = teacher_head = None
        if needs_teacher:
            with torch.no_grad():
                taught, teacher_head = batch.answer_hidden(teacher), teacher.head.weight
        head = model.head.weight
        assert isinstance(head, Tensor)
        assert teacher_head is None or isinstance(teacher_head, Tensor)
        total, terms = distillation_loss(hidden, head, taught, teacher_head, batch.targets, weights, temperature)
        return total, {"loss": round(total.item(), 5), **{k: round(v, 5) for k, v in terms.items()}}

    return loss


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
    student: Student, distill: Distill, teacher_dir: Path, corpus: Corpus, tokenizer_dir: Path, seed: int, out: Path
) -> bool:
    """Distill a student into `out`; returns whether it ran."""
    check_terms(distill.losses)
    settings = {"student": student.model_dump(), **distill.model_dump(exclude={"control"})}
    return _train("distill", settings, student, distill, distill.init, teacher_dir, corpus, tokenizer_dir, seed, out)


def train_control(
    student: Student, distill: Distill, teacher_dir: Path, corpus: Corpus, tokenizer_dir: Path, seed: int, out: Path
) -> bool:
    """The same student, steps, batches and rates on the true answers alone, from `distill.control`'s first weights."""
    assert distill.control != "none"
    control = distill.model_copy(update={"losses": {"ce": 1.0}, "init": distill.control})
    of_the_teacher = {"control", "temperature", "teacher_until"}
    settings = {"student": student.model_dump(), **control.model_dump(exclude=of_the_teacher)}
    return _train("control", settings, student, control, control.init, teacher_dir, corpus, tokenizer_dir, seed, out)


def _train(
    stage: str,
    settings: dict[str, object],
    student: Student,
    distill: Distill,
    init: str,
    teacher_dir: Path,
    corpus: Corpus,
    tokenizer_dir: Path,
    seed: int,
    out: Path,
) -> bool:
    inputs = {**hashes(corpus), "tokenizer": content_hash(tokenizer_dir), "teacher": content_hash(teacher_dir)}
    if init == "random" and set(distill.losses) == {"ce"}:
        inputs.pop("teacher")
    manifest = Manifest(stage, stage, seed, settings, inputs)
    directories = {"tokenizer": tokenizer_dir, "teacher": teacher_dir}
    manifest.lineage = ancestry({label: path for label, path in directories.items() if label in inputs})
    tokenizer = Tokenizer.load(tokenizer_dir)

    def build(tmp: Path) -> None:
        cfg = shape_config(student, student.kind, tokenizer.vocab_size)
        report: dict[str, object] = {"from": "random"}
        teacher = load_teacher(teacher_dir, tokenizer) if "teacher" in inputs else None
        if init == "teacher" and teacher:  # queries and keys are turned as the teacher turns its own
            cfg = replace(cfg, rope_theta=teacher.cfg.rope_theta, rope_scaling=teacher.cfg.rope_scaling)
        model = fresh(cfg, student.induction, seed + 1)
        if init == "teacher":
            assert teacher is not None
            report = {"from": "teacher", **from_teacher(model, teacher, calibration(corpus, tokenizer), distill.layers)}
        if teacher:
            teacher.to(device())
        loss = answer_loss(0.0)
        if teacher and set(distill.losses) != {"ce"}:
            loss = divergence_loss(teacher, distill.losses, distill.temperature, distill.teacher_until)
        done = run_loop(model.to(device()), corpus, tokenizer, loss, distill.train, seed + 1, out, manifest.fingerprint)
        share = {"share_of_teacher": parameter_count(model) / parameter_count(teacher)} if teacher else {}
        write_trained(tmp, model, tokenizer_dir, done, manifest, initialised=report, **share)

    return make(out, manifest, build, scratch=training_state(out))


def calibration(corpus: Corpus, tokenizer: Tokenizer) -> list[Tensor]:
    """Token ids of some training rows, one row a tensor."""
    return [torch.tensor([encode(c, tokenizer).ids]) for c in corpus.train[:CALIBRATION_ROWS]]
