"""What works on this machine: found by importing and asking, not by guessing."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from dataclasses import dataclass
from typing import Any

from gori.errors import GoriError
from gori.targets import TARGETS, Target


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
    Need("gori serve", "uvicorn", "uvicorn", "serve"),
    Need("gori sweep --search optuna", "optuna", "optuna", "sweep"),
    Need("gori sweep --engine ray", "ray", "ray", "cluster"),
)


def findings() -> list[dict[str, Any]]:
    """Each need, whether it imports here, its version, and the mend where it does not."""
    rows = [_row(n) for n in NEEDS]
    for t in TARGETS.values():
        rows += [_target_row(t, "export", t.writer, t.reader), _target_row(t, "run", t.opener.partition(":")[0])]
    try:
        import torch

        cuda = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if cuda else ""
    except ImportError:
        cuda, name = False, ""
    mend = "" if cuda else "training runs on the CPU; install a CUDA build of torch for a GPU"
    rows.append({"name": "GPU for training", "works": cuda, "version": name, "needed": False, "mend": mend})
    return rows


def _target_row(t: Target, what: str, *modules: str) -> dict[str, Any]:
    """Whether a target's own modules import here: those that `gori export` and `gori call` would import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # engines warn of their own innards when they are imported
            for module in modules:
                getattr(importlib.import_module(module), "check", lambda: None)()
        works, mend = True, ""
    except (ImportError, GoriError) as e:
        works, mend = False, str(e) if isinstance(e, GoriError) else f"pip install 'gori[{t.extra}]' ({e})"
    if what == "run" and t.stand_in and works:
        mend = f"for `gori verify` alone: {t.stand_in}"
    found = [f"{p} {v}" for p in t.packages if (v := _version(p))]
    row = {"name": f"{t.name}: {what} {t.file}", "works": works, "version": ", ".join(found)}
    return {**row, "needed": False, "mend": mend}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _row(n: Need) -> dict[str, Any]:
    try:
        importlib.import_module(n.module)
        works, why = True, ""
    except ImportError as e:
        works, why = False, f"pip install 'gori[{n.extra}]' ({e})" if n.extra else f"pip install {n.package}"
    version = importlib.metadata.version(n.package) if works else ""
    return {"name": n.name, "works": works, "version": version, "needed": n.extra is None, "mend": why}
