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

import numpy as np
from numpy.typing import NDArray

from gori.errors import GoriError, one_line
from gori.export.contents import Array, Found, named
from gori.export.executorch_pte import Pte
from gori.export.executorch_warnings import upstream_warnings

with upstream_warnings():
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile
    from executorch.exir.schema import DelegateCall, KernelCall
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
        table, linears = read_pte(Pte(path))
    except GoriError:
        raise
    except Exception as e:  # a damaged flatbuffer fails anywhere in its reader
        raise GoriError(f"{path} is not a .pte that can be read ({one_line(e)}): export it again") from e
    return named(path, table, linears)


def read_pte(file: Pte) -> tuple[Found, list[Found]]:
    """The table, and the linears in the order in which they run."""
    tables = [f for call in file.instructions() if isinstance(call, KernelCall) for f in _table(file, call)]
    if len(tables) != 1:
        raise GoriError(f"the .pte looks up {len(tables)} embedding tables, a decoder has one: export it again")
    return tables[0], [f for payload in _delegates(file) for f in _linears(file, payload)]


def _delegates(file: Pte) -> Iterator[memoryview]:
    """The payloads of XNNPACK in the order in which they run."""
    for call in file.instructions():
        if isinstance(call, DelegateCall) and file.plan.delegates[call.delegate_index].id == XNNPACK:
            yield file.payload(file.plan.delegates[call.delegate_index])


def _table(file: Pte, call: KernelCall) -> Iterator[Found]:
    bits = TABLE_OPS.get(file.plan.operators[call.op_index].name)
    if bits is None:
        return
    weight = _constant(file, call.args[0])
    scale = None if bits == 32 else _constant(file, call.args[1])
    yield _as_found(bits, unpack(weight, low_first=False) if bits == 4 else weight, scale)


def _as_found(bits: int, weight: Array, scale: Array | None) -> Found:
    return Found(bits, weight, None if scale is None else scale.astype(np.float32).reshape(len(weight), -1))


def unpack(packed: Array, *, low_first: bool) -> NDArray[np.int8]:
    """Nibbles that are their values plus 8, `[out, in / 2]`, to int8 `[out, in]`."""
    q = np.empty((len(packed), 2 * packed.shape[1]), np.int8)
    low, high = (0, 1) if low_first else (1, 0)
    q[:, low::2], q[:, high::2] = packed & 0xF, packed >> 4
    q -= 8
    return q


def _constant(file: Pte, value: int) -> Array:
    meta = file.plan.values[value].val
    assert isinstance(meta, TensorValue)
    dtype = {0: np.uint8, 1: np.int8, 5: np.float16, 6: np.float32}[int(meta.scalar_type)]
    return np.frombuffer(file.constant(meta.data_buffer_idx), dtype, int(np.prod(meta.sizes))).reshape(meta.sizes)


def _linears(file: Pte, payload: memoryview) -> Iterator[Found]:
    """The fully connected nodes of one delegate."""
    graph = _xnnpack_graph(payload)
    values = {_tensor_value(v)["id_out"]: v["xvalue_union"] for v in graph["xvalues"]}
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNFullyConnected":
            yield _found(file, graph, values[node["xnode_union"]["filter_id"]])


def _tensor_value(value: dict[str, Any]) -> dict[str, Any]:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def _found(file: Pte, graph: dict[str, Any], value: dict[str, Any]) -> Found:
    tensor = value.get("tensor_value", value)
    raw, (out, width) = _data(file, graph, tensor["constant_buffer_idx"]), tensor["dims"]
    kind = tensor["datatype"].removeprefix("xnn_datatype_")
    if kind == "fp32":
        return _as_found(32, np.frombuffer(raw, np.float32).reshape(out, width), None)
    scale_raw = _data(file, graph, value["quant_params"]["scale_buffer_idx"])
    # XNNPACK keeps block scales in bfloat16 and channel scales in float32; int4 low nibble first, plus 8
    scale = bfloat16(scale_raw) if kind == "qbint4" else np.frombuffer(scale_raw, np.float32)
    if kind == "qcint8":
        return _as_found(8, np.frombuffer(raw, np.int8).reshape(out, width), scale)
    if kind not in ("qcint4", "qbint4"):
        raise GoriError(f"the .pte holds a weight of XNNPACK's type {kind}, gori writes none of that")
    return _as_found(4, unpack(np.frombuffer(raw, np.uint8).reshape(out, width // 2), low_first=True), scale)


def bfloat16(raw: memoryview) -> NDArray[np.float32]:
    """The upper halves of float32."""
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _data(file: Pte, graph: dict[str, Any], index: int) -> memoryview:
    return file.named(graph["constant_data"][index]["named_key"])


def _xnnpack_graph(payload: memoryview) -> dict[str, Any]:
    """The delegate's flatbuffer as JSON, by the flatc and the schema of ExecuTorch's wheel."""
    header = XNNHeader.from_bytes(bytes(payload[: XNNHeader.EXPECTED_LENGTH]))
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as d:
        schema, binary = Path(d) / "schema.fbs", Path(d) / "graph.bin"
        schema.write_bytes(resources.files(SERIALIZATION).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(payload[start : start + header.flatbuffer_size])
        _flatc_decompile(d, str(schema), str(binary), ["--raw-binary"])
        return json.loads((Path(d) / "graph.json").read_text())
