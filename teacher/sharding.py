"""A decoder over the ranks that torchrun started: weights sharded with FSDP2, experts divided over an `ep` dimension.

Each rank takes its part of a step's rows; the gradient is the sum over all. Knows nothing of what the loss means.

Shapes in names: E experts, L experts of this rank, A assignments of tokens to experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gori.errors import GoriError
from gori.model import Decoder
from gori.moe import Experts, expert_rows
from gori.ranks import gathered
from gori.routing import Routes
from gori.teacher.wholes import local
from gori.teacher.workers import split

Item = TypeVar("Item")
Part = TypeVar("Part")
Result = TypeVar("Result")
WHOLE_BYTES = 4 << 30
"""A decoder of at most so many bytes stays whole on every rank from a forward pass to the end of its backward pass,
which spares the ranks a second meeting at every block (ZeRO, arXiv 1910.02054: stage 2, not 3); it is evaluated whole.
"""


class DividedExperts(Experts):
    """Experts divided over the ranks of a mesh dimension; tokens travel to their experts and back by all-to-all.

    Holds `E / size` experts as DTensors sharded along dimension 0 (GShard's expert parallelism, arXiv 2006.16668).
    """

    def __init__(self, whole: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.mesh = mesh
        for name, p in whole.named_parameters():
            mine = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(mine))

    def forward(self, x_AD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert and where each expert's end, of all experts → outputs `[A, D]` of the same rows."""
        sent_RL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.mesh.size(), -1)
        came_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(came_RL, sent_RL, group=self.mesh.get_group())
        there, here = sent_RL.sum(1).tolist(), came_RL.sum(1).tolist()
        expert_A = torch.arange(came_RL.shape[1], device=x_AD.device).repeat(len(here)).repeat_interleave(
            came_RL.flatten()
        )  # fmt: skip
        routes = Routes.of(expert_A.unsqueeze(1), came_RL.shape[1])  # what came is sorted by rank, then by expert
        x_AD = routes.sent(self._exchange(x_AD, here, there))
        y_AD = expert_rows(x_AD, routes.ends_E, local(self.gate_up), local(self.down))
        y_AD = self._exchange(routes.unsorted(y_AD), there, here)
        if (
            not self.training
        ):  # all ranks run the same tokens (`by_ranks`): one's rounding for all, or answers part ways
            y_AD = y_AD.clone()
            dist.broadcast(y_AD, group=self.mesh.get_group(), group_src=0)
        return y_AD

    def _exchange(self, x_AD: Tensor, received: list[int], sent: list[int]) -> Tensor:
        return collectives.all_to_all_single_autograd(x_AD.contiguous(), received, sent, self.mesh.get_group())


