"""Every stage of a recipe, in order, each skipped when nothing changed and continued when it was cut off.

Stages meet on disk: OUT/{data,tokenizer,teacher,distill,control,quantize,quantize-SCHEME,export/TARGET,evaluate/MODEL},
then OUT/summary.json and OUT/report.html. Nothing imports this file but commands.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gori import console, corpus
from gori.artifact import Manifest, content_hash, make, would_make, write_json
from gori.errors import GateError, GoriError
from gori.gates import check as check_gates
from gori.gates import verdicts
from gori.parallel import cores, only_run, together
from gori.quantize.schemes import canonical, embedding_scheme, scheme
from gori.ranks import by_first, current, joined
from gori.recipe import Recipe
from gori.targets import answering, target

STAGES = ("data", "tokenizer", "teacher", "cache", "distill", "control", "quantize", "export", "evaluate", "report")
ON_RANKS = {"teacher", "cache", "distill", "control"}
"""Stages that all ranks work on together; of the others the first rank does the work."""
TOKENIZER_ROWS = 40000
"""Training rows that the tokenizer is trained on, at most."""


@dataclass
class Run:
    """One recipe being run into one directory."""

    recipe: Recipe
    out: Path
    ray: str | None = None
    """Address of a Ray cluster that makes the cache's shards."""
    _corpus: corpus.Corpus | None = None

    def dir(self, stage: str) -> Path:
        return self.out / stage

    @property
    def corpus(self) -> corpus.Corpus:
        """The conversations, read once."""
        if self._corpus is None:
            d = self.recipe.data
            if d.builtin:
                from gori import incar

                base = self.dir("data")
                tests = [base / f"{name}.jsonl" for name in incar.TEST_SPLITS]
                self._corpus = corpus.read(base / "train.jsonl", base / "dev.jsonl", tests, base / "tools.json")
            else:
                tests = [Path(p) for p in ([d.test] if isinstance(d.test, str) else d.test)]
                self._corpus = corpus.read(Path(d.train or ""), Path(d.dev or ""), tests, Path(d.tools or ""))
        return self._corpus

    @property
    def teacher_dir(self) -> Path:
        return Path(self.recipe.teacher.path) if self.recipe.teacher.path else self.dir("teacher")

    @property
    def cache_dir(self) -> Path | None:
        c = self.recipe.cache
        return None if c is None else Path(c.path) if c.path else self.dir("cache")

    def models(self) -> dict[str, Path]:
        """Every model that is evaluated, by the name it has in the summary."""
        r = self.recipe
        found = {"teacher": self.teacher_dir} if self.recipe.has_teacher else {}
        found["student"] = self.dir("distill")
        if r.distill.control != "none":
            found["control"] = self.dir("control")
        found |= {scheme: self.quantized_dir(scheme) for scheme in self.schemes()}
        return found | {name: self.dir("export") / name for name in self.answering()}

    def answering(self) -> list[str]:
        """Exported targets whose own engine answers here."""
        return answering(e.target for e in self.recipe.export)

    def schemes(self) -> list[str]:
        q = self.recipe.quantize
        return list(dict.fromkeys([*(canonical(s) for s in q.compare), canonical(q.scheme)]))

    def quantized_dir(self, scheme: str) -> Path:
        return self.dir("quantize" if scheme == canonical(self.recipe.quantize.scheme) else f"quantize-{scheme}")


def stage_data(run: Run) -> None:
    """Make the built-in corpus, or check one's own files and note their hashes."""
    d = run.recipe.data
    manifest = Manifest("data", d.builtin or "files", run.recipe.seed, d.model_dump(), {})
    if d.builtin:
        from gori import incar

        def build(tmp: Path) -> None:
            incar.write(tmp, run.recipe.seed, train=d.rows, test=d.test_rows)

        make(run.dir("data"), manifest, build)
        return
    manifest.inputs = corpus.hashes(run.corpus)

    def note(tmp: Path) -> None:
        (tmp / "tools.json").write_bytes(Path(d.tools or "").read_bytes())
        c = run.corpus
        splits = {"train": c.train, "dev": c.dev, **c.tests}
        manifest.metrics |= {"rows": {k: len(v) for k, v in splits.items()}, "functions": len(c.functions)}

    make(run.dir("data"), manifest, note)


