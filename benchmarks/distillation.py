"""What each part of distillation gives a student: first weights, the teacher's distribution, unlabelled requests,
on-policy steps, a cache in the teacher's place, experts selected or merged, a pruned dense teacher.

    python benchmarks/distillation.py --task snips --data DIR --seeds 5 --out OUT
    python benchmarks/distillation.py --task incar --seeds 5 --out OUT --variants random+CE,init+KD --settings few

Every student has the same shape, steps and batch tokens; only what the table names differs. `NAME @0.1` trains NAME at
a tenth of the rates: a student that starts from its teacher needs lower ones than one from random weights. One teacher,
trained on all labels, serves every student; `few` students see the labels of --few rows alone, and the other rows as
utterances that nobody labelled (which is what `unlabelled` uses in both settings). A run that is done is not run again.
Writes OUT/results.json and OUT/table.md: means over seeds, and of the difference to random+CE with the same seed the
95 % interval of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gori import console, corpus
from gori.artifact import write_json
from gori.parallel import together
from gori.recipe import Cache, Distill, Recipe, Student, parse

SHAPE = {"layers": 4, "hidden_size": 128, "heads": 4, "kv_heads": 4, "head_dim": 32}
TEACHER = {**SHAPE, "experts": 8, "experts_per_token": 2, "intermediate_size": 192}
STUDENT = {**SHAPE, "layers": 3, "heads": 3, "kv_heads": 3, "intermediate_size": 48}
"""Less of everything but width, which a tied head and table make dear to cut."""
LARGE = {**SHAPE, "intermediate_size": 144}
DENSE_WIDTH = 384
"""MLP of the dense teacher: as many active parameters as the mixture, so as much compute a token."""
RATES = {
    "snips": {"muon_lr": 3e-3, "adam_lr": 4e-3, "weight_decay": 0.1, "swap_values": 0.6},
    "incar": {"muon_lr": 3e-3, "adam_lr": 4e-3, "swap_values": 0.3, "invent_values": 0.5},
}
KD = {"losses": {"forward_kl": 0.5, "ce": 0.5}}
CE = {"losses": {"ce": 1.0}}
NARROW = {"hidden_size": 96, "tied": False}
"""Untied, since principal directions need a head of their own."""
DRAWN = {"on_policy": {"share": 0.3, "start": 0.3}}
MINITRON = {"fit": False, "experts": {"how": "select"}}
"""Whole experts, neurons by their activation, and nothing fitted."""
VARIANTS: dict[str, dict[str, Any]] = {
    "teacher": {"model": "teacher"},
    "dense teacher": {"model": "dense-teacher"},
    "random+CE": {"init": "random", **CE},
    "random+KD": {"init": "random", **KD},
    "init": {**KD, "steps": 1},
    "init+CE": CE,
    "init+KD": KD,
    "init+KD+unlabelled": {**KD, "unlabelled": "teacher"},
    "init+KD+on-policy": {**KD, **DRAWN},
    "init+KD+unlabelled+on-policy": {**KD, **DRAWN, "unlabelled": "teacher"},
    "init+KD+asked": {**KD, **DRAWN, "unlabelled": "student"},
    "init+KD cached": {**KD, "cached": True},
    "random+KD cached": {"init": "random", **KD, "cached": True},
    "init+KD unfitted": {**KD, "fit": False},
    "init+KD+unlabelled unfitted": {**KD, "fit": False, "unlabelled": "teacher"},
    "init+KD selected": {**KD, **MINITRON},
    "init+KD+unlabelled selected": {**KD, **MINITRON, "unlabelled": "teacher"},
    "init+KD by output": {**KD, "experts": {"how": "select", "score": "output"}},
    "init+KD merged": {**KD, "experts": {"how": "merge"}},
    "init+KD hidden": {"losses": {**KD["losses"], "hidden": 0.1}},
    "init+KD attention": {"losses": {**KD["losses"], "attention": 0.1}},
    "init+jsd": {"losses": {"jsd@0.3": 0.5, "ce": 0.5}},
    "init+skew": {"losses": {"skew_kl@0.1": 0.5, "ce": 0.5}},
    "init+KD progressive": {**KD, "way": {"layers": 4, "hidden_size": 128, "intermediate_size": 144}},
    "dense init": {**KD, "dense": True, "steps": 1},
    "dense init+CE": {**CE, "dense": True},
    "dense init+KD": {**KD, "dense": True},
    "dense init+KD unfitted": {**KD, **MINITRON, "dense": True},
    "large init": {**KD, "student": LARGE, "steps": 1},
    "large init+KD": {**KD, "student": LARGE},
    "large init+KD+unlabelled": {**KD, "student": LARGE, "unlabelled": "teacher"},
    "large init+KD selected": {**KD, **MINITRON, "student": LARGE},
    "init+KD even": {**KD, "depth": "even"},
    "init+KD influence": {**KD, "depth": "influence"},
    "narrow random+KD": {"init": "random", **KD, "student": NARROW},
    "narrow init+KD": {**KD, "student": NARROW},
    "narrow init+KD pca": {**KD, "width": "pca", "student": NARROW},
    "narrow init+KD pca unfitted": {**KD, "width": "pca", "fit": False, "student": NARROW},
}
REFERENCE = "random+CE"


def recipe_of(a: argparse.Namespace) -> Recipe:
    """Data, tokenizer and teacher of a task."""
    data: dict[str, Any] = {"builtin": "incar", "rows": a.rows, "test_rows": a.test_rows}
    if a.task == "snips":
        names = {"train": "train.jsonl", "dev": "dev.jsonl", "test": "dev.jsonl", "tools": "tools.json"}
        data = {k: str(a.data / name) for k, name in names.items()}
    train = {**RATES[a.task], "steps": a.teacher_steps, "batch_tokens": 1024, "muon_steps": 4}
    vocabulary = {"vocab_size": 2048 if a.task == "snips" else 2560}
    body = {"name": a.task, "data": data, "tokenizer": vocabulary, "teacher": {**TEACHER, "train": train}}
    return parse(body, "the benchmark")


def variant_of(name: str) -> tuple[dict[str, Any], float]:
    """What a name says, and the factor of its rates: "init+KD @0.1"."""
    plain, _, factor = name.partition(" @")
    return VARIANTS[plain], float(factor or 1)


def distill_of(a: argparse.Namespace, name: str, said: Path) -> Distill:
    variant, factor = variant_of(name)
    body = {k: v for k, v in variant.items() if k not in ("cached", "dense", "way", "student", "steps")}
    if body.get("unlabelled"):
        body["unlabelled"] = {"files": [str(said)], "answers": body["unlabelled"]}
    steps = variant.get("steps", a.steps)
    if way := variant.get("way"):  # half of the steps are the larger student's
        body["progressive"], steps = [{**way, "steps": steps // 2}], steps - steps // 2
    rates = {k: v * factor if k.endswith("_lr") else v for k, v in RATES[a.task].items()}
    train = {**rates, "steps": steps, "batch_tokens": 1024, "muon_steps": 4, "threads": 1}
    return Distill.model_validate({**body, "train": train, "control": "none"})


def prepare(a: argparse.Namespace) -> None:
    """The teachers, and each setting's rows, cache and teacher-written answers."""
    from gori.distill.stage import train_student
    from gori.distill.unlabelled import write_answers
    from gori.pipeline import run_recipe
    from gori.teacher.cache import cache_teacher

    recipe, base = recipe_of(a), a.out / "base"
    run_recipe(recipe, base, until="teacher")
    whole = corpus_of(a, None)
    wanted = [variant_of(v)[0] for v in a.variants]
    if any(v.get("dense") or v.get("model") == "dense-teacher" for v in wanted):
        train = {**recipe.teacher.train.model_dump(exclude={"tokens", "sequence", "expert_parallel"})}
        section = Distill.model_validate({"init": "random", **CE, "train": train})
        wide = Student.model_validate({**SHAPE, "intermediate_size": DENSE_WIDTH})
        train_student(wide, section, base / "teacher", whole, base / "tokenizer", 0, base / "dense-teacher")
    for setting in a.settings:
        home = a.out / setting
        split(a, setting, home)
        rows, said = corpus_of(a, setting), home / "said.jsonl"
        distill = distill_of(a, "init+KD", said)
        if any(v.get("cached") for v in wanted):
            places = (base / "teacher", rows, base / "tokenizer", 0, home / "cache")
            cache_teacher(Cache(epochs=a.cache_epochs), distill, Student().max_position, *places)
        if any(v.get("unlabelled") == "teacher" for v in wanted):
            section = distill_of(a, "init+KD+unlabelled", said).unlabelled
            assert section
            write_answers(section, base / "teacher", base / "tokenizer", rows, 0, home / "answers")


