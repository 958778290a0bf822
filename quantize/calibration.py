"""Calibration data: some training rows as right-padded batches of token ids, and what identifies them.

Knows nothing of any method. Shapes in names: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gori.artifact import MANIFEST, read_manifest, sha256_file, sha256_json
from gori.calls import read_tools
from gori.data import Conversation, Example, collate, encode, read_conversations
from gori.errors import GoriError
from gori.model import Decoder
from gori.tokenizer import PAD, Tokenizer

BATCH_TOKENS = 4096
"""Padded tokens of a batch, at most (one longer row is a batch of its own)."""


@dataclass(frozen=True)
class Batch:
    """Rows of nearly one length, padding at the right."""

    ids_BT: Tensor
    """int64"""
    valid_BT: Tensor
    """bool, false at padding"""
    answer_BT: Tensor
    """bool: the token that follows is one that the model has to say."""
    rows_B: Tensor
    """int64: each row's number in the sample."""

    @property
    def targets(self) -> Tensor:
        """int64 `[answers]`: what is to be said at the marked positions, row by row."""
        return self.ids_BT.roll(-1, dims=1)[self.answer_BT]


@dataclass(frozen=True)
class Calibration:
    """Rows that a method may look at."""

    batches: list[Batch]
    sha256: str
    """Of the token ids, row by row: what identifies the data."""
    rows: int
    tokens: int


def read_rows(files: Sequence[Path], tools: Path) -> list[Conversation]:
    """Every conversation of some files, checked."""
    functions = read_tools(tools)
    return [c for path in files for c in read_conversations(path, functions)]


def sample(
    rows: Sequence[Conversation], tokenizer: Tokenizer, samples: int, longest: int, seed: int = 0
) -> Calibration:
    """`samples` of the rows, drawn without replacement from a seed (all of them where there are no more), as batches.

    Rows of more than `longest` tokens are left out; GoriError where nothing is left.
    """
    order = np.random.default_rng([seed, 271]).permutation(len(rows))
    picked: list[Example] = []
    for i in order:
        if len(picked) == samples:
            break
        e = encode(rows[i], tokenizer)
        if len(e.ids) <= longest:
            picked.append(e)
    if not picked:
        raise GoriError(f"no row of {len(rows)} fits {longest} tokens: there is nothing to calibrate with")
    return of_examples(picked, tokenizer.id(PAD))


def of_examples(examples: Sequence[Example], pad: int, batch_tokens: int = BATCH_TOKENS) -> Calibration:
    """Examples, ordered by length, in batches of at most `batch_tokens` padded tokens."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * len(examples[order[end]].ids) > batch_tokens:
            batches.append(_batch([examples[i] for i in order[start:end]], order[start:end], pad))
            start = end
    ids = [e.ids for e in examples]
    return Calibration(batches, sha256_json(ids), len(examples), sum(map(len, ids)))


def _batch(examples: Sequence[Example], rows: Sequence[int], pad: int) -> Batch:
    b = collate(examples, pad)
    answer = np.zeros_like(b.loss)
    answer[:, :-1] = b.loss[:, 1:]
    return Batch(torch.from_numpy(b.ids), torch.from_numpy(b.valid), torch.from_numpy(answer), torch.tensor(rows))


def beside(checkpoint: Path) -> dict[str, list[Path]]:
    """The corpus of the run that a checkpoint came from: `{"train", "dev", "test", "tools"}` → files, from the `data`
    directory beside it, where its content is what the checkpoint's manifest says it learned from; else GoriError."""
    data = Path(checkpoint).resolve().parent / "data"
    if not (data / MANIFEST).exists():
        raise GoriError(f"{checkpoint} has no data directory beside it: name rows with --calibration and --data")
    settings = read_manifest(data)["settings"]
    if settings.get("builtin"):
        tests = sorted(p for p in data.glob("*.jsonl") if p.stem not in ("train", "dev"))
        found = {"train": [data / "train.jsonl"], "dev": [data / "dev.jsonl"], "test": tests}
    else:
        named = settings["test"]
        tests = [Path(p) for p in ([named] if isinstance(named, str) else named)]
        found = {"train": [Path(settings["train"])], "dev": [Path(settings["dev"])], "test": tests}
    _check_same(checkpoint, found["train"][0])
    return {**found, "tools": [data / "tools.json"]}


def _check_same(checkpoint: Path, train: Path) -> None:
    """Refuse training rows that are not those that the checkpoint learned from."""
    if not train.exists():
        raise GoriError(f"{train}, which {checkpoint} learned from, does not exist any more: name --calibration")
    learned = read_manifest(checkpoint)["inputs"].get("train") if (Path(checkpoint) / MANIFEST).exists() else None
    if learned not in (None, sha256_file(train)):
        raise GoriError(f"{train} is not what {checkpoint} learned from (another SHA-256): name --calibration")


@torch.inference_mode()
def answer_hidden(model: Decoder, batch: Batch) -> Tensor:
    """Normed last hidden states `[answers, D]` where something is to be said, in the order of `Batch.targets`."""
    return model.hidden(batch.ids_BT, wanted_BT=batch.answer_BT)
