"""One candidate of a sweep: quantize, export, answer on the real engine, measure.

It knows every room, so commands alone import it and hand its functions to the sweep. A candidate's stages stand in
OUT/candidates/KEY/{export,measure}, its integers in OUT/quantized/KEY, where candidates of other targets share them;
each is skipped when it is there, so a killed candidate goes on where it was.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gori.artifact import Manifest, content_hash, make, read_manifest, sha256_file
from gori.children import printed
from gori.quantize.journal import held
from gori.quantize.space import MIXED
from gori.quantize.workers import Outcome, Say, Task

if TYPE_CHECKING:
    from gori.data import Conversation
    from gori.quantize.fidelity import Fidelity, Reference

LONGEST_MEASUREMENT_S = 1800.0


def run(task: Task, say: Say) -> Outcome:
    """Make and measure a candidate, telling which stage begins; what is there already is not made again."""
    say("quantize")
    integers = quantized_dir(task)
    with held(integers.with_name(f".{integers.name}.lock"), wait=True):
        quantize(task, integers)
    say("export")
    artifact = task.directory / "export"
    export(task, integers, artifact)
    say("measure")
    measure(task, integers, artifact)
    stages = [read_manifest(d) for d in (integers, artifact, task.directory / "measure")]
    return {
        "state": "done",
        "metrics": stages[-1]["metrics"],
        "seconds": sum(map(elapsed_s, stages)),
        "artifact": artifact.relative_to(task.out).as_posix(),
    }


def quantized_dir(task: Task) -> Path:
    """Where a candidate's integers lie."""
    return task.out / "quantized" / task.integers_key


def quantize(task: Task, integers: Path) -> None:
    """The candidate's integers, from the sweep's calibration rows."""
    from gori.quantize.stage import quantize as run_stage
    from gori.quantize.sweep_data import CALIBRATION

    c, mix = task.candidate, None
    embedding = None if c.embedding == MIXED else c.embedding
    if c.bits_per_weight:
        from gori.quantize.mix import mix_of

        mix = mix_of(c.target, c.linear_scheme, embedding, c.bits_per_weight, None)
    run_stage(
        task.checkpoint,
        c.linear_scheme,
        embedding,
        c.method,
        integers,
        calibration=[task.data / CALIBRATION],
        samples=task.samples,
        seed=task.seed,
        mix=mix,
    )


def export(task: Task, integers: Path, artifact: Path) -> None:
    """The candidate's file, proved by its engine."""
    from gori.export.build import export as run_stage
    from gori.export.build import give_back

    run_stage(task.candidate.target, integers, artifact)
    give_back()


def longest_row(checkpoint: Path) -> int:
    """Tokens that the exported file's context holds."""
    from gori.checkpoint import read_config
    from gori.export.weights import resolve_lengths

    return resolve_lengths(read_config(checkpoint), None, None)[0]


def measure(task: Task, integers: Path, artifact: Path) -> None:
    """What the file says to the test rows, and how far its integers are from the float student."""
    from gori.quantize.sweep_data import TEST
    from gori.targets import target

    inputs = {"artifact": content_hash(artifact), "integers": content_hash(integers), **_test_inputs(task)}
    manifest = Manifest("measure", task.candidate.target, task.seed, {}, inputs)

    def build(tmp: Path) -> None:
        from gori.runtime.evaluation import evaluate_model, functions_of
        from gori.summary import fidelity

        rows = read_rows(task.data / TEST, task.checkpoint)
        answers = evaluate_model(artifact, {"test": rows}, functions_of(artifact), task.key, threads=1)
        write_answers(tmp, answers)
        manifest.metrics["size_bytes"] = read_manifest(artifact)["metrics"]["file_bytes"]
        manifest.metrics |= fidelity(answers, float_answers(task))
        rounding = target(task.candidate.target).activations
        manifest.metrics |= token_figures(divergence(task, integers, rounding))

    make(task.directory / "measure", manifest, build)