class Sharded:
    """The ranks of a run at work on a step, as `Workers` are on one machine's cores."""

    count = 1

    def __init__(self, model: Decoder, expert_parallel: int, dtype: torch.dtype | None) -> None:
        """Shard a decoder that is the same on all ranks, in place; weights are kept in float32, and gathered and
        computed with in `dtype` (None: as they are)."""
        world = dist.get_world_size()
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model
        everyone = init_device_mesh(kind, (world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        experts = _divide_experts(model, kind, world, expert_parallel) if expert_parallel > 1 else None
        model.over_ranks = partial(collectives.all_reduce, reduceOp="sum", group=everyone.get_group())
        small = _bytes(model) <= WHOLE_BYTES
        more: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": not small}
        for moe in model.moe_layers() if experts is not None else ():
            fully_shard(moe.experts, mesh=experts, shard_placement_fn=lambda _: Shard(1), **more)
        # a GPU computes one block while it gathers the next; CPUs only wait for each other
        for block in () if small and kind == "cpu" else model.layers:
            fully_shard(block, mesh=everyone, **more)
        fully_shard(model, mesh=everyone, mp_policy=policy)
        model.to(kind)  # buffers; fully_shard moved the parameters, one block at a time
        register_fsdp_forward_method(model, "hidden")
        for m in _groups(model):  # shares of the loss are of all ranks' answers: gradients are summed
            m.set_gradient_divide_factor(1.0)
            m.set_force_sum_reduction_for_comms(True)  # gloo has no other sum

    def train(self) -> None:
        self._model.train()

    def compile(self) -> None:
        for block in self._model.layers:
            block.compile(dynamic=True)

    def gradient(
        self,
        parts: Sequence[Part],
        shares: Sequence[float],
        loss: Callable[[Decoder, Part], tuple[Tensor, dict[str, float]]],
    ) -> list[dict[str, float]]:
        """Add the gradient of all ranks' `share * loss(part)` to every parameter's; returns what the loss reports of
        this rank's part."""
        ((part, share),) = zip(parts, shares, strict=True)
        value, entry = loss(self._model, part)
        (value * share).backward()
        return [entry]

    def clip(self, largest: float) -> Tensor:
        """Scale the gradients down to a norm of at most `largest`; returns their norm before."""
        grads = [local(p.grad) for p in self._model.parameters() if p.grad is not None]
        total = torch.stack([g.float().square().sum() for g in grads]).sum()  # each number is on one rank alone
        dist.all_reduce(total)
        norm = total.sqrt()
        for g in grads:
            g.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def each(self, run: Callable[[Item], Any], items: Iterable[Item]) -> None:
        for item in items:
            run(item)

    def close(self) -> None:
        """Nothing is left to end: the decoder stays sharded."""


def _divide_experts(model: Decoder, kind: str, world: int, ep: int) -> DeviceMesh:
    """Put divided experts in place of the whole ones; returns the mesh dimension that they are sharded over further."""
    cfg = model.cfg
    if cfg.experts % ep or world % ep:
        common = math.gcd(world, cfg.experts)
        raise GoriError(
            f"expert_parallel {ep} must divide {world} ranks and {cfg.experts} experts: "
            f"choose one of {[n for n in range(1, common + 1) if common % n == 0]}"
        )
    rest = world // ep
    if cfg.hidden_size % rest or 2 * cfg.intermediate_size % rest:
        raise GoriError(
            f"{rest} ranks share each expert, which divides neither evenly hidden_size {cfg.hidden_size} and "
            f"2 * intermediate_size {2 * cfg.intermediate_size}: raise expert_parallel {ep} or take fewer ranks"
        )
    mesh = init_device_mesh(kind, (rest, ep), mesh_dim_names=("rest", "ep"))
    for moe in model.moe_layers():
        moe.experts = DividedExperts(moe.experts, mesh["ep"])
    return mesh["rest"]


def by_ranks(model: Decoder, rows: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
    """`work` on all rows, which runs the decoder without gradients; every rank gets all results.

    A decoder of at most WHOLE_BYTES, its experts not divided, is gathered whole on every rank, and each works on its
    part of the rows. Of any other all ranks work on all rows, in step, since each forward pass is a meeting.
    """
    if can_be_whole(model):
        with whole_here(model):
            parts = [*split(rows, dist.get_world_size()), *([()] * dist.get_world_size())]
            return [r for some in gathered(work(parts[dist.get_rank()])) for r in some]
    found = work(rows)
    for m in _groups(model):
        m.reshard()
    return found


def can_be_whole(model: Decoder) -> bool:
    """Whether every rank may hold all weights of a decoder at once."""
    return _bytes(model) <= WHOLE_BYTES and not any(isinstance(m, DividedExperts) for m in model.modules())


@contextmanager
def whole_here(model: Decoder) -> Iterator[None]:
    """All weights of a sharded decoder on every rank meanwhile, so that each runs it without gradients as often as it
    likes. All ranks must enter; a decoder that is not sharded is as it was."""
    for m in _groups(model):
        m.unshard()
    try:
        yield
    finally:
        for m in _groups(model):
            m.reshard()


def _groups(model: Decoder) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def _bytes(model: Decoder) -> int:
    """Of all ranks' weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and whole tensor, gathered one after the other; every rank must ask for all."""
    for name, p in model.named_parameters():
        kept = p.detach()
        yield name, kept.full_tensor() if isinstance(kept, DTensor) else kept


def whole(model: Decoder) -> Decoder | None:
    """An ordinary decoder on the CPU with the weights of a sharded one, on the first rank; None on the others."""
    first = dist.get_rank() == 0
    found = {name: t.cpu() for name, t in whole_tensors(model) if first}
    if not first:
        return None
    with torch.device("meta"):
        plain = Decoder(model.cfg)
    plain.load_state_dict(found, assign=True)
    plain.rope_freq = model.rope_freq.cpu()
    return plain.eval()
