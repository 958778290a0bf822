"""The checkpoint of an unfinished run: weights, optimizers and log, in a file or, under ranks, a folder of shards.

Either is read by any number of ranks. Knows nothing of how a step is made.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor

from gori import console
from gori.artifact import os_errors, read_object, write_json
from gori.errors import GoriError, one_line
from gori.ranks import agreed, barrier, current
from gori.teacher.optim import Muon

PROGRESS = "progress.json"
"""In a folder of shards: the fingerprint, the progress, and by its step the sub-folder that is whole."""


@dataclass
class Progress:
    """What a checkpoint carries besides weights."""

    step: int = 0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    threads: int = 1
    flops: float = 0.0
    """Of the training steps so far, all ranks together (gori.teacher.flops)."""


def save(path: Path, fingerprint: str, model: nn.Module, opts: Sequence[torch.optim.Optimizer], done: Progress) -> None:
    """Write the run's checkpoint; one that is cut off while it is written leaves the one before."""
    if current().world > 1:
        _save_shards(path, fingerprint, tensors(model, opts), done)
        return
    whole = io.BytesIO()  # torch.save to a full disk raises no OSError
    body = {"fingerprint": fingerprint, "progress": json.dumps(vars(done)), "tensors": tensors(model, opts)}
    torch.save(body, whole)
    tmp = path.with_name(f"{path.name}.writing")
    try:
        with os_errors(path):
            tmp.write_bytes(whole.getbuffer())
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(tmp, path)
    except GoriError:
        tmp.unlink(missing_ok=True)
        raise


def _save_shards(path: Path, fingerprint: str, held: dict[str, Tensor], done: Progress) -> None:
    """Every rank writes its shards into a sub-folder of this step; the first then names it in progress.json."""
    folder = path if not path.is_file() else path.with_name(f"{path.name}.writing")
    barrier()  # all have seen whether it is a file
    at = folder / f"step-{done.step}"
    try:
        save_shards(held, checkpoint_id=at)
    except (CheckpointException, OSError) as e:
        raise GoriError(f"cannot write {at}: {one_line(e)}: free space or choose another --out") from e
    if not current().first:
        return
    write_json(folder / PROGRESS, {"fingerprint": fingerprint, **vars(done)})
    if folder != path:
        path.unlink()
        os.rename(folder, path)
    for old in path.glob("step-*"):
        if old.name != at.name:
            shutil.rmtree(old)


def resume(path: Path, fingerprint: str, model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> Progress:
    """Restore the run's checkpoint if it has one of the same fingerprint, whatever number of ranks wrote it."""
    if not agreed(path.exists()):
        return Progress()
    done = _load_shards(path, fingerprint, model, opts) if path.is_dir() else _load(path, fingerprint, model, opts)
    if done is None:
        console.log(f"{path.name} belongs to other settings or data: starting anew")
        return Progress()
    console.log(f"continuing at step {done.step}")
    return done


def _load(path: Path, fingerprint: str, model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> Progress | None:
    try:
        body = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise GoriError(f"{path} is not a readable training checkpoint ({e}): delete it to start anew") from e
    if body["fingerprint"] != fingerprint:
        return None
    for name, t in _with_state(model, opts).items():
        stored = body["tensors"][name]
        if isinstance(t, DTensor):
            stored = distribute_tensor(stored.to(t.device), t.device_mesh, t.placements, src_data_rank=None)
        t.copy_(stored)
    return Progress(**json.loads(body["progress"]))


def _load_shards(
    path: Path, fingerprint: str, model: nn.Module, opts: Sequence[torch.optim.Optimizer]
) -> Progress | None:
    body = read_object(path / PROGRESS) if (path / PROGRESS).exists() else {}
    if body.pop("fingerprint", None) != fingerprint:
        return None
    done = Progress(**body)
    held = _with_state(model, opts)
    try:
        with warnings.catch_warnings():  # says that one process is one process
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            load_shards(held, checkpoint_id=path / f"step-{done.step}")
    except (CheckpointException, OSError) as e:
        message = f"{path} is not a readable training checkpoint ({one_line(e)}): delete it to start anew"
        raise GoriError(message) from e
    return done


def tensors(model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Name → tensor of all weights (`model.NAME`) and of what the optimizers keep of each (`NAME.momentum`, …)."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found = {f"model.{name}": p.detach() for p, name in names.items()}
    for o in opts:
        for p, state in o.state.items():
            found |= {f"{names[p]}.{key}": t for key, t in state.items()}
    return found


@torch.no_grad()
def _with_state(model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`tensors` to be filled: the optimizers keep what they would after a first step."""
    for o in opts:
        for p in (p for group in o.param_groups for p in group["params"]):
            if isinstance(o, Muon):
                o.state[p] = {"momentum": torch.zeros_like(p)}
            else:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                o.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return tensors(model, opts)
