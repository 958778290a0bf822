"""The cache stage: what a teacher says of every answer token of the training rows, in a few entries each, in shards.

A shard is a function of its own rows, the teacher, the settings and the seed alone, so that one process, many ranks and
a cluster write the same bytes, and a run that was cut off makes only the shards that are missing. Students are poured
from it without the teacher. Knows nothing of losses. Shapes: A answer tokens, V the student's vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gori import console
from gori.artifact import Manifest, ancestry, content_hash, make, os_errors, write_json, write_whole
from gori.calls import Function
from gori.corpus import Corpus, hashes, spoken
from gori.data import Conversation, Example, bucketed, collate
from gori.errors import GoriError
from gori.parallel import cores
from gori.ranks import barrier, current
from gori.recipe import Cache, Distill
from gori.teacher.cache_draw import Drawn, draw, largest, uniforms
from gori.teacher.cache_file import check, pack, seal
from gori.teacher.cache_read import INDEX
from gori.teacher.foreign import ForeignTeacher, TeacherModel, check_length, open_teacher
from gori.teacher.foreign_recipe import is_imported
from gori.tokenizer import Tokenizer, copy_files

Row = tuple[Conversation, Example]


Carry = Callable[[torch.Tensor], torch.Tensor]
"""A teacher's distributions over its own tokens `[its wanted, its V]` → those over a student's `[A, V]`
(gori.teacher.align)."""


@dataclass(frozen=True)
class Asked:
    """A row as the teacher reads it: its token ids, and which of them it is to predict."""

    example: Example
    ids: Sequence[int] | NDArray[Any]
    wanted: Sequence[bool] | NDArray[np.bool_]
    carry: Carry | None = None
    unknown: int = 0
    """Answer tokens that the teacher says nothing of, for which the true answer stands."""


@dataclass(frozen=True)
class Part:
    """A shard's place: rows `start..stop` of an epoch."""

    epoch: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"epoch-{self.epoch:03}-rows-{self.start:08}.tab"


@dataclass(frozen=True)
class Work:
    """All that a process needs to make shards: it may be sent to another machine that has the same folders."""

    teacher: Path
    tokenizer: Path
    functions: dict[str, Function]
    section: Cache
    tokenizers: str | None
    """How a teacher with another tokenizer is asked; null: it has the student's."""
    temperature: float
    """The teacher's logits are divided by it, as a student's will be."""
    seed: int
    device: str
    _open: list[Maker] = field(default_factory=list, compare=False)

    def maker(self) -> Maker:
        """The teacher, opened once in a process."""
        if not self._open:
            self._open.append(Maker(self))
        return self._open[0]


class Maker:
    """An opened teacher that makes shards."""

    def __init__(self, work: Work) -> None:
        self.work, self.tokenizer = work, Tokenizer.load(work.tokenizer)
        self.teacher: TeacherModel = open_teacher(work.teacher, torch.device(work.device))
        self.ask: Callable[[Row], Asked] = lambda row: Asked(row[1], row[1].ids, row[1].loss)
        if work.tokenizers is None:
            _check_vocabulary(self.teacher, self.tokenizer, work.teacher)
            return
        assert isinstance(self.teacher, ForeignTeacher)
        if work.tokenizers == "align":
            from gori.teacher.align import Aligner

            self.ask = Aligner(self.teacher.tokenizer, self.tokenizer, work.functions).ask

    @torch.inference_mode()
    def shard(self, rows: Sequence[Row], part: Part) -> tuple[bytes, dict[str, Any]]:
        """A shard's bytes, and what the index says of it."""
        w, s = self.work, self.work.section
        if w.tokenizers == "sequence":
            from gori.teacher.foreign_answers import written

            assert isinstance(self.teacher, ForeignTeacher)
            examples, counts = written(self.teacher, rows, self.tokenizer, w.functions, s.batch_tokens)
            data = pack(examples, self.tokenizer.vocab_size)
            return data, _entry(part, data, examples, counts)
        asked = [self.ask(row) for row in rows]
        for a, (c, _) in zip(asked, rows, strict=True):
            check_length(self.teacher, len(a.ids), c.utterance)
        drawn = [d for _, d in sorted(self._drawn(asked, part), key=lambda found: found[0])]
        examples = [Example(a.example.ids, a.example.loss, d.soft) for a, d in zip(asked, drawn, strict=True)]
        sums = {
            "mass": float(sum(d.mass.sum() for d in drawn)),
            "weight": float(sum(d.soft.weights.sum(dtype=np.float64) for d in drawn)),
            "top1": float(sum(d.top1.sum() for d in drawn)),
            "from_truth": float(sum(a.unknown for a in asked)),
        }
        data = pack(examples, self.tokenizer.vocab_size)
        return data, _entry(part, data, examples, sums)

    def _drawn(self, asked: Sequence[Asked], part: Part) -> Iterator[tuple[int, Drawn]]:
        """(place, entries) of each row, batch by batch; batches depend on the shard's rows alone."""
        s, device, V = self.work.section, self.teacher.device, self.tokenizer.vocab_size
        temperature = self.work.temperature
        for places in bucketed([len(a.ids) for a in asked], s.batch_tokens, 0, 0):
            b = collate([Example(asked[i].ids, asked[i].wanted) for i in places], pad=0)
            ids, wanted, valid = (torch.from_numpy(a).to(device) for a in (b.ids, b.loss, b.valid))
            logits = self.teacher.logits(ids[:, :-1], valid[:, :-1], wanted[:, 1:])
            for i, part_logits in zip(places, logits.split(b.loss[:, 1:].sum(1).tolist()), strict=True):
                probs, carry = (part_logits.float() / temperature).softmax(-1), asked[i].carry
                probs = probs[:, :V] if carry is None else carry(probs)
                if s.method == "topk":
                    yield int(i), largest(probs, s.k)
                    continue
                u = uniforms(self.work.seed, part.epoch, part.start + int(i), len(probs))
                yield int(i), draw(probs, torch.from_numpy(u).to(device), s.k)


