"""`--target executorch --backend B`: the same integers in a .pte for a backend that does not run on this machine.

Core ML and Vulkan are lowered by the partitioners of ExecuTorch's wheel, their integers read back out of the payload,
and nothing is run: the metrics say so. QNN is lowered where Qualcomm's SDK is (export/executorch_backends_qnn.py),
OpenVINO is refused with what is known. Knows how a backend wants the graph (a Dialect) and what it holds; the graph is
export/executorch_portable.py's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from gori.console import log
from gori.errors import GoriError, nearest, one_line
from gori.export import executorch_backends_qnn as qnn
from gori.export.executorch import PTE, load_exporter, metadata
from gori.export.executorch_warnings import upstream_warnings
from gori.export.weights import Options, Weights, linear_names
from gori.targets import VARIANTS, Target

COREMLTOOLS_WARNINGS = (
    ("_TORCH_OPS_REGISTRY.__contains__ is deprecated", DeprecationWarning),  # by the partitioner
    ("has been renamed to", UserWarning),  # a cache, whose name has dots
)
MEMORY = {
    "coreml": [
        "Core ML's compiled copy of the payload, which the app unpacks to its disk on first use",
        "what Core ML plans for activations on the device",
    ],
    "vulkan": ["GPU buffers that the weights are copied to and packed into", "GPU memory for activations"],
    "qnn": ["what Qualcomm's HTP reserves for its context, spill and fill"],
}
"""Backend → memory that is neither the file nor the caches; not measured here."""
VULKAN_ROWS = 4
"""A linear's outputs must be a multiple of it: quantized_linear.py of ExecuTorch's Vulkan patterns pads to it."""


def row(backend: str) -> Target:
    """The target's row with what this backend holds; a backend that cannot carry the integers is refused."""
    if backend == "openvino":
        raise refuse_openvino()
    if backend.partition(":")[0] == "qnn":
        return qnn.row(backend)
    if backend not in VARIANTS:
        raise GoriError(f"backend {backend!r} is unknown{nearest(backend, [*VARIANTS, 'openvino', 'qnn', 'qnn:SOC'])}")
    return VARIANTS[backend]


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.pte for `o.backend`; what was delegated and that nothing was run.

    Raises GoriError, and writes nothing, for a scheme that the backend does not hold and an operation that it leaves.
    """
    assert o.backend is not None
    held = row(o.backend)
    if w.spec is None and "float" not in held.tables:
        raise GoriError(f"{held.engine} is written from integers alone: quantize with one of {', '.join(held.linears)}")
    if o.backend == "vulkan":
        check_shapes(w)
    if o.backend.startswith("qnn") and o.chunk != 1:
        raise GoriError(
            f"a call takes up to {o.chunk} tokens and Qualcomm's HTP runs graphs of fixed shapes: export with --chunk 1"
        )
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
        "memory_notes": MEMORY[o.backend.partition(":")[0]],
    }


def lower(w: Weights, o: Options) -> tuple[bytes, int]:
    """The .pte's bytes and how many operations its one delegate holds."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    from gori.export import executorch_lower as lowering
    from gori.export.executorch_portable import DIALECTS, PortableGraph

    backend = str(o.backend)
    kind = backend.partition(":")[0]
    graph = PortableGraph(w, o.context, DIALECTS[kind]).eval()
    try:
        with one_sentence(row(backend).engine):
            if kind == "qnn":
                edge = qnn.to_edge(graph, lowering.arguments(o.chunk), metadata(w, o), qnn.chip(backend))
            else:
                edge = lowering.to_edge(lowering.traced(graph, o.chunk), partitioner(backend), metadata(w, o))
            module = edge.exported_program().graph_module
            refuse_left(module, backend)
            held = sum(len(calls(m.original_module.graph_module)) for _, m, _ in get_lowered_submodules(module))
            return lowering.finished(edge).buffer, held
    finally:
        lowering.forget()


@contextmanager
def one_sentence(engine: str) -> Iterator[None]:
    """A failure of a partitioner's passes, which are not gori's, as one sentence that names the pass."""
    try:
        yield
    except GoriError:
        raise
    except Exception as e:
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        name = re.search(r"running the '(\w+)' pass", str(e))
        where = f"{name[1]} of the partitioner for {engine}" if name else f"the lowering for {engine}"
        raise GoriError(
            f"{where} failed ({type(cause).__name__}: {one_line(cause)}): nothing was written; export with --target "
            "executorch alone, which is XNNPACK, and report the model's config.json"
        ) from e


def check_shapes(w: Weights) -> None:
    """Refuse linears whose outputs Vulkan's patterns do not take: they pad the scales to a multiple of VULKAN_ROWS and
    then trace the unpadded dequantization once more."""
    for name in linear_names(w.cfg, w.head_name):
        rows = (w.integers[name].q if name in w.integers else w.floats[name]).shape[0]
        if rows % VULKAN_ROWS:
            what = "a vocabulary" if name == w.head_name else "a width"
            raise GoriError(
                f"{name} has {rows} outputs and ExecuTorch's Vulkan patterns take multiples of {VULKAN_ROWS}: train "
                f"with {what} of {rows + -rows % VULKAN_ROWS}, or export with --target executorch alone (XNNPACK)"
            )


def calls(module: Any) -> list[str]:
    """Operations of a graph, without what only takes results apart."""
    names = [str(getattr(n.target, "__name__", n.target)) for n in module.graph.nodes if n.op == "call_function"]
    return [n for n in names if n != "getitem"]


def refuse_left(module: Any, backend: str) -> None:
    """GoriError if an operation stayed outside the delegate: it would run on the CPU between two copies."""
    left = [n for n in calls(module) if n != "executorch_call_delegate"]
    if left:
        raise GoriError(
            f"{row(backend).engine} did not take {len(left)} operations ({', '.join(sorted(set(left))[:4])}): "
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
