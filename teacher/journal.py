"""Every step's figures while a run goes on, speeds included: a JSON Lines file beside the stage, TensorBoard if asked.

A trained folder's own log.jsonl holds no times, so that the same run writes the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gori.artifact import os_errors
from gori.errors import MissingEngine
from gori.ranks import current
from gori.teacher.flops import peak_tflops


def peak_flops(given_tflops: float | None) -> tuple[float | None, str]:
    """What all ranks' GPUs could do, FLOP/s, and why there is none where it is None."""
    import torch

    if given_tflops is None and not torch.cuda.is_available():
        return None, "no MFU: trained on a CPU"
    name = "" if given_tflops else torch.cuda.get_device_name()
    each = given_tflops or peak_tflops(name)
    if each is None:
        return None, f"no MFU: the peak of {name} is not known; set train.peak_tflops"
    return each * 1e12 * current().world, ""


@contextmanager
def journal(out: Path, peak: float | None, tensorboard: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that takes each step's entry (with seconds, tokens and flops) and writes it, with its rates, to
    `logs/NAME.jsonl` beside `out`; only the first rank writes. Its first step and what follows that in an older run's
    file are cut off there: a run that begins leaves nothing, one that continues what came before its checkpoint."""
    if not current().first:
        yield lambda _: None
        return
    path = out.parent / "logs" / f"{out.name}.jsonl"
    writer, board = _writer() if tensorboard else None, None
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    begun = False

    def record(entry: dict[str, float]) -> None:
        nonlocal begun, board
        if not begun:
            with os_errors(path):
                os.truncate(path, _end_before(path, int(entry["step"])))
            board = writer(str(path.with_suffix("")), purge_step=int(entry["step"])) if writer else None
            begun = True
        body = {k: v for k, v in entry.items() if k != "flops"}
        body["tokens_per_second"] = round(entry["tokens"] / entry["seconds"], 1)
        if peak:
            body["mfu"] = round(entry["flops"] / entry["seconds"] / peak, 4)
        with os_errors(path):
            file.write(json.dumps({**body, "seconds": round(entry["seconds"], 4)}) + "\n")
            file.flush()
        if board is not None:
            for key in body.keys() - {"step"}:
                board.add_scalar(f"{out.name}/{key}", body[key], int(entry["step"]))

    with file:
        yield record
    if board is not None:
        board.close()


def _end_before(path: Path, step: int) -> int:
    """Bytes of the file's lines before a step; a line that was cut off ends them too."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                break
            end += len(line)
    return end


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise MissingEngine("train.tensorboard needs the tensorboard package: pip install tensorboard") from e
    return SummaryWriter
