"""Student sizing: from a recipe and a device's budget to a few students that fit it, trained in full.

Data, tokenizer and teacher are the pipeline's stages; shapes are sized by a cost model over measured exports of random
students; short distillations choose who is trained in full. It knows every room, so only commands import it. In OUT
stand `students/{data,tokenizer,teacher}`, `students/cost/SHAPE`, `students/rung1/SHAPE` …, and each finalist as
`students/SHAPE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gori import console
from gori.artifact import Manifest, content_hash, make, read_manifest, write_json
from gori.corpus import hashes
from gori.errors import GateError, GoriError
from gori.parallel import cores, only_run, together
from gori.pipeline import Run, run_recipe
from gori.quantize import sizing
from gori.quantize.budget import Budget
from gori.quantize.sizing import Ceiling, CostModel, Shape, Storage, load_of
from gori.recipe import Recipe
from gori.targets import target as target_row

if TYPE_CHECKING:
    from gori.model import ModelConfig

MEASURED = 7
"""Exports that the cost model is fitted to."""
DEV_ROWS = 400
"""Dev rows that rank the students of a rung, at most."""
FEWEST_STEPS = 10


@dataclass(frozen=True)
class Sized:
    """What sizing came to."""

    students: dict[str, Path]
    """Shape's name → float checkpoint of each finalist."""
    facts: dict[str, Any]
    """How they were found: the cost model with its errors, predictions, and the ranking of every rung."""


def run_students(
    recipe: Recipe,
    out: Path,
    budget: Budget,
    *,
    target: str = "executorch",
    candidates: int = 6,
    finalists: int = 2,
    short: float = 0.15,
    threads: int = 1,
    rounds: int = 5,
) -> Sized:
    """Size, shorten, choose and train; what is there already is not made again.

    `candidates` shapes train for the share `short` of the recipe's steps, fewer and longer in every rung, until
    `finalists` train in full. `threads` and `rounds` are those of the measured speeds. GateError where no shape is
    expected to fit the budget.
    """
    check(candidates, finalists, short, target)
    home = out / "students"
    if recipe.quantize.mix:
        raise GoriError("a sizing counts bytes of one scheme for all linears: --set quantize.mix=null")
    run_recipe(recipe, home, until="teacher")
    with only_run(home):
        return size(Run(recipe, home), budget, target, candidates, finalists, short, threads, rounds)


def size(
    run: Run, budget: Budget, target: str, candidates: int, finalists: int, short: float, threads: int, rounds: int
) -> Sized:
    """The same where data, tokenizer and teacher are there."""
    base, store = base_shape(run.recipe), storage_of(run, target)
    every, refused = allowed(run, base)
    model, measured = cost_model(run, every, base, store, target, budget, threads, rounds)
    fitting = sizing.affordable(every, store, model, budget)
    if not fitting:
        raise GateError(nothing_fits(every, store, model, budget))
    chosen = sizing.pick(fitting, candidates)
    facts = {
        "target": target,
        "measured": measured,
        "cost_model": {k: {"error": f.error, "worst": f.worst, "of": f.coefficients} for k, f in model.fits.items()},
        "shapes": len(every),
        "left_out": refused,
        "fitting": len(fitting),
        "predicted": {s.name: model.metrics(load_of(s, store)) for s in chosen},
    }
    tell(facts)
    ranked, found = halve(run, chosen, finalists, short)
    facts["rungs"] = ranked
    write_json(run.out / "sizing.json", facts)
    return Sized(found, facts)


def check(candidates: int, finalists: int, short: float, target: str) -> None:
    """Refuse numbers that mean nothing, and targets whose engine does not run here, before anything is trained."""
    if not 1 <= finalists <= candidates:
        raise GoriError(f"{finalists} finalists of {candidates} shapes: name 1 to {candidates}")
    if not 0 < short <= 1:
        raise GoriError(f"a short distillation of {short:g} of the steps: name a share above 0 and at most 1")
    if target_row(target).stand_in:
        raise GoriError(f"{target_row(target).engine} does not run here, so no student can be sized for {target}")


def base_shape(recipe: Recipe) -> Shape:
    s = recipe.student
    return Shape(s.layers, s.hidden_size, s.heads, s.kv_heads, s.head_dim, s.intermediate_size)


