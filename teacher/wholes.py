"""Whole matrices of sharded parameters, each on one rank for a while, and their parts back where they came from.

What Muon needs, since a part of a matrix cannot be orthogonalised alone. Knows nothing of what is done to a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def is_sharded(t: Tensor) -> bool:
    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def part_of(t: DTensor, rank: int) -> tuple[slice, ...]:
    """Where a rank's shard lies in the whole: along each sharded dimension the parts of torch.chunk."""
    bounds = [(0, n) for n in t.shape]
    (place,) = (t.device_mesh.mesh == rank).nonzero().tolist()
    for at, count, placement in zip(place, t.device_mesh.shape, t.placements, strict=True):
        assert isinstance(placement, Shard)
        start, end = bounds[placement.dim]
        each = -(-(end - start) // count)
        bounds[placement.dim] = min(end, start + at * each), min(end, start + (at + 1) * each)
    return tuple(slice(*b) for b in bounds)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each item: the largest first, each to the rank that has least so far."""
    load, found = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = min(range(ranks), key=lambda r: load[r])
        load[found[i]] += sizes[i]
    return found


def by_owners(
    params: Sequence[nn.Parameter], shards: Sequence[Tensor], work: Callable[[nn.Parameter, Tensor], Tensor]
) -> list[Tensor]:
    """`work(parameter, whole)` for each parameter, on one rank each, from all ranks' `shards` (shaped as what they hold
    of it); returns this rank's parts of the results, which have the wholes' shapes and get their dtype.

    Two exchanges of all to all; a rank holds its share of the wholes meanwhile. Every rank must call it.
    """
    world, me = dist.get_world_size(), dist.get_rank()
    owner = owners([p.numel() for p in params], world)
    of_rank = [[i for i, o in enumerate(owner) if o == r] for r in range(world)]
    parts = {(i, r): part_of(as_sharded(params[i]), r) for i in of_rank[me] for r in range(world)}

    def numel(i: int, r: int) -> int:
        return int(torch.Size(s.stop - s.start for s in parts[i, r]).numel())

    theirs = [sum(shards[i].numel() for i in some) for some in of_rank]
    mine = [sum(numel(i, r) for i in of_rank[me]) for r in range(world)]
    flat = torch.cat([shards[i].reshape(-1) for some in of_rank for i in some])
    came = torch.empty(sum(mine), dtype=flat.dtype, device=flat.device)
    dist.all_to_all_single(came, flat, mine, theirs)
    wholes = {i: torch.empty(params[i].shape, dtype=flat.dtype, device=flat.device) for i in of_rank[me]}
    at = 0
    for r in range(world):
        for i, whole in wholes.items():
            some = whole[parts[i, r]]
            some.copy_(came[at : at + some.numel()].view(some.shape))
            at += some.numel()
    for i in wholes:
        wholes[i] = work(params[i], wholes[i]).to(flat.dtype)
    back = torch.cat([wholes[i][parts[i, r]].reshape(-1) for r in range(world) for i in wholes] or [came])
    dist.all_to_all_single(flat, back, theirs, mine)
    found: list[Tensor] = [flat] * len(params)
    at = 0
    for some in of_rank:
        for i in some:
            found[i] = flat[at : at + shards[i].numel()].view(shards[i].shape)
            at += shards[i].numel()
    return found


def as_sharded(t: Tensor) -> DTensor:
    assert isinstance(t, DTensor)
    return t
