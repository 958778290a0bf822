"""The teacher stage: a recipe's shape and schedule → a trained mixture of experts in a Hugging Face folder.

Holds also what a student's stage shares with it: running the loop on a corpus and writing the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gori import checkpoint, evaluate
from gori.artifact import Manifest, ancestry, content_hash, make
from gori.calls import END, PAD
from gori.chunked import cross_entropy
from gori.corpus import Corpus, epochs, hashes
from gori.data import Conversation, Example
from gori.errors import GoriError
from gori.induction import start_with_induction
from gori.model import Decoder, ModelConfig, parameter_count
from gori.parallel import cores
from gori.ranks import current
from gori.recipe import Shape, Teacher, Train
from gori.teacher.journal import journal, peak_flops
from gori.teacher.sharding import by_ranks, whole
from gori.teacher.train import Loss, Progress, TrainBatch, TrainSettings, fit
from gori.teacher.workers import split
from gori.tokenizer import FILE, Tokenizer, copy_files
from gori.tokens import Tokens

DEV_ROWS = 200
"""Dev rows that are answered at each evaluation while training."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shape_config(shape: Shape, kind: str, vocab_size: int, **moe: int) -> ModelConfig:
    """A recipe's shape as a decoder's config."""
    names = ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "tied", "init_std")
    named = {n: getattr(shape, n) for n in (*names, "max_position", "rope_theta")}
    return ModelConfig(kind=kind, vocab_size=vocab_size, **named, **moe)  # type: ignore[arg-type]


