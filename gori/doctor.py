"""What works on this machine: found by importing and asking, not by guessing."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """One row of the table."""

    name: str
    module: str
    package: str
    extra: str | None
    """None: gori itself needs it."""


NEEDS: tuple[Need, ...] = (
    Need("torch: training, eager engine", "torch", "torch", None),
    Need("tokenizers", "tokenizers", "tokenizers", None),
    Need("safetensors: checkpoints", "safetensors", "safetensors", None),
    Need("executorch: export and run .pte", "executorch.runtime", "executorch", "executorch"),
)


def findings() -> list[dict[str, Any]]:
    """Each need, whether it imports here, its version, and the mend where it does not."""
    rows = [_row(n) for n in NEEDS]
    try:
        import torch

        cuda = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if cuda else ""
    except ImportError:
        cuda, name = False, ""
    mend = "" if cuda else "training runs on the CPU; install a CUDA build of torch for a GPU"
    rows.append({"name": "GPU for training", "works": cuda, "version": name, "needed": False, "mend": mend})
    return rows


def _row(n: Need) -> dict[str, Any]:
    try:
        importlib.import_module(n.module)
        works, why = True, ""
    except ImportError as e:
        works, why = False, f"pip install 'gori[{n.extra}]' ({e})" if n.extra else f"pip install {n.package}"
    version = importlib.metadata.version(n.package) if works else ""
    return {"name": n.name, "works": works, "version": version, "needed": n.extra is None, "mend": why}
