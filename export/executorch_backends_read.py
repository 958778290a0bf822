"""Takes integers and scales back out of a .pte that was lowered for Core ML or Vulkan, in the order of its linears.

A Core ML delegate is an .mlpackage, so export/coreml_read.py reads it; a Vulkan delegate is a flatbuffer whose
constants are the .pte's named data. It shares no code with the writing side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.errors import GoriError, one_line
from gori.export import coreml_read
from gori.export.contents import Found, named
from gori.export.coreml_run import InterpretedSession
from gori.export.executorch_pte import Pte
from gori.export.executorch_read import unpack
from gori.export.executorch_warnings import upstream_warnings
from gori.runtime.executorch import session_info
from gori.runtime.session import Session

PTE = "model.pte"
TOKENS = ("tokens", "input_pos")
"""What the Core ML delegate's program calls the ids and the position of the first."""
VULKAN_WEIGHTS = {"et_vk.linear_q4gsw.default": (1, 2), "et_vk.linear_dq8ca_q4gsw.default": (3, 5)}
"""Vulkan's linear of 4 bits → which of its arguments are integers and scales `[groups, out]`."""
VULKAN_TABLE = "et_vk.embedding_q4gsw.default"
VULKAN_TYPES: dict[str, Any] = {"UINT8": np.uint8, "INT8": np.int8, "FLOAT16": np.float16, "FLOAT32": np.float32}


def read(directory: Path) -> dict[str, Found]:
    """Weight → what model.pte holds; which backend it is for is read from the file. A Core ML head that shares the
    table has no entry of its own, a Vulkan head always has.

    Raises GoriError for a file that holds no such delegate.
    """
    path = directory / PTE
    with readable(path):
        file = Pte(path)
        backend, payload = delegate(file)
        if backend == "CoreMLBackend":
            table, linears = coreml_read.weights(coreml_program(payload), TOKENS[0])
        else:
            table, linears = _vulkan(payload, file)
    return named(path, table, linears)


def delegate(file: Pte) -> tuple[str, memoryview]:
    """The one delegate's backend and payload."""
    held = [d.id for d in file.plan.delegates]
    if held not in (["CoreMLBackend"], ["VulkanBackend"]):
        raise GoriError(
            f"the .pte delegates to {', '.join(held) or 'nothing'}, not to Core ML or Vulkan alone: export it again"
        )
    return held[0], file.payload(file.plan.delegates[0])


def open_coreml(directory: Path, threads: int | None) -> Session:
    """The MIL program inside a Core ML delegate, interpreted: graph parity, not device."""
    path = directory / PTE
    with readable(path):
        file = Pte(path)
        backend, payload = delegate(file)
        if backend != "CoreMLBackend":
            raise GoriError(
                f"{path} is for {backend}, which nothing runs here: only a Core ML delegate is interpreted, so take "
                "the file to its device"
            )
        program = coreml_program(payload)
        version = f"specification {program.version}"
        info = session_info(file.facts(), path, "MIL interpreter", version, threads or 1, stand_in=True)
        return InterpretedSession(program, info, TOKENS)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """GoriError for a damaged file, whose flatbuffer fails anywhere in its reader."""
    try:
        yield
    except GoriError:
        raise
    except Exception as e:
        raise GoriError(
            f"{path} is not a .pte that can be read ({type(e).__name__}: {one_line(e)}): export it again"
        ) from e


def coreml_program(payload: memoryview) -> coreml_read.Program:
    """The MIL program in a Core ML delegate."""
    with upstream_warnings():
        from executorch.backends.apple.coreml import executorchcoreml

    with tempfile.TemporaryDirectory() as d:
        if not executorchcoreml.unflatten_directory_contents(bytes(payload), d):
            raise GoriError("the Core ML delegate's payload cannot be unpacked: export it again")
        return coreml_read.read_program(next(Path(d).rglob(coreml_read.PACKAGE)))


def _vulkan(payload: memoryview, file: Pte) -> tuple[Found, list[Found]]:
    """The table, and the linears in the order in which they run."""
    from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
        VulkanDelegateHeader,
        flatbuffer_to_vk_graph,
    )

    header = VulkanDelegateHeader.from_bytes(bytes(payload[: VulkanDelegateHeader.EXPECTED_LENGTH]))
    start = header.flatbuffer_offset
    graph: Any = flatbuffer_to_vk_graph(bytes(payload[start : start + header.flatbuffer_size]))

    def constant(value: int) -> NDArray[Any]:
        tensor = graph.values[value].value
        raw = file.named(graph.constants[tensor.constant_id].named_key)
        dtype = VULKAN_TYPES[tensor.datatype.name]
        return np.frombuffer(raw, dtype, count=int(np.prod(tensor.dims))).reshape(tensor.dims)

    tables, linears = [], []
    for op in graph.chain:
        if op.name in VULKAN_WEIGHTS:
            weight, scale = (constant(op.args[i]) for i in VULKAN_WEIGHTS[op.name])
            # scales are transposed and padded to four rows
            linears.append(Found(4, unpack(weight, low_first=True), wide(scale.T[: len(weight)])))
        elif op.name == VULKAN_TABLE:
            weight, scale = constant(op.args[0]), constant(op.args[1])
            tables.append(Found(4, unpack(weight, low_first=True), wide(scale.reshape(len(weight), -1))))
    if len(tables) != 1:
        raise GoriError(
            f"the Vulkan delegate looks up {len(tables)} tables of 4 bits, a decoder has one: export it again"
        )
    return tables[0], linears


def wide(scale: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(scale, dtype=np.float32)