def split(a: argparse.Namespace, setting: str, home: Path) -> None:
    """A setting's labelled rows, and the others' (in setting all: every row's) words alone."""
    home.mkdir(parents=True, exist_ok=True)
    source = a.out / "base" / "data" / "train.jsonl" if a.task == "incar" else a.data / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    few = a.few if setting == "few" else len(lines)
    (home / "train.jsonl").write_text("".join(f"{line}\n" for line in lines[:few]), encoding="utf-8")
    rest = [json.loads(line)["messages"] for line in (lines[few:] or lines)]
    words = (json.dumps({"messages": m[:-1]}, ensure_ascii=False) + "\n" for m in rest)
    (home / "said.jsonl").write_text("".join(words), encoding="utf-8")


def corpus_of(a: argparse.Namespace, setting: str | None) -> corpus.Corpus:
    from gori import incar

    data = a.out / "base" / "data" if a.task == "incar" else a.data
    tests = [data / f"{s}.jsonl" for s in incar.TEST_SPLITS] if a.task == "incar" else [data / "dev.jsonl"]
    train = a.out / setting / "train.jsonl" if setting else data / "train.jsonl"
    return corpus.read(train, data / "dev.jsonl", tests, data / "tools.json")


def one_run(a: argparse.Namespace, setting: str, name: str, seed: int) -> None:
    """Train and answer one student, once."""
    import torch

    from gori.distill.stage import train_student
    from gori.runtime.evaluation import evaluate_model

    out = run_dir(a, setting, name, seed)
    if (out / "result.json").exists():
        return
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    home, base, variant = a.out / setting, a.out / "base", variant_of(name)[0]
    if variant.get("unlabelled") == "teacher" and not (out / "student-answers").exists():
        shutil.copytree(home / "answers", out / "student-answers")
    rows = corpus_of(a, setting)
    teacher = base / ("dense-teacher" if variant.get("dense") else "teacher")
    places = (
        teacher,
        rows,
        base / "tokenizer",
        seed,
        out / "student",
        home / "cache" if variant.get("cached") else None,
    )
    shape = Student.model_validate({**STUDENT, **variant.get("student", {})})
    model, core_s = out / "student", None
    if "model" in variant:
        model = base / variant["model"]
    else:
        core_s = spending(
            out / "core_s.json", lambda: train_student(shape, distill_of(a, name, home / "said.jsonl"), *places)
        )
    answers = evaluate_model(model, rows.tests, rows.functions, name, threads=1)
    exact = {s: statistics.mean(r["exact"] for r in answers if r["split"] == s) for s in rows.tests}
    found = {"exact": exact, "core_s": core_s, **held_out(model, base / "teacher", rows)}
    write_json(out / "result.json", found)