def stage_tokenizer(run: Run) -> None:
    from gori import tokenizer

    section = run.recipe.tokenizer
    r = run.recipe
    named = {"cache": r.cache.path if r.cache else None, "teacher": None if r.distill.tokenizers else r.teacher.path}
    label, source = next(((k, Path(p)) for k, p in named.items() if p), ("", None))
    inputs = {label: content_hash(source)} if source else corpus.hashes(run.corpus)
    manifest = Manifest("tokenizer", "tokenizer", run.recipe.seed, section.model_dump(), inputs)

    def build(tmp: Path) -> None:
        if source:
            tokenizer.copy_files(source, tmp)
            return
        texts = corpus.training_texts(run.corpus.train[:TOKENIZER_ROWS])
        trained = tokenizer.train(texts, run.corpus.functions, section.vocab_size)
        trained.save(tmp)
        (tmp / "tools.json").write_bytes((run.dir("data") / "tools.json").read_bytes())
        manifest.metrics["vocab_size"] = trained.vocab_size

    make(run.dir("tokenizer"), manifest, build)


def stage_teacher(run: Run) -> None:
    if taken := _idle(run, "teacher"):
        console.log(f"teacher: {taken}")
        return
    from gori.teacher.stage import train_teacher

    r = run.recipe
    train_teacher(r.teacher, run.corpus, run.dir("tokenizer"), r.seed, run.dir("teacher"))


def stage_cache(run: Run) -> None:
    if _idle(run, "cache"):
        return
    from gori.teacher.cache import cache_teacher

    r = run.recipe
    places = (run.teacher_dir, run.corpus, run.dir("tokenizer"), r.seed, run.dir("cache"))
    assert r.cache
    cache_teacher(r.cache, r.distill, r.student.max_position, *places, run.ray)


def stage_distill(run: Run) -> None:
    from gori.distill.stage import train_student

    r = run.recipe
    places = (run.teacher_dir, run.corpus, run.dir("tokenizer"), r.seed, run.dir("distill"), run.cache_dir)
    train_student(r.student, r.distill, *places)


def stage_control(run: Run) -> None:
    r = run.recipe
    if r.distill.control == "none":
        return
    from gori.distill.stage import train_control

    places = (run.teacher_dir, run.corpus, run.dir("tokenizer"), r.seed, run.dir("control"), run.cache_dir)
    train_control(r.student, r.distill, *places)


def stage_quantize(run: Run) -> None:
    from gori.quantize.mix import mix_of
    from gori.quantize.stage import quantize

    q, files = run.recipe.quantize, run.corpus.files
    for name in run.schemes():
        exported = name == canonical(q.scheme)
        embedding = q.embedding if exported else None
        mix = mix_of(q.mix, name, embedding, q.bits_per_weight, None) if q.mix and exported else None
        quantize(
            run.dir("distill"),
            name,
            embedding,
            q.method,
            run.quantized_dir(name),
            calibration=(files["train"],),
            samples=q.samples,
            seed=run.recipe.seed,
            settings=q.options,
            mix=mix,
        )


def stage_export(run: Run) -> None:
    from gori.export.build import export

    for e in run.recipe.export:
        out = run.dir("export") / e.target
        export(e.target, run.dir("quantize"), out, context=e.context, chunk=e.chunk, backend=e.backend)


