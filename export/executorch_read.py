"""Takes integers and scales back out of a written .pte.

It reads the file alone: the program's flatbuffer, the XNNPACK graph of every delegate and the constants that these
name; config.json beside it only says how the linears are called. It knows how XNNPACK and `embedding_4bit` lay
integers out, and shares no code with the writing side.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gori.errors import GoriError
from gori.export.contents import Found, named
from gori.export.executorch_warnings import upstream_warnings

with upstream_warnings():
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile
    from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, ExecutionPlan, KernelCall
    from executorch.exir.schema import Tensor as TensorValue

XNNPACK = "XnnpackBackend"
SERIALIZATION = "executorch.backends.xnnpack.serialization"
TABLE_OPS = {
    "quantized_decomposed::embedding_4bit": 4,
    "quantized_decomposed::embedding_byte": 8,
    "aten::embedding": 32,
}


def read(directory: Path) -> dict[str, Found]:
    """Weight → what model.pte holds. A tied head is in the file twice and has an entry of its own.

    Raises GoriError for a file that is not a decoder's program.
    """
    path = directory / "model.pte"
    try:
        table, linears = read_pte(path.read_bytes())
    except GoriError:
        raise
    except Exception as e:  # a damaged flatbuffer fails anywhere in its reader
        raise GoriError(f"{path} is not a .pte that can be read ({type(e).__name__}): export it again") from e
    return named(path, table, linears)


def read_pte(pte: bytes) -> tuple[Found, list[Found]]:
    """The table, and the linears in the order in which they run."""
    file = deserialize_pte_binary(pte)
    plan = next(p for p in file.program.execution_plan if p.name == "forward")
    tables = [f for call in _kernel_calls(plan) for f in _table(file, plan, call)]
    if len(tables) != 1:
        raise GoriError(f"the .pte looks up {len(tables)} embedding tables, a decoder has one: export it again")
    return tables[0], [f for blob in _delegates(file, plan) for f in _linears(file, blob)]


def _instructions(plan: ExecutionPlan) -> Iterator[Any]:
    return (i.instr_args for chain in plan.chains for i in chain.instructions)


def _kernel_calls(plan: ExecutionPlan) -> Iterator[KernelCall]:
    return (i for i in _instructions(plan) if isinstance(i, KernelCall))


def _delegates(file: PTEFile, plan: ExecutionPlan) -> Iterator[bytes]:
    """The payloads of XNNPACK in the order in which they run."""
    for call in _instructions(plan):
        if isinstance(call, DelegateCall) and plan.delegates[call.delegate_index].id == XNNPACK:
            reference = plan.delegates[call.delegate_index].processed
            yield bytes(file.program.backend_delegate_data[reference.index].data)


def _table(file: PTEFile, plan: ExecutionPlan, call: KernelCall) -> Iterator[Found]:
    bits = TABLE_OPS.get(plan.operators[call.op_index].name)
    if bits is None:
        return
    weight = _constant(file, plan, call.args[0])
    scale = None if bits == 32 else _constant(file, plan, call.args[1]).float()
    if bits == 4:
        weight = torch.stack((weight >> 4, weight & 0xF), dim=-1).flatten(-2).to(torch.int8) - 8
    yield _as_found(bits, weight, scale)


def _as_found(bits: int, weight: Tensor, scale: Tensor | None) -> Found:
    return Found(bits, weight.numpy(), None if scale is None else scale.view(weight.shape[0], -1).numpy())


def _constant(file: PTEFile, plan: ExecutionPlan, value: int) -> Tensor:
    meta = plan.values[value].val
    assert isinstance(meta, TensorValue)
    dtype = {0: torch.uint8, 1: torch.int8, 5: torch.float16, 6: torch.float32}[int(meta.scalar_type)]
    raw = file.program.constant_buffer[meta.data_buffer_idx].storage
    count = torch.Size(meta.sizes).numel()
    return torch.frombuffer(bytearray(raw), dtype=dtype, count=count).view(*meta.sizes)


def _linears(file: PTEFile, payload: bytes) -> Iterator[Found]:
    """The fully connected nodes of one delegate."""
    graph = _xnnpack_graph(payload)
    values = {_tensor_value(v)["id_out"]: v["xvalue_union"] for v in graph["xvalues"]}
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNFullyConnected":
            yield _found(file, graph, values[node["xnode_union"]["filter_id"]])


def _tensor_value(value: dict[str, Any]) -> dict[str, Any]:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def _found(file: PTEFile, graph: dict[str, Any], value: dict[str, Any]) -> Found:
    tensor = value.get("tensor_value", value)
    raw, (out, width) = _data(file, graph, tensor["constant_buffer_idx"]), tensor["dims"]
    kind = tensor["datatype"].removeprefix("xnn_datatype_")
    if kind == "fp32":
        return _as_found(32, torch.frombuffer(raw, dtype=torch.float32).view(out, width), None)
    scale_raw = _data(file, graph, value["quant_params"]["scale_buffer_idx"])
    # XNNPACK keeps block scales in bfloat16 and channel scales in float32; int4 low nibble first, plus 8
    scale = torch.frombuffer(scale_raw, dtype=torch.bfloat16 if kind == "qbint4" else torch.float32).float()
    if kind == "qcint8":
        return _as_found(8, torch.frombuffer(raw, dtype=torch.int8).view(out, width), scale)
    if kind not in ("qcint4", "qbint4"):
        raise GoriError(f"the .pte holds a weight of XNNPACK's type {kind}, gori writes none of that")
    packed = torch.frombuffer(raw, dtype=torch.uint8).view(out, width // 2)
    q = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    return _as_found(4, q, scale)


def _data(file: PTEFile, graph: dict[str, Any], index: int) -> bytearray:
    assert file.named_data is not None
    entry = file.named_data.pte_data[graph["constant_data"][index]["named_key"]]
    buffer = file.named_data.buffers[entry.buffer_index]
    assert isinstance(buffer, bytes)
    return bytearray(buffer)


def _xnnpack_graph(payload: bytes) -> dict[str, Any]:
    """The delegate's flatbuffer as JSON, by the flatc and the schema of ExecuTorch's wheel."""
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as d:
        schema, binary = Path(d) / "schema.fbs", Path(d) / "graph.bin"
        schema.write_bytes(resources.files(SERIALIZATION).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(payload[start : start + header.flatbuffer_size])
        _flatc_decompile(d, str(schema), str(binary), ["--raw-binary"])
        return json.loads((Path(d) / "graph.json").read_text())
