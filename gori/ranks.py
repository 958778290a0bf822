"""The processes that torchrun started, as one run: who am I, and a meeting of all. Knows nothing of what they do.

Without torchrun there is one rank, and nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torchrun sets and `current` reads."""

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
    """Join the group of all ranks (NCCL on GPUs, gloo on CPUs) and leave it again; nested calls join once.

    An error of one rank ends all of them: the first that fails says why, the others, whose meetings then break, are
    silent. They exit with 1.
    """
    me = current()
    if me.world == 1:
        yield me
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    if dist.is_initialized():
        yield me
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(me.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield me
    except SystemExit:
        dist.destroy_process_group()
        raise
    except Exception as e:
        try:
            first = _get_default_store().add("gori/failed", 1) == 1
        except dist.DistError:  # who holds the store has ended
            first = False
        if first:
            raise
        raise SystemExit(1) from e
    dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if current().world > 1:
        import torch.distributed as dist

        dist.barrier()


def agreed(value: Item) -> Item:
    """The first rank's value, on every rank; the others' arguments are not read."""
    if current().world == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(value: Item) -> list[Item]:
    """Every rank's value, in their order, on every rank."""
    me = current()
    if me.world == 1:
        return [value]
    import torch.distributed as dist

    found: list[Item] = [value] * me.world
    dist.all_gather_object(found, value)
    return found


def by_first(work: Callable[[], None]) -> None:
    """Let the first rank work, as if it were the only one, while the others wait; its processes are no ranks either."""
    if not current().first:
        barrier()
        return
    saved = {k: os.environ.pop(k) for k in NAMES if k in os.environ}
    try:
        work()
    finally:
        os.environ |= saved
    barrier()
