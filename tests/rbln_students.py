"""Students of the lengths that ATOM-Max takes, and their exports, for its tests."""

from __future__ import annotations

from pathlib import Path

from gori.export import atom_max
from gori.export.weights import Options, read_weights
from gori.model import ModelConfig
from students import LLAMA3, Case, Exported, each_once, of

CONTEXT, CHUNK = 128, 64


def wide(kind: str, **changes: object) -> ModelConfig:
    return of(kind, max_position=256, **changes)


CASES = {
    "qwen3, shared int8 table, two layers": Case(wide("qwen3", layers=2), "w8a16-channel"),
    "llama, shared int4 table, rope scaling": Case(
        wide("llama", rope_scaling=LLAMA3, head_dim=16),
        "w4a16-channel",
    ),
    "qwen2 untied, mixed, 8-bit activations": Case(
        wide("qwen2", tied=False),
        "w4a8-channel",
        "float",
        {"down_proj": "w8a8-channel"},
    ),
    "qwen3, tied but apart, table in groups": Case(wide("qwen3"), "w8a16-channel", "w8-g32"),
    "llama float": Case(wide("llama"), "float"),
}


def options(source: Path, context: int = CONTEXT, chunk: int = CHUNK, backend: str | None = None) -> Options:
    return Options(source, context, chunk, 1, (2, 3), backend)


def export(source: Path, out: Path, backend: str | None = None) -> Path:
    out.mkdir()
    atom_max.write(read_weights(source), out, options(source, backend=backend))
    return out


def maker(root: Path) -> Exported:
    """The cases under `root`."""
    return each_once(root, CASES, export)
