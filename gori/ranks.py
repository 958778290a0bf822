"""The processes that torchrun started, as one run: who am I, and a meeting of all. Knows nothing of what they do.

Without torchrun there is one rank, and nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

TIMEOUT = timedelta(hours=2)
"""A rank may wait that long for the first one, which makes what all of them read."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Which of its machine's processes it is, and so which GPU is its own."""

    @property
    def first(self) -> bool:
        return self.rank == 0


def current() -> Ranks:
    """As torchrun's environment says; one rank without it."""
    e = os.environ
    return Ranks(int(e.get("RANK", 0)), int(e.get("WORLD_SIZE", 1)), int(e.get("LOCAL_RANK", 0)))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the group of all ranks (NCCL on GPUs, gloo on CPUs) and leave it again; nested calls join once."""
    me = current()
    if me.world == 1:
        yield me
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield me
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(me.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield me
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if current().world > 1:
        import torch.distributed as dist

        dist.barrier()
