"""Takes integers and scales back out of a .pte that was lowered for Core ML or Vulkan, in the order of its linears.

A Core ML delegate is an .mlpackage, so export/coreml_read.py reads it; a Vulkan delegate is a flatbuffer whose
constants are the .pte's named data. It shares no code with the writing side.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.artifact import read_object
from gori.errors import GoriError
from gori.export import coreml_read
from gori.export.contents import Found
from gori.export.coreml_run import InterpretedSession
from gori.export.executorch_warnings import upstream_warnings
from gori.runtime.session import Session, SessionInfo

PTE = "model.pte"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
    try:
        backend, payload, file = payload_of(path.read_bytes())
        table, linears = _coreml(payload) if backend == "CoreMLBackend" else _vulkan(payload, file)
    except GoriError:
        raise
    except Exception as e:  # a damaged flatbuffer fails anywhere in its reader
        raise GoriError(f"{path} is not a .pte that can be read ({type(e).__name__}): export it again") from e
    names = linear_names(directory)
    if len(linears) != len(names):
        raise GoriError(f"{path} holds {len(linears)} linear layers, config.json asks for {len(names)}")
    found = {EMBEDDING: table, **dict(zip(names, linears, strict=True))}
    if found[HEAD] is table:
        del found[HEAD]
    return found


def linear_names(directory: Path) -> list[str]:
    """The linears of the decoder that config.json describes, in running order."""
    body = read_object(directory / "config.json")
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [f"model.layers.{i}.{p}.weight" for i in range(int(body["num_hidden_layers"])) for p in parts] + [HEAD]


def payload_of(pte: bytes) -> tuple[str, bytes, Any]:
    """The one delegate's backend and payload, and the parsed file."""
    with upstream_warnings():
        from executorch.exir._serialize._program import deserialize_pte_binary

        file = deserialize_pte_binary(pte)
    plan = next(p for p in file.program.execution_plan if p.name == "forward")
    held = [d.id for d in plan.delegates]
    if held not in (["CoreMLBackend"], ["VulkanBackend"]):
        raise GoriError(f"the .pte delegates to {', '.join(held) or 'nothing'}, not to Core ML or Vulkan alone")
    return held[0], bytes(file.program.backend_delegate_data[plan.delegates[0].processed.index].data), file


def open_coreml(directory: Path, threads: int | None) -> Session:
    """The MIL program inside a Core ML delegate, interpreted: graph parity, not device."""
    path = directory / PTE
    backend, payload, file = payload_of(path.read_bytes())
    if backend != "CoreMLBackend":
        raise GoriError(f"{path} is for {backend}, which nothing runs here: only a Core ML delegate is interpreted")
    program, facts = coreml_program(payload), constants(file)
    info = SessionInfo(
        engine="MIL interpreter",
        engine_version=f"specification {program.version}",
        path=str(path),
        vocab_size=facts["get_vocab_size"][0],
        context=facts["get_max_context_len"][0],
        chunk=facts["get_max_seq_len"][0],
        bos_id=next((i for i in facts["get_bos_id"] if i >= 0), None),
        eos_ids=tuple(facts["get_eos_ids"]),
        threads=threads or 1,
        file_bytes=path.stat().st_size,
        stand_in=True,
    )
    return InterpretedSession(program, info, ("tokens", "input_pos"))


def constants(file: Any) -> dict[str, list[int]]:
    """The methods of a .pte that return integers."""
    return {
        plan.name: [int(plan.values[i].val.int_val) for i in plan.outputs if hasattr(plan.values[i].val, "int_val")]
        for plan in file.program.execution_plan
    }


def coreml_program(payload: bytes) -> coreml_read.Program:
    """The MIL program in a Core ML delegate."""
    with upstream_warnings():
        from executorch.backends.apple.coreml import executorchcoreml

    with tempfile.TemporaryDirectory() as d:
        if not executorchcoreml.unflatten_directory_contents(payload, d):
            raise GoriError("the Core ML delegate's payload cannot be unpacked: export it again")
        return coreml_read.read_program(next(Path(d).rglob(coreml_read.PACKAGE)))


def _coreml(payload: bytes) -> tuple[Found, list[Found]]:
    """The table, and the linears in the order in which they run."""
    program = coreml_program(payload)
    held: dict[str, Found] = {}
    for name, (bits, q, scale) in program.integers.items():
        held[name] = Found(bits, q, scale.astype(np.float32))
    for name, value in program.constants.items():
        if isinstance(value, np.ndarray) and value.dtype == np.float16 and value.ndim == 2:
            held[name] = Found(16, value)
    linears = [held[str(o.inputs["weight"][0])] for o in program.operations if o.kind == "linear"]
    # the table is what the tokens, cast or not, look up
    ids = {"tokens"}
    for o in program.operations:
        if o.kind == "cast" and o.inputs["x"][0] in ids:
            ids.add(o.outputs[0])
    tables = [o.inputs["x"][0] for o in program.operations if o.kind == "gather" and o.inputs["indices"][0] in ids]
    if len(tables) != 1:
        raise GoriError(f"the Core ML delegate looks up {len(tables)} embedding tables, a decoder has one")
    return held[str(tables[0])], linears


def _vulkan(payload: bytes, file: Any) -> tuple[Found, list[Found]]:
    """The table, and the linears in the order in which they run."""
    from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
        VulkanDelegateHeader,
        flatbuffer_to_vk_graph,
    )

    header = VulkanDelegateHeader.from_bytes(payload[: VulkanDelegateHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    graph: Any = flatbuffer_to_vk_graph(payload[start : start + header.flatbuffer_size])

    def constant(value: int) -> NDArray[Any]:
        tensor = graph.values[value].value
        held = graph.constants[tensor.constant_id]
        entry = file.named_data.pte_data[held.named_key]
        raw = file.named_data.buffers[entry.buffer_index]
        dtype = VULKAN_TYPES[tensor.datatype.name]
        return np.frombuffer(raw, dtype, count=int(np.prod(tensor.dims))).reshape(tensor.dims)

    tables, linears = [], []
    for op in graph.chain:
        if op.name in VULKAN_WEIGHTS:
            weight, scale = (constant(op.args[i]) for i in VULKAN_WEIGHTS[op.name])
            # scales are transposed and padded to four rows
            linears.append(Found(4, unpack(weight), wide(scale.T[: len(weight)])))
        elif op.name == VULKAN_TABLE:
            weight, scale = constant(op.args[0]), constant(op.args[1])
            tables.append(Found(4, unpack(weight), wide(scale.reshape(len(weight), -1))))
    if len(tables) != 1:
        raise GoriError(f"the Vulkan delegate looks up {len(tables)} tables of 4 bits, a decoder has one")
    return tables[0], linears


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Vulkan's nibbles, plus 8 and the even index low, to int8."""
    both = np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(len(packed), -1)
    return (both.astype(np.int8) - 8).astype(np.int8)


def wide(scale: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(scale, dtype=np.float32)
