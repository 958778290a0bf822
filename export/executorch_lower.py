"""From the graph to the bytes of a .pte: torch.export, XNNPACK for every linear, memory planning.

Knows nothing of checkpoints; tracing and finishing serve the other backends, too. Two hooks make it fast, both specific
to the pinned ExecuTorch: nothing that XNNPACK takes is decomposed first, and each delegate runs one conversion pass in
place of seventeen (docs/executorch.md).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.backend_details import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.backend.utils import WhyNoPartition
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gori.errors import GoriError

Metadata = dict[str, int | bool | list[int]]
"""Methods of the program that return constants."""

decomposed: Any = torch.ops.quantized_decomposed
edge: Any = exir_ops.edge.aten
KEPT_WHOLE = [
    torch.ops.aten.linear.default,
    decomposed.choose_qparams_per_token_asymmetric.default,
    decomposed.quantize_per_token.default,
    decomposed.dequantize_per_token.default,
    decomposed.dequantize_per_channel.default,
    decomposed.dequantize_per_channel_group.default,
]
MATMULS = {edge.linear.default, edge.mm.default, edge.addmm.default, edge.bmm.default, edge.matmul.default}


@dataclass(frozen=True)
class Lowered:
    """A program's bytes."""

    pte: bytes
    delegated: tuple[str, ...]
    """The linear layers that XNNPACK holds, by module path."""
    planned_bytes: int
    """Of the memory that the program plans for caches and activations."""


class Partitioner(XnnpackPartitioner):
    """XNNPACK's partitioner with the two hooks; it refuses a graph in which a linear would stay on a slow kernel."""

    def __init__(self) -> None:
        super().__init__()
        # an undocumented key of xnnpack_preprocess: only ConvertToLinearPass runs. The other passes concern
        # convolutions, batch norm and copies, none of which this graph has
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])
        self.delegated: tuple[str, ...] = ()

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        return KEPT_WHOLE, None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        result = super().partition(exported_program)
        matmuls = [n for n in exported_program.graph.nodes if n.target in MATMULS]
        left = [_module_path(n) for n in matmuls if "delegation_tag" not in n.meta]
        if left:
            raise GoriError(
                f"XNNPACK did not take {len(left)} of {len(matmuls)} linear layers ({', '.join(left)}): "
                "they would run on a kernel many times slower, so nothing was written; choose another scheme"
            )
        self.delegated = tuple(_module_path(n) for n in matmuls)
        return result


def _module_path(node: Node) -> str:
    """`layers.0.q_proj`, the innermost module that the node came from."""
    stack = node.meta.get("nn_module_stack") or {"": (node.name, None)}
    return next(reversed(stack.values()))[0]


def lower(graph: nn.Module, chunk: int, metadata: Metadata, rows: int = 1) -> Lowered:
    """The .pte of a module `forward(tokens [1, S], input_pos [R])` whose calls take 1..chunk tokens and give the logits
    of 1..rows of them; `metadata` become methods that return constants. Raises GoriError if XNNPACK does not take every
    linear."""
    partitioner = Partitioner()
    try:
        program = finished(to_edge(traced(graph, chunk, rows), partitioner, metadata))
        plan = next(p for p in program.executorch_program.execution_plan if p.name == "forward")
        return Lowered(program.buffer, partitioner.delegated, sum(plan.non_const_buffer_sizes))
    finally:
        forget()


def arguments(tokens: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Of one call of `forward`."""
    return torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)


def traced(graph: nn.Module, chunk: int, rows: int = 1) -> ExportedProgram:
    """The graph of calls of 1..chunk tokens, logits of 1..rows of them; a length of one alone is no variable."""
    # torch.export makes a length of one a constant, and refuses a variable whose range is a single number
    shapes = {
        "tokens": {1: Dim("S", min=1, max=chunk)} if chunk > 1 else None,
        "input_pos": {0: Dim("R", min=1, max=rows)} if rows > 1 else None,
    }
    with torch.no_grad():
        example = arguments(min(2, chunk), min(2, rows))
        return torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)


def to_edge(exported: ExportedProgram, partitioner: Any, metadata: Metadata) -> EdgeProgramManager:
    """The graph with everything that the partitioner takes behind a delegate."""
    return to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner],
        constant_methods=metadata,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )


def forget() -> None:
    """Let go of what was lowered. torch's caches of shapes and of meta kernels, ExecuTorch's of compared nodes, and
    what its partitioner remembers of the last node that it left would keep the whole program, weights too (110 MiB of
    a 100M model), until the process ends."""
    FakeTensorMode.cache_clear()
    caches = [v for v in vars(ShapeEnv).values() if hasattr(v, "cache_clear")]
    for name, module in list(sys.modules.items()):
        if name.startswith("executorch."):
            caches += [v for v in vars(module).values() if isinstance(v, functools._lru_cache_wrapper)]
            if isinstance(why := vars(module).get("why"), WhyNoPartition):
                why.node = None
    for cache in caches:
        cache.cache_clear()


def finished(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """The program with its memory planned."""
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=False,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