def _test_inputs(task: Task) -> dict[str, str]:
    from gori.quantize.sweep_data import TEST

    return {"student": content_hash(task.checkpoint), "test": sha256_file(task.data / TEST)}


def read_rows(path: Path, checkpoint: Path) -> list[Conversation]:
    from gori.data import read_conversations
    from gori.runtime.evaluation import functions_of

    return read_conversations(path, functions_of(checkpoint))


def write_answers(directory: Path, answers: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    (directory / "answers.jsonl").write_text("".join(lines), encoding="utf-8")


def float_answers(task: Task) -> list[dict[str, Any]]:
    """What the float student answers to the test rows: made once by whoever needs it first."""
    from gori.artifact import sha256_json
    from gori.quantize.sweep_data import TEST

    inputs = _test_inputs(task)
    out = task.out / "reference" / sha256_json(inputs)[:16]

    def build(tmp: Path) -> None:
        from gori.runtime.evaluation import evaluate_model, functions_of

        rows = read_rows(task.data / TEST, task.checkpoint)
        write_answers(tmp, evaluate_model(task.checkpoint, {"test": rows}, functions_of(task.checkpoint), "float"))

    with held(out.with_name(f".{out.name}.lock"), wait=True):
        make(out, Manifest("reference", "float", 0, {}, inputs), build)
    text = (out / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def divergence(task: Task, integers: Path, rounding: str) -> Fidelity:
    """KL, likelihood and top-1 of the eager integers against the float student, teacher-forced over the test rows."""
    from gori import quantized

    return _reference(task.checkpoint, *_test_inputs(task).values(), task.data).compare(
        quantized.load(integers, rounding)
    )


@functools.lru_cache(maxsize=1)
def _reference(checkpoint: Path, student: str, test: str, data: Path) -> Reference:
    """The float student's side, kept by a worker from one candidate to the next; `student` and `test` are hashes."""
    from gori import checkpoint as folders
    from gori.data import encode
    from gori.quantize.calibration import of_examples
    from gori.quantize.fidelity import Reference
    from gori.quantize.sweep_data import TEST
    from gori.tokenizer import PAD, Tokenizer

    tokenizer = Tokenizer.load(checkpoint)
    examples = [encode(c, tokenizer) for c in read_rows(data / TEST, checkpoint)]
    model = folders.load(checkpoint).requires_grad_(False).eval()
    return Reference(model, of_examples(examples, tokenizer.id(PAD)).batches)


def token_figures(found: Fidelity) -> dict[str, Any]:
    """Means over answer tokens with intervals over rows."""
    import numpy as np

    from gori.statistics import mean_interval

    def over_rows(values: Any) -> list[float] | None:
        sums = np.bincount(rows, weights=values.double().numpy())[counts > 0]
        interval = mean_interval(sums, counts[counts > 0])
        return None if interval is None else list(interval)

    rows = found.rows_N.numpy()
    counts = np.bincount(rows)
    logs = found.nll_N.double() - found.nll_float_N.double()
    log_interval, summary = over_rows(logs), found.summary()
    return {
        **{k: summary[k] for k in ("kl_mean", "kl_p99", "kl_max", "top1", "answer_tokens")},
        "kl_mean_ci": over_rows(found.kl_N),
        "top1_ci": over_rows(found.same_N),
        "perplexity_ratio": math.exp(float(logs.mean())),
        "perplexity_ratio_ci": log_interval and [math.exp(x) for x in log_interval],
    }


def elapsed_s(manifest: dict[str, Any]) -> float:
    """Whole seconds that a stage took."""
    began, ended = (datetime.strptime(manifest[k], "%Y-%m-%dT%H:%M:%SZ") for k in ("started", "finished"))
    return (ended - began).total_seconds()


def speed(artifact: Path, threads: int) -> dict[str, Any]:
    """Memory, load time and tokens/s of a file, in a fresh process; see gori.runtime.measure."""
    command = [sys.executable, "-m", "gori.runtime.measure", str(artifact), "--threads", str(threads)]
    return printed(command, str(artifact), LONGEST_MEASUREMENT_S)