def _check_vocabulary(teacher: TeacherModel, tokenizer: Tokenizer, directory: Path) -> None:
    if teacher.vocab_size < tokenizer.vocab_size:
        raise GoriError(
            f"teacher {directory} has a vocabulary of {teacher.vocab_size}, the student's tokenizer "
            f"{tokenizer.vocab_size}: distill with the teacher's own tokenizer, or set distill.tokenizers"
        )


def _entry(part: Part, data: bytes, examples: Sequence[Example], sums: dict[str, float]) -> dict[str, Any]:
    softs = [e.soft for e in examples if e.soft is not None]
    return {
        "file": part.name,
        "epoch": part.epoch,
        "rows": [part.start, part.stop],
        "tokens": sum(len(e.ids) for e in examples),
        "longest": max(len(e.ids) for e in examples),
        "answers": sum(len(s.ids) for s in softs),
        "entries": int(sum((s.weights > 0).sum() for s in softs)),
        "sums": sums,
        **seal(data),
    }


def cache_teacher(
    section: Cache,
    distill: Distill,
    max_position: int,
    teacher_dir: Path,
    corpus: Corpus,
    tokenizer_dir: Path,
    seed: int,
    out: Path,
    address: str | None = None,
) -> bool:
    """Write a recipe's cache into `out`; returns whether it ran. Every rank calls it; `address` names a Ray cluster
    that the shards are divided over instead."""
    train = distill.train
    made_of = {"swap_values": train.swap_values, "invent_values": train.invent_values, "max_position": max_position}
    settings = {**section.model_dump(exclude={"path"}), **made_of, "tokenizers": distill.tokenizers}
    settings["temperature"] = distill.temperature
    inputs = {"train": hashes(corpus)["train"], "tools": hashes(corpus)["tools"]}
    inputs |= {"tokenizer": content_hash(tokenizer_dir), "teacher": content_hash(teacher_dir)}
    manifest = Manifest("cache", "cache", seed, settings, inputs)
    manifest.lineage = ancestry({"tokenizer": tokenizer_dir, "teacher": teacher_dir})
    tokenizer = Tokenizer.load(tokenizer_dir)
    made = spoken(corpus.train, tokenizer, max_position, seed + 1, train.swap_values, train.invent_values)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizers = distill.tokenizers if is_other(teacher_dir, tokenizer_dir) else None
    folders = teacher_dir.resolve(), tokenizer_dir.resolve()
    work = Work(*folders, corpus.functions, section, tokenizers, distill.temperature, seed, device)
    size, rows = section.shard_rows, len(corpus.train)
    parts = [Part(e, a, min(a + size, rows)) for e in range(section.epochs) for a in range(0, rows, size)]
    scratch = out.parent / f".{out.name}.shards"
    shards = scratch / manifest.fingerprint[:16]

    def build(tmp: Path) -> None:
        with os_errors(shards):
            shards.mkdir(parents=True, exist_ok=True)
        me = current()
        todo = [p for p in parts[me.rank :: me.world] if not _done(shards, p)]
        run = _on_cluster(work, address) if address else _here(work)
        with run as answers, console.steps("cache", len(todo)) as bar:
            for n, (part, data, entry) in enumerate(answers(todo, made), 1):
                _write(shards, part, data, entry)
                bar.update(n, f"{entry['answers']:,} answer tokens in the last shard")
        barrier()
        if me.first:
            _assemble(shards, parts, tmp, manifest, tokenizer_dir)

    return make(out, manifest, build, scratch=scratch, by_all=True)