def config_of(run: Run, s: Shape) -> ModelConfig:
    """A shape as the decoder that would be trained."""
    from gori.teacher.stage import shape_config
    from gori.tokenizer import Tokenizer

    student = run.recipe.student.model_copy(update=asdict(s))
    return shape_config(student, student.kind, Tokenizer.load(run.dir("tokenizer")).vocab_size)


def storage_of(run: Run, target: str) -> Storage:
    """How the recipe's scheme is stored in a target's file."""
    from gori.export.weights import resolve_lengths

    row, q = target_row(target), run.recipe.quantize
    cfg = config_of(run, base_shape(run.recipe))
    return sizing.storage(
        q.scheme,
        q.embedding,
        vocab_size=cfg.vocab_size,
        tied=cfg.tied,
        copied_head=row.copied_head,
        float_bits=row.float_bits,
        cached=resolve_lengths(cfg, None, None)[0],
        kind=cfg.kind,
    )


def allowed(run: Run, base: Shape) -> tuple[list[Shape], dict[str, int]]:
    """Every shape that the scheme's groups divide, that has room for the copying circuit where students start with one,
    and that the teacher can fill where weights are taken from it; and why how many others are left out."""
    left, refused = sizing.shapes(base, width_step(run.recipe)), {}
    if run.recipe.student.induction:
        # gori.induction: the circuit spans two layers and two heads' widths
        held = [s for s in left if s.layers >= 2 and s.hidden_size >= 2 * s.head_dim]
        refused["too small for the copying circuit (student.induction)"] = len(left) - len(held)
        left = held
    if run.recipe.distill.init == "teacher":
        most = ceiling(run)
        held = [s for s in left if most.holds(s)]
        refused["larger than the teacher, whose weights they start from (distill.init)"] = len(left) - len(held)
        left = held
    if not left:
        raise GoriError(f"no shape is left: {'; '.join(f'{n} are {why}' for why, n in refused.items())}")
    return left, refused


def width_step(recipe: Recipe) -> int:
    """What widths are multiples of: the groups of the recipe's schemes divide them."""
    from gori.quantize.schemes import embedding_scheme, scheme

    q = recipe.quantize
    table = embedding_scheme(q.embedding) if q.embedding else None
    return math.lcm(sizing.STEP, scheme(q.scheme).group_size or 1, table.group_size or 1 if table else 1)


def ceiling(run: Run) -> Ceiling:
    """What the teacher can fill (gori.distill.initialise)."""
    from gori.checkpoint import read_config

    t = read_config(run.teacher_dir)
    per = t.heads // t.kv_heads
    return Ceiling(t.layers, t.hidden_size, t.kv_heads, per, t.intermediate_size * max(1, t.experts))


def cost_model(
    run: Run,
    every: Sequence[Shape],
    base: Shape,
    store: Storage,
    target: str,
    budget: Budget,
    threads: int,
    rounds: int,
) -> tuple[CostModel, dict[str, Any]]:
    """Export and measure a few random students of shapes that lie far apart, and fit costs to them: shapes that may be
    trained, or any where these are few."""
    size = budget.bound("size_bytes")
    most = 1.5 * size.bound if size else 2 * load_of(base, store).stored_bytes
    any_shape = sizing.shapes(base, width_step(run.recipe))
    pools = ([s for s in pool if load_of(s, store).stored_bytes <= most] for pool in (every, any_shape))
    near = next((pool for pool in pools if len(pool) >= MEASURED), any_shape)
    shapes = sizing.to_measure(near, base, MEASURED)
    console.log(f"cost model: exporting {len(shapes)} random students, {', '.join(s.name for s in shapes)}")
    spread([(export_random, (run.recipe, run.out, s, target)) for s in shapes])
    artifacts = [run.dir("cost") / s.name / "export" for s in shapes]
    measured = measure_all(artifacts, threads, rounds)
    model = sizing.fit_all([load_of(s, store) for s in shapes], measured)
    return model, {s.name: m for s, m in zip(shapes, measured, strict=True)}