def spending(noted: Path, work: Callable[[], Any]) -> float | None:
    """Core-seconds of some work, those of earlier tries that ended with an error included; None after one that was
    killed, whose seconds nobody knows."""
    before = json.loads(noted.read_text()) if noted.exists() else 0.0
    write_json(noted, None)
    began = time.process_time()
    try:
        work()
    finally:
        spent = None if before is None else before + time.process_time() - began
        write_json(noted, spent)
    return spent


def held_out(student_dir: Path, teacher_dir: Path, rows: corpus.Corpus) -> dict[str, float]:
    """Cross-entropy of the dev rows' answers, and KL of the mixture-of-experts teacher to the student there."""
    import torch

    from gori import checkpoint
    from gori.calls import PAD
    from gori.data import encode
    from gori.distill.objective import divergence_loss
    from gori.teacher.train import to_tensors
    from gori.tokenizer import Tokenizer

    student, teacher = (checkpoint.load(d).eval() for d in (student_dir, teacher_dir))
    tokenizer = Tokenizer.load(student_dir)
    loss = divergence_loss(teacher, {"forward_kl": 1.0, "ce": 1.0}, 1.0)
    examples = sorted((encode(c, tokenizer) for c in rows.dev), key=lambda e: len(e.ids))
    sums, count = {"ce": 0.0, "forward_kl": 0.0}, 0
    for start in range(0, len(examples), 64):
        batch = to_tensors(examples[start : start + 64], tokenizer.id(PAD), torch.device("cpu"))
        with torch.no_grad():
            entry = loss(student, batch)[1]
        n = len(batch.targets)
        sums, count = {k: v + entry[k] * n for k, v in sums.items()}, count + n
    return {"dev_ce": sums["ce"] / count, "dev_kl": sums["forward_kl"] / count}