def fresh(cfg: ModelConfig, induction: bool, seed: int) -> Decoder:
    """A decoder with random weights from a seed, with the copying circuit written in where asked."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(cfg).initialise(generator)
    return start_with_induction(model, generator) if induction else model


def answer_loss(balance: float, compiled: bool = False) -> Loss:
    """Cross-entropy of the answers, plus `balance` times the experts' mean load-balancing loss; `compiled` as in
    gori.chunked."""

    def loss(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        ce = cross_entropy(batch.answer_hidden(model), model.head_weight, batch.targets, compiled)
        entry = {"loss": round(ce.item(), 5)}
        found = model.balance()
        if found is None:
            return ce, entry
        aux, loads = found
        entry |= {"load_max": round(loads.max().item(), 4), "load_min": round(loads.min().item(), 4)}
        return ce + balance * aux, entry

    return loss


def run_loop(
    model: Decoder,
    corpus: Corpus,
    tokenizer: Tokenizer,
    loss: Loss,
    train: Train,
    seed: int,
    out: Path,
    fingerprint: str,
    cached: Callable[[int], Sequence[Example]] | Tokens | None = None,
) -> Progress:
    """Train a decoder on a corpus in place, with checkpoints beside `out`; `cached`: on these epochs of rows, or on
    these token shards. Under torchrun all ranks call it, and `model` ends sharded over them."""
    alone = current().world == 1
    threads = train.threads or (cores() if alone else torch.get_num_threads())
    names = set(TrainSettings.__dataclass_fields__)
    settings = TrainSettings(**{k: v for k, v in train.model_dump().items() if k in names})
    rows = corpus.dev[:DEV_ROWS]
    end = tokenizer.id(END)

    def on_dev(m: Decoder) -> dict[str, float]:
        def answer(part: Sequence[Conversation]) -> list[evaluate.Scored]:
            return evaluate.score(part, evaluate.batched(m, end), tokenizer, corpus.functions)

        if not alone:
            return {"dev_exact": evaluate.summary(by_ranks(m, rows, answer))["exact"]}
        with ThreadPoolExecutor(threads) as pool:
            scored = [s for part in pool.map(answer, split(rows, threads)) for s in part]
        return {"dev_exact": evaluate.summary(scored)["exact"]}

    state = training_state(out)
    state.parent.mkdir(parents=True, exist_ok=True)
    with journal(out, peak_flops(train.peak_tflops)[0], train.tensorboard) as record:
        return fit(
            model,
            cached
            or epochs(corpus.train, tokenizer, model.cfg.max_position, seed, train.swap_values, train.invent_values),
            loss,
            settings,
            seed=seed,
            pad=tokenizer.id(PAD),
            label=out.name,
            evaluate=on_dev,
            state=state,
            fingerprint=fingerprint,
            workers=threads,
            record=record,
        )


def training_state(out: Path) -> Path:
    """Where an unfinished training run keeps its checkpoint."""
    return out.parent / f".{out.name}.training.pt"


def write_trained(
    tmp: Path, model: Decoder, tokenizer_dir: Path, done: Progress, manifest: Manifest, **more: Any
) -> None:
    """Write weights, tokenizer and log.jsonl; speeds go into the manifest, so that the files depend on nothing else.

    Under torchrun every rank calls it, and the first writes."""
    trained = whole(model) if current().world > 1 else model.cpu()
    if trained is None:
        return
    checkpoint.save(trained, tmp)
    copy_files(tokenizer_dir, tmp)
    (tmp / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in done.log), encoding="utf-8")
    manifest.metrics |= {
        "parameters": parameter_count(model),
        "steps": done.step,
        "tokens": done.tokens,
        "threads": done.threads,
        "ranks": current().world,
        "train_seconds": round(done.seconds, 1),
        "tokens_per_second": round(done.tokens / max(done.seconds, 1e-9), 1),
        "final": done.log[-1],
        **more,
    }
    peak, why = peak_flops(manifest.settings["train"]["peak_tflops"])
    if peak:
        manifest.metrics["mfu"] = round(done.flops / max(done.seconds, 1e-9) / peak, 4)
    else:
        manifest.notes.append(why)


def train_teacher(section: Teacher, corpus: Corpus, tokenizer_dir: Path, seed: int, out: Path) -> bool:
    """Train the teacher of a recipe into `out`; returns whether it ran."""
    inputs = {**hashes(corpus), "tokenizer": content_hash(tokenizer_dir)}
    manifest = Manifest("teacher", "teacher", seed, section.model_dump(), inputs)
    manifest.lineage = ancestry({"tokenizer": tokenizer_dir})
    tokenizer = Tokenizer.load(tokenizer_dir)
    tokens = _tokens(section, tokenizer_dir)
    if tokens is not None:
        inputs["tokens"] = tokens.identity

    def build(tmp: Path) -> None:
        cfg = shape_config(
            section,
            "qwen3_moe",
            tokenizer.vocab_size,
            experts=section.experts,
            experts_per_token=section.experts_per_token,
        )
        model, loss = fresh(cfg, section.induction, seed), answer_loss(section.balance, section.train.compile)
        if current().world == 1:  # under ranks each block is moved when it is sharded
            model.to(device())
        done = run_loop(model, corpus, tokenizer, loss, section.train, seed, out, manifest.fingerprint, tokens)
        write_trained(tmp, model, tokenizer_dir, done, manifest, expert_load=_loads(done))

    return make(out, manifest, build, scratch=training_state(out), by_all=True)


def _tokens(section: Teacher, tokenizer_dir: Path) -> Tokens | None:
    """The token shards that a recipe names, if they are of its tokenizer and fit the model."""
    train = section.train
    if train.tokens is None:
        return None
    if train.sequence > section.max_position:
        raise GoriError(
            f"teacher.train.sequence {train.sequence} exceeds teacher.max_position {section.max_position}: raise that"
        )
    tokens = Tokens(Path(train.tokens), train.sequence)
    if tokens.tokenizer != content_hash(tokenizer_dir / FILE):
        raise GoriError(
            f"{train.tokens} was made with another tokenizer than {tokenizer_dir}: "
            f"run `gori data tokens … --tokenizer {tokenizer_dir}`"
        )
    return tokens


def _loads(done: Progress) -> dict[str, float]:
    """The most and the least used expert's share of assignments, averaged over the last tenth of the steps."""
    tail = done.log[-max(1, len(done.log) // 10) :]
    return {k: round(sum(e[k] for e in tail) / len(tail), 4) for k in ("load_max", "load_min")}