def stage_evaluate(run: Run, files: bool | None = None) -> None:
    """Answers of every model to every test row; `files` True: only exported files, False: only checkpoints."""
    from gori.runtime.evaluation import as_row, evaluate_model
    from gori.teacher.foreign_answers import answer_all
    from gori.teacher.foreign_recipe import is_imported

    tests = {k: v for k, v in corpus.hashes(run.corpus).items() if k.startswith("test/") or k == "tools"}
    targets = run.answering()
    for name, directory in run.models().items():
        if files is not None and files != (name in targets):
            continue
        manifest = Manifest("evaluate", name, 0, {}, {"model": content_hash(directory), **tests})

        def build(tmp: Path, name: str = name, directory: Path = directory, manifest: Manifest = manifest) -> None:
            started = time.monotonic()
            if is_imported(directory):
                answered = answer_all(directory, run.corpus.tests, run.corpus.functions)
                rows = [as_row(split, scored) for split, scored in answered]
            else:
                rows = evaluate_model(directory, run.corpus.tests, run.corpus.functions, name)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (tmp / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
            manifest.metrics["evaluate_seconds"] = round(time.monotonic() - started, 1)

        make(run.dir("evaluate") / name, manifest, build)


def stage_evaluate_checkpoints(run: Run) -> None:
    stage_evaluate(run, files=False)


def stage_report(run: Run) -> None:
    from gori.report import write_report
    from gori.summary import summarize

    summary = summarize(run.out, run.models(), run.recipe, canonical(run.recipe.quantize.scheme))
    summary["gates"] = verdicts(run.recipe.gates, run.recipe.budget.model_dump(exclude_none=True), summary)
    write_json(run.out / "summary.json", summary)
    write_report(run.out, summary, run.recipe)


RUNNERS: dict[str, Callable[[Run], None]] = {
    "data": stage_data,
    "tokenizer": stage_tokenizer,
    "teacher": stage_teacher,
    "cache": stage_cache,
    "distill": stage_distill,
    "control": stage_control,
    "quantize": stage_quantize,
    "export": stage_export,
    "evaluate checkpoints": stage_evaluate_checkpoints,
    "evaluate": stage_evaluate,
    "report": stage_report,
}


def run_recipe(
    recipe: Recipe, out: Path, until: str = "report", dry_run: bool = False, ray: str | None = None
) -> dict[str, Any] | None:
    """Run a recipe's stages into `out` up to `until`; returns the summary where it came to one.

    Raises GateError after everything is written where a gate or the budget is not met.
    """
    if until not in STAGES:
        raise GoriError(f"stage {until!r} is unknown: choose one of {', '.join(STAGES)}")
    check(recipe, until)
    run = Run(recipe, out, ray)
    if dry_run:
        for stage, state in plan(run, until):
            console.log(f"{stage:<10} {state}")
        return None
    with joined(), only_run(out):
        for group in groups(run, until):
            started = time.monotonic()
            console.log(f"── {' and '.join(group)}")
            if group[0] in ON_RANKS:
                _run_group(run, group)
            else:
                by_first(lambda group=group: _run_group(run, group))  # type: ignore[misc]
            console.log(f"   took {time.monotonic() - started:.1f} s")
    if until != "report":
        return None
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if missed := [g for g in summary["gates"] if not g["met"]]:
        first = "; ".join(f"{g['name']} is {g['value']:.4g}, bound {g['bound']}" for g in missed)
        raise GateError(f"{len(missed)} of {len(summary['gates'])} gates not met: {first} (everything is in {out})")
    return summary


def check(recipe: Recipe, until: str = "report") -> None:
    """Refuse before anything is trained what a later stage would refuse."""
    from gori.distill.checks import check_recipe
    from gori.export.weights import check_scheme
    from gori.quantize.layout import check_width
    from gori.quantize.methods import method, options
    from gori.quantize.mix import mix_of
    from gori.teacher.foreign_recipe import check_teacher

    check_recipe(recipe, student=STAGES.index(until) >= STAGES.index("distill"))
    check_teacher(recipe)
    check_gates(recipe.gates)
    q, student = recipe.quantize, recipe.student
    options(method(q.method), q.options)
    if q.mix or q.bits_per_weight:
        mix_of(q.mix or "", q.scheme, q.embedding, q.bits_per_weight, None)
    widths = {
        "the student's hidden_size": student.hidden_size,
        "the student's heads * head_dim": student.heads * student.head_dim,
        "the student's intermediate_size": student.intermediate_size,
    }
    for name in (q.scheme, *q.compare):
        for what, width in widths.items():
            check_width(width, scheme(name), what)
    if q.embedding and (table := embedding_scheme(q.embedding)):
        check_width(student.hidden_size, table, "the embedding")
    for e in recipe.export:
        check_scheme(scheme(q.scheme), f"quantize.scheme {q.scheme}", target(e.target))


def groups(run: Run, until: str) -> list[tuple[str, ...]]:
    """Stages up to `until`, those that do not need each other in one group.

    Checkpoints are answered while the file is made, if both are wanted.
    """
    wanted = STAGES[: STAGES.index(until) + 1]
    apart = ("distill", "control", "export") if run.recipe.cache else ("cache", "distill", "control", "export")
    found: list[tuple[str, ...]] = [(s,) for s in wanted if s not in apart]
    if "distill" in wanted:
        at = found.index(("cache",) if run.recipe.cache else ("teacher",)) + 1
        found.insert(
            at, ("distill", "control") if "control" in wanted and run.recipe.distill.control != "none" else ("distill",)
        )
    if "export" in wanted:
        at = found.index(("quantize",)) + 1
        found.insert(at, ("export", "evaluate checkpoints") if "evaluate" in wanted else ("export",))
    return found


def _run_group(run: Run, group: tuple[str, ...]) -> None:
    """A student and its control get half the cores each, also where one runs alone: the number of threads changes the
    last bits of what is trained."""
    halves = len(group) > 1 or (group == ("distill",) and run.recipe.distill.control != "none")
    # a process of its own costs seconds, too much to find that nothing changed
    apart = [s for s in group if current().world > 1 or _would_run(run, s)] if halves else []
    for stage in (s for s in group if s not in apart):
        RUNNERS[stage](run)
    if apart:
        together([(_job, (run.recipe, run.out, stage)) for stage in apart], share=max(1, cores() // 2))


def _job(recipe: Recipe, out: Path, stage: str) -> None:
    RUNNERS[stage](Run(recipe, out))


DOES_NOT_READ = {"control": {"distill"}, "quantize": {"control"}, "export": {"control"}}
"""Stage → those before it whose outcome it does not read; any other is read, directly or not."""


def plan(run: Run, until: str) -> Iterator[tuple[str, str]]:
    """What each stage would do: settings and inputs are compared as the stage itself does, without making anything."""
    will_run: set[str] = set()
    for stage in STAGES[: STAGES.index(until) + 1]:
        if stage == "report":
            yield stage, "runs"
        elif idle := _idle(run, stage):
            yield stage, idle
        elif will_run - DOES_NOT_READ.get(stage, set()):
            will_run.add(stage)
            yield stage, "runs if what it reads comes out another" if (run.out / stage).exists() else "runs"
        elif _would_run(run, stage):
            will_run.add(stage)
            cut = (run.out / f".{stage}.training.pt").exists()
            yield stage, "runs, from its checkpoint if that is of these settings" if cut else "runs"
        else:
            yield stage, "unchanged, skipped"


def _idle(run: Run, stage: str) -> str | None:
    """Why a stage has nothing to do in this recipe."""
    r = run.recipe
    if stage == "teacher" and (r.teacher.path or not r.has_teacher):
        return f"{r.teacher.path or 'its cache'}, taken as it is"
    if stage == "cache" and r.cache and r.cache.path:
        return f"{r.cache.path}, taken as it is"
    return "not asked for" if {"control": r.distill.control == "none", "cache": not r.cache}.get(stage) else None


def _would_run(run: Run, stage: str) -> bool:
    return would_make(lambda: RUNNERS[stage](run))
