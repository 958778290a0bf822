"""`--target executorch --backend B`: the same integers in a .pte for a backend that does not run on this machine.

Core ML and Vulkan are lowered by the partitioners of ExecuTorch's wheel, their integers read back out of the payload,
and nothing is run: the metrics say so. OpenVINO and QNN are refused with what is known. Knows how a backend wants the
graph (a Dialect) and what it holds; the graph is export/executorch_portable.py's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from gori.console import log
from gori.errors import GoriError, nearest
from gori.export.executorch import PTE, load_exporter, metadata
from gori.export.executorch_warnings import upstream_warnings
from gori.export.weights import Options, Weights, linear_names
from gori.targets import VARIANTS, Target

COREMLTOOLS_WARNINGS = (
    ("_TORCH_OPS_REGISTRY.__contains__ is deprecated", DeprecationWarning),  # by the partitioner
    ("has been renamed to", UserWarning),  # a cache, whose name has dots
)
SOCS = ("SA8295", "SA8255", "SA8797")
"""Qualcomm's automotive chips among ExecuTorch's `QcomChipset`."""


def row(backend: str) -> Target:
    """The target's row with what this backend holds; a backend that cannot carry the integers is refused."""
    if backend == "openvino":
        raise refuse_openvino()
    if backend == "qnn":
        raise refuse_qnn()
    if backend not in VARIANTS:
        raise GoriError(f"backend {backend!r} is unknown{nearest(backend, [*VARIANTS, 'openvino', 'qnn', 'xnnpack'])}")
    return VARIANTS[backend]


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.pte for `o.backend`; what was delegated and that nothing was run.

    Raises GoriError, and writes nothing, for a scheme that the backend does not hold and an operation that it leaves.
    """
    assert o.backend is not None
    held = row(o.backend)
    if w.spec is None and "float" not in held.tables:
        raise GoriError(f"{held.engine} is written from integers alone: quantize with one of {', '.join(held.linears)}")
    load_exporter()
    with quiet():
        log(f"lowering {w.cfg.layers} layers for {held.engine}")
        pte, operations = lower(w, o)
    (out / PTE).write_bytes(pte)
    log(f"{operations} operations, all of them delegated")
    return {
        "backend": o.backend,
        "delegated_operations": operations,
        "linears": len(linear_names(w.cfg, w.head_name)),
    }


def lower(w: Weights, o: Options) -> tuple[bytes, int]:
    """The .pte's bytes and how many operations its one delegate holds."""
    import torch
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.lowered_backend_module import get_lowered_submodules
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from torch.export import Dim

    from gori.export.executorch_portable import DIALECTS, PortableGraph

    backend = str(o.backend)
    example = (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    shapes = {"tokens": {1: Dim("S", min=1, max=o.chunk)}, "input_pos": None}
    graph = PortableGraph(w, o.context, DIALECTS[backend]).eval()
    with torch.no_grad():
        exported = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner(backend)],
        constant_methods=metadata(w, o),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    module = edge.exported_program().graph_module
    refuse_left(module, backend)
    lowered = [m.original_module.graph_module for _, m, _ in get_lowered_submodules(module)]
    program = edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=False,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    return bytes(program.buffer), sum(len(calls(m)) for m in lowered)


def calls(module: Any) -> list[str]:
    """Operations of a graph, without what only takes results apart."""
    names = [str(getattr(n.target, "__name__", n.target)) for n in module.graph.nodes if n.op == "call_function"]
    return [n for n in names if n != "getitem"]


def refuse_left(module: Any, backend: str) -> None:
    """GoriError if an operation stayed outside the delegate: it would run on the CPU between two copies."""
    left = [n for n in calls(module) if n != "executorch_call_delegate"]
    if left:
        raise GoriError(
            f"{VARIANTS[backend].engine} did not take {len(left)} operations ({', '.join(sorted(set(left))[:4])}): "
            "nothing was written; export with --target executorch alone, which is XNNPACK"
        )