Rows = Callable[[int], Sequence[Row]]
Answers = Callable[[Sequence[Part], Rows], Iterator[tuple[Part, bytes, dict[str, Any]]]]
"""Shards to make, and an epoch's rows → each shard as it is made."""


def rows_of(parts: Sequence[Part], made: Rows) -> Iterator[tuple[Part, Sequence[Row]]]:
    """Each shard with its rows; an epoch is made once, as its shards follow each other."""
    epoch, rows = -1, made(0)[:0]
    for part in parts:
        if part.epoch != epoch:
            epoch, rows = part.epoch, made(part.epoch)
        yield part, rows[part.start : part.stop]


@contextmanager
def _here(work: Work) -> Iterator[Answers]:
    """In this process: on a CPU one thread a shard, each with one-threaded operations, whatever the number of cores, so
    that sums are added in one order."""
    maker, before = work.maker(), torch.get_num_threads()
    count = cores() if work.device == "cpu" else 1
    torch.set_num_threads(1)
    with ThreadPoolExecutor(count) as pool:

        def answers(parts: Sequence[Part], made: Rows) -> Iterator[tuple[Part, bytes, dict[str, Any]]]:
            jobs = rows_of(parts, made)
            while some := [job for _, job in zip(range(count), jobs, strict=False)]:
                found = pool.map(lambda job: maker.shard(job[1], job[0]), some)
                for (part, _), (data, entry) in zip(some, found, strict=True):
                    yield part, data, entry

        try:
            yield answers
        finally:
            torch.set_num_threads(before)


def _on_cluster(work: Work, address: str) -> Any:
    from gori.teacher.cache_ray import on_cluster

    return on_cluster(work, address)


def _write(scratch: Path, part: Part, data: bytes, entry: dict[str, Any]) -> None:
    """The shard, then its entry, each whole or not at all: a shard counts from its entry on."""
    write_whole(scratch / part.name, data)
    write_json(scratch / f"{part.name}.json", entry)


def _done(scratch: Path, part: Part) -> bool:
    entry = scratch / f"{part.name}.json"
    if not entry.exists():
        return False
    try:
        check(scratch / part.name, json.loads(entry.read_text()))
    except (GoriError, json.JSONDecodeError) as e:
        console.log(f"made again: {e}")
        return False
    return True


def _assemble(scratch: Path, parts: Sequence[Part], tmp: Path, manifest: Manifest, tokenizer_dir: Path) -> None:
    """Shards into one directory with their index, tokenizer and figures."""
    shards = [json.loads((scratch / f"{p.name}.json").read_text()) for p in parts]
    for p in parts:
        _place(scratch / p.name, tmp / p.name)
    copy_files(tokenizer_dir, tmp)
    about = {k: manifest.inputs[k] for k in ("teacher", "tokenizer", "train")}
    write_json(tmp / INDEX, {**about, "settings": manifest.settings, "seed": manifest.seed, "shards": shards})
    answers, size = sum(s["answers"] for s in shards), sum(s["bytes"] for s in shards)
    sums = {k: sum(s["sums"][k] for s in shards) for k in shards[0]["sums"]}
    manifest.metrics |= {
        "shards": len(shards),
        "rows": sum(s["rows"][1] - s["rows"][0] for s in shards),
        "tokens": sum(s["tokens"] for s in shards),
        "answer_tokens": answers,
        "bytes": size,
        "bytes_per_answer_token": round(size / max(1, answers), 2),
        "entries_per_answer_token": round(sum(s["entries"] for s in shards) / max(1, answers), 3),
        **{k if k.startswith("rows") else f"{k}_per_answer_token": _share(k, v, answers) for k, v in sums.items()},
    }


def _place(source: Path, to: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, to)
    except OSError:
        with os_errors(to):
            shutil.copyfile(source, to)


def _share(name: str, total: float, answers: int) -> float:
    return total if name.startswith("rows") else round(total / max(1, answers), 5)


def is_other(teacher_dir: Path, tokenizer_dir: Path) -> bool:
    """Whether a teacher's tokenizer is not the student's."""
    files = [d / "tokenizer.json" for d in (teacher_dir, tokenizer_dir)]
    return is_imported(teacher_dir) and (not files[0].exists() or content_hash(files[0]) != content_hash(files[1]))