def run_dir(a: argparse.Namespace, setting: str, name: str, seed: int) -> Path:
    return a.out / setting / name.replace(" ", "-") / str(seed)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % of Student's t: a bootstrap over five seeds would be too narrow."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    middle = statistics.mean(values)
    return middle - half, middle + half


def table(a: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Markdown, and everything that was measured."""
    lines, results = [], {}
    for setting in a.settings:
        found: dict[str, dict[int, Any]] = {}
        for name in a.variants:
            paths = {seed: run_dir(a, setting, name, seed) / "result.json" for seed in range(a.seeds)}
            found[name] = {seed: json.loads(p.read_text()) for seed, p in paths.items() if p.exists()}
        results[setting] = found
        splits = list(next(r for runs in found.values() for r in runs.values())["exact"])
        labels = f"{a.few} labelled rows" if setting == "few" else "all rows labelled"
        lines += [
            f"**{a.task}, {labels}**: {STUDENT['layers']} layers, width {STUDENT['hidden_size']}, {a.steps} steps of "
            f"1,024 tokens, {a.seeds} seeds, one teacher ({a.teacher_steps} steps, all labels). Exact calls in "
            f"percent; in brackets the difference to {REFERENCE} of the same seed, 95 % interval over seeds. "
            "Core-seconds are of training, the teacher's passes and the answers to dev at its end included, of runs "
            "that were never killed.\n",
            f"| student | {' | '.join(splits)} | dev CE | dev KL to the teacher | core-s |",
            f"|---|{'---|' * (len(splits) + 3)}",
        ]
        for name, runs in found.items():
            if not runs:
                continue
            cells = [cell(runs, found.get(REFERENCE, {}), s) for s in splits]
            rest = [f"{statistics.mean(r[k] for r in runs.values()):.3f}" for k in ("dev_ce", "dev_kl")]
            core_s = [r["core_s"] for r in runs.values() if r["core_s"] is not None]
            rest.append(f"{statistics.mean(core_s):.0f}" if core_s else "-")
            lines.append(f"| {name} | {' | '.join(cells)} | {' | '.join(rest)} |")
        lines.append("")
    return "\n".join(lines), results


def cell(runs: dict[int, Any], reference: dict[int, Any], split: str) -> str:
    mean = f"{100 * statistics.mean(r['exact'][split] for r in runs.values()):.1f}"
    gaps = [100 * (r["exact"][split] - reference[s]["exact"][split]) for s, r in runs.items() if s in reference]
    bounds = interval(gaps)
    return mean if bounds is None or not any(gaps) else f"{mean} [{bounds[0]:+.1f}, {bounds[1]:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("snips", "incar"), required=True)
    parser.add_argument("--data", type=Path, help="folder of the SNIPS rows: train.jsonl, dev.jsonl, tools.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of each student")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--few", type=int, default=1000, help="labelled rows of the setting few")
    parser.add_argument("--settings", default="all,few")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rows", type=int, default=30000, help="training rows of the in-car task")
    parser.add_argument("--test-rows", type=int, default=300, help="rows of each of its test splits")
    parser.add_argument("--cache-epochs", type=int, default=20, help="as many as a student sees")
    parser.add_argument("--at-once", type=int, default=2, help="students trained at the same time, a thread each")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    a.settings, a.variants = a.settings.split(","), a.variants.split(",")
    if unknown := [v for v in a.variants if v.partition(" @")[0] not in VARIANTS]:
        parser.error(f"unknown variant {unknown[0]}: choose from {', '.join(VARIANTS)}")
    if a.task == "snips" and a.data is None:
        parser.error("--task snips needs --data")
    prepare(a)
    # seed by seed, so that a run that is cut off leaves whole rows of the table
    todo = [
        (a, s, v, seed)
        for seed in range(a.seeds)
        for s in a.settings
        for v in a.variants
        if not (seed and "model" in variant_of(v)[0])
    ]
    jobs = [(one_run, job) for job in todo if not (run_dir(*job) / "result.json").exists()]
    console.log(f"{len(jobs)} of {len(todo)} students to train")
    if jobs:
        together(jobs, share=1, at_once=a.at_once)
    text, results = table(a)
    write_json(a.out / "results.json", {"settings": {k: str(v) for k, v in vars(a).items()}, "results": results})
    (a.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