def partitioner(backend: str) -> Any:
    """The wheel's own, told what gori's graph needs."""
    if backend == "vulkan":
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner({"require_dynamic_shapes": True})
    try:
        import coremltools as ct
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    except ImportError as e:
        raise GoriError("--backend coreml needs coremltools: pip install 'gori[executorch,coreml]'") from e
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        compute_unit=ct.ComputeUnit.CPU_AND_GPU,
    )
    return CoreMLPartitioner(compile_specs=specs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the partitioners' chatter and coremltools' progress bars; and with payloads that are the same twice."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with upstream_warnings(), ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}))
            for message, category in COREMLTOOLS_WARNINGS:
                warnings.filterwarnings("ignore", f".*{message}", category)
            if importlib.util.find_spec("coremltools"):
                stack.enter_context(steady_payloads())
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def steady_payloads() -> Iterator[None]:
    """Core ML's payload without random identifiers and debug files. The identifier is the key of the device's cache of
    compiled models, so it is made from the content."""
    from executorch.backends.apple.coreml.compiler import coreml_preprocess

    from gori.export.coreml_graph import fresh_names

    wheel = coreml_preprocess.executorchcoreml

    def flatten(directory: str) -> bytes | None:
        steady(Path(directory))
        return wheel.flatten_directory_contents(directory)

    replaced = SimpleNamespace(flatten_directory_contents=flatten)
    with fresh_names(), mock.patch.object(coreml_preprocess, "executorchcoreml", replaced):
        yield


def steady(directory: Path) -> None:
    """Rewrite what differs from run to run in a payload's directory."""
    from coremltools.proto import Model_pb2

    from gori.export.coreml import manifest
    from gori.export.coreml_read import PACKAGE, SPEC, WEIGHTS

    package = directory / PACKAGE
    for debug in (*directory.glob("debug_info.json"), *package.glob("executorch_debug*")):
        debug.unlink()
    spec: Any = Model_pb2.Model()
    spec.ParseFromString((package / SPEC).read_bytes())
    raw = spec.SerializeToString(deterministic=True)
    (package / SPEC).write_bytes(raw)
    (package / "Manifest.json").write_text(json.dumps(manifest(), indent=4) + "\n")
    body = json.loads((directory / "metadata.json").read_text())
    digest = hashlib.sha256(raw + (package / WEIGHTS).read_bytes()).hexdigest()
    (directory / "metadata.json").write_text(json.dumps(body | {"identifier": f"executorch_{digest[:32]}"}))


def refuse_openvino() -> GoriError:
    """Why there is no OpenVINO variant, as far as it was tried."""
    missing = [n for n in ("openvino", "nncf") if importlib.util.find_spec(n) is None]
    need = f"needs {' and '.join(missing)} (pip install 'openvino>=2026' nncf) and even then " if missing else ""
    return GoriError(
        f"--backend openvino {need}carries no integers: ExecuTorch 1.5.1's OpenVINO partitioner leaves "
        "torchao.dequantize_affine outside its delegate and its compiler takes no call of 1 to N tokens: "
        "export with --target executorch alone, which is XNNPACK and runs on the same processors"
    )


def refuse_qnn() -> GoriError:
    """Why there is no QNN variant on this machine."""
    root = os.environ.get("QNN_SDK_ROOT")
    at = f"QNN_SDK_ROOT is {root}" if root and Path(root).is_dir() else "QNN_SDK_ROOT names no directory"
    return GoriError(
        f"--backend qnn needs Qualcomm's AI Engine Direct SDK, which is under its own licence, and {at}; gori has "
        f"lowered nothing with it (chips that ExecuTorch 1.5.1 knows: {', '.join(SOCS)}): export with --target "
        "executorch alone, which is XNNPACK, or --backend vulkan for the Adreno GPU"
    )
