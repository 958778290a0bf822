"""Checkpoint folders of small random decoders, float and quantized, for the tests of every target."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from decoders import random_decoder
from gori import checkpoint, quantized
from gori.model import ModelConfig, RopeScaling
from gori.quantize.rtn import round_to_nearest, rtn
from gori.quantize.schemes import SCHEMES

CONTEXT, CHUNK = 48, 16
LLAMA = ModelConfig(
    kind="llama", vocab_size=200, hidden_size=128, layers=1, heads=4, kv_heads=2, head_dim=32, intermediate_size=128,
    max_position=64, init_std=0.1,
)  # fmt: skip
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32)


@dataclasses.dataclass(frozen=True)
class Case:
    cfg: ModelConfig
    scheme: str
    embedding: str | None = None
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    """End of a module's name → a scheme of its own."""


def of(kind: str, **changes: object) -> ModelConfig:
    return dataclasses.replace(LLAMA, kind=kind, **changes)  # type: ignore[arg-type]


Exported = Callable[[str], tuple[Path, Path]]
"""Case name → (checkpoint, directory with what was made of it)."""


def each_once(root: Path, cases: Mapping[str, Case], make: Callable[[Path, Path], object]) -> Exported:
    """Cases by name under `root`, each written and given to `make(checkpoint, out)` once, when it is asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def once(name: str) -> tuple[Path, Path]:
        if name not in made:
            source, out = write_checkpoint(cases[name], root / f"{len(made)}"), root / f"{len(made)}.out"
            make(source, out)
            made[name] = (source, out)
        return made[name]

    return once


def write_checkpoint(case: Case, out: Path) -> Path:
    out.mkdir(parents=True)
    model = random_decoder(case.cfg)
    if case.scheme == "float":
        checkpoint.save(model, out)
    else:
        tensors, spec = rtn(model, case.scheme, case.embedding)
        for end, scheme in case.others.items():
            for name in [n for n in tensors if n.endswith(f"{end}.weight")]:
                weight = checkpoint.hf_tensors(model)[name]
                tensors[name] = round_to_nearest(weight, SCHEMES[scheme])
                spec.tensors[name] = SCHEMES[scheme]
        quantized.save(model, tensors, spec, out)
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    (out / "tools.json").write_text("[]")
    return out