def spread(jobs: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    """As many jobs at once as there are cores; fewer jobs get more cores each."""
    at_once = min(len(jobs), cores())
    together(jobs, share=cores() // at_once, at_once=at_once)


def export_random(recipe: Recipe, home: Path, s: Shape, target: str) -> None:
    """A random student of a shape, quantized as the recipe says and exported. What it costs does not depend on its
    weights, so they are rounded to nearest; but norms have to differ, since exporters keep equal ones once."""
    import torch

    from gori import checkpoint
    from gori.export.build import export
    from gori.model import Decoder
    from gori.quantize.stage import quantize
    from gori.tokenizer import copy_files

    run, place = Run(recipe, home), home / "cost" / s.name
    tokenizer = run.dir("tokenizer")
    manifest = Manifest(
        "random", s.name, recipe.seed, {**asdict(s), "norms": "random"}, {"tokenizer": content_hash(tokenizer)}
    )

    def build(tmp: Path) -> None:
        generator = torch.Generator().manual_seed(recipe.seed)
        model = Decoder(config_of(run, s)).initialise(generator)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        checkpoint.save(model, tmp)
        copy_files(tokenizer, tmp)

    make(place / "student", manifest, build)
    quantize(place / "student", recipe.quantize.scheme, recipe.quantize.embedding, "rtn", place / "quantize")
    export(target, place / "quantize", place / "export")


def measure_all(artifacts: Sequence[Path], threads: int, rounds: int) -> list[dict[str, float | None]]:
    """Size, memory and speeds of exports, from rounds in which each file is run once, alone, in a process of its own:
    the median of the memory and the fastest speed, since other work on the machine only ever slows a file down. Kept
    beside the exports."""
    inputs = {a.parent.name: content_hash(a) for a in artifacts}
    manifest = Manifest("cost", "speeds", 0, {"threads": threads, "rounds": rounds, "of": "fastest"}, inputs)

    def build(tmp: Path) -> None:
        from gori.candidate import speed

        runs: list[list[dict[str, Any]]] = [[] for _ in artifacts]
        with console.steps("speeds", rounds * len(artifacts)) as bar:
            for i in range(rounds * len(artifacts)):
                runs[i % len(artifacts)].append(speed(artifacts[i % len(artifacts)], threads))
                bar.update(i + 1, "")
        manifest.metrics["measured"] = [_of_rounds(a, r) for a, r in zip(artifacts, runs, strict=True)]

    out = artifacts[0].parents[1] / "speeds"
    make(out, manifest, build)
    return read_manifest(out)["metrics"]["measured"]


def _of_rounds(artifact: Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {"size_bytes": read_manifest(artifact)["metrics"]["file_bytes"]}
    for name, of in (("rss_mib", median), ("prefill_tps", max), ("decode_tps", max)):
        values = [r[name] for r in runs if r.get(name) is not None]
        found[name] = of(values) if values else None
    return found


def nothing_fits(every: Sequence[Shape], store: Storage, model: CostModel, budget: Budget) -> str:
    """One sentence: the shape that comes nearest, and what it is expected to miss."""
    costs = [(s, model.cautious(load_of(s, store))) for s in every]
    known = Budget(tuple(b for b in budget.bounds if b.limit.metric in costs[0][1]))
    s, nearest = min(costs, key=lambda c: (known.largest_miss(c[1]), c[0]))
    missed = [v for v in known.verdict(nearest) if not v["met"]]
    said = "; ".join(f"{v['name']} {v['value']:.4g}, bound {v['text']}, missed by {v['miss']:.1%}" for v in missed)
    return f"none of {len(every)} shapes is expected to fit {budget.text}; nearest: {s.name} ({said})"


def tell(facts: Mapping[str, Any]) -> None:
    """What the cost model says, on stderr."""
    errors = ", ".join(f"{k} {v['error']:.1%} (worst {v['worst']:.1%})" for k, v in facts["cost_model"].items())
    console.log(f"left-out exports are predicted with a mean error of: {errors}")
    for why, count in facts["left_out"].items():
        console.log(f"left out: {count} shapes {why}")
    console.log(f"{facts['fitting']} of {facts['shapes']} shapes are expected to fit; to be trained:")
    for name, m in facts["predicted"].items():
        console.log(f"  {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in m.items()))


def halve(
    run: Run, shapes: Sequence[Shape], finalists: int, short: float
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Train the shapes in rungs, the better half going on each time; the ranking of every rung, and the finalists."""
    told, left = [], list(shapes)
    steps = sizing.rungs(len(left), min(finalists, len(left)), short)
    for i, (share, count) in enumerate(steps, 1):
        left = left[:count]
        last = i == len(steps)
        place = run.out if last else run.dir(f"rung{i}")
        console.log(f"rung {i} of {len(steps)}: {len(left)} students, {share:.0%} of the recipe's steps")
        spread([(train, (run.recipe, run.out, s, share, place / s.name)) for s in left])
        scores = {s: dev_scores(run, place / s.name) for s in left}
        left.sort(key=lambda s: (-scores[s]["answer_probability"], s))
        told.append({"share": share, "ranking": [{"student": s.name, **scores[s]} for s in left]})
        for s in left:
            low, high = scores[s]["answer_probability_ci"]
            console.log(f"  {s.name}: {scores[s]['answer_probability']:.4f} ({low:.4f}–{high:.4f})")
    return told, {s.name: run.out / s.name for s in left}


def train(recipe: Recipe, home: Path, s: Shape, share: float, out: Path) -> None:
    """Distill one shape for a share of the recipe's steps, with a whole schedule of rates: a long schedule that is cut
    off would say less of where it leads."""
    from gori.distill.stage import train_student

    run, whole = Run(recipe, home), recipe.distill.train
    steps = max(min(FEWEST_STEPS, whole.steps), round(share * whole.steps))
    changes = {"steps": steps, "warmup_steps": min(whole.warmup_steps, steps // 5), "evaluate_every": 0}
    distill = recipe.distill
    if share < 1:
        distill = distill.model_copy(update={"train": whole.model_copy(update=changes)})
    if distill.layers and len(distill.layers) != s.layers:
        distill = distill.model_copy(update={"layers": None})
    student = recipe.student.model_copy(update=asdict(s))
    train_student(student, distill, run.teacher_dir, run.corpus, run.dir("tokenizer"), recipe.seed, out)


def dev_scores(run: Run, student: Path) -> dict[str, Any]:
    """How a student does on dev rows: the mean probability that it gives a row's whole wanted answer, which is what
    `exact` counts, without the noise of one greedy try; mean loss of a token, and exact answers. With intervals."""
    inputs = {"student": content_hash(student), "dev": hashes(run.corpus)["dev"]}
    manifest = Manifest("dev", student.name, 0, {"rows": DEV_ROWS}, inputs)

    def build(tmp: Path) -> None:
        manifest.metrics |= score(run, student)

    out = student.parent / "dev" / student.name
    make(out, manifest, build)
    return read_manifest(out)["metrics"]


def score(run: Run, student: Path) -> dict[str, Any]:
    import numpy as np

    from gori import checkpoint, evaluate
    from gori.data import encode
    from gori.model import parameter_count
    from gori.quantize.calibration import of_examples
    from gori.quantize.fidelity import Reference
    from gori.statistics import as_list, mean_interval, proportion_interval
    from gori.tokenizer import PAD, Tokenizer, eos_ids

    rows, tokenizer = run.corpus.dev[:DEV_ROWS], Tokenizer.load(student)
    model = checkpoint.load(student).requires_grad_(False).eval()
    batches = of_examples([encode(c, tokenizer) for c in rows], tokenizer.id(PAD)).batches
    own = Reference(model, batches)
    losses = own.of(lambda i: model.logits(own.hidden[i]))
    sums = np.bincount(losses.rows_N.numpy(), weights=losses.nll_N.numpy())
    counts = np.bincount(losses.rows_N.numpy())
    whole = np.exp(-sums)
    scored = evaluate.score(rows, evaluate.batched(model, eos_ids(student)[0]), tokenizer, run.corpus.functions)
    exact = sum(s.exact for s in scored)
    return {
        "answer_probability": float(whole.mean()),
        "answer_probability_ci": as_list(mean_interval(whole, np.ones_like(whole))),
        "loss": float(sums.sum() / counts.sum()),
        "loss_ci": as_list(mean_interval(sums, counts)),
        "exact": exact / len(rows),
        "exact_ci": as_list(proportion_interval(exact, len(rows))),
        "rows": len(rows),
        "parameters": parameter_count(model),
    }
