"""How a checkpoint's weights stand in a TFLite file: types, scales, and the operators that read them.

A weight is one buffer under its Hugging Face name, whoever reads it. What each runtime's kernels really compute with it
was measured (docs/litert.md); `Kernels` says whose are meant.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from gori.export.litert_file import Subgraph, blocks
from gori.export.weights import Weights, array, linear_names
from gori.quantized import EMBEDDING, QuantizedTensor
from gori.runtime.tflite import RUNTIME


class Kernels(Enum):
    """Which runtime's kernels read the weights."""

    LITERT = "LiteRT"
    """Integers enter the operators: FULLY_CONNECTED rounds its input per token, EMBEDDING_LOOKUP reads rows."""
    LEGACY = RUNTIME
    """Its operators on integers are wrong or missing: a separate operator turns them into floats first."""


def pack_int4(q: NDArray[np.int8]) -> NDArray[np.uint8]:
    """int8 `[out, in]` in [-8, 7] → uint8 `[out, in/2]`, low nibble first, two's complement."""
    u = q.view(np.uint8) & 0xF
    return (u[:, 0::2] | u[:, 1::2] << 4).astype(np.uint8, copy=False)


def place_linear(g: Subgraph, w: Weights, name: str, x: int, kernels: Kernels) -> int:
    """`x @ weight.T + bias`, float32 `[1, T, out]` of `[1, T, in]`.

    Integers whose scheme keeps activations float are dequantized once, when the file is loaded: FULLY_CONNECTED on
    integers always rounds its input.
    """
    t = w.integers.get(name)
    if t is None:
        weight, rounded = g.constant(name, array(w.floats[name])), False
    else:
        weight, rounded = place_integers(g, name, t), kernels is Kernels.LITERT and activation_bits(w, name) == 8
        if not rounded:
            weight = dequantized(g, weight)
    bias = w.bias(name)
    inputs = (
        [x, weight] if bias is None else [x, weight, g.constant(f"{name.removesuffix('.weight')}.bias", array(bias))]
    )
    options = schema.FullyConnectedOptionsT(keepNumDims=True, asymmetricQuantizeInputs=rounded)
    shape = (*g.shapes[x][:-1], g.shapes[weight][0])
    # versions as the schema counts them: 6 may lack a bias, 12 has scales per channel
    return g.op("FULLY_CONNECTED", inputs, shape, version=12 if rounded else 6, options=options)


def dequantized_values(w: Weights, kernels: Kernels) -> int:
    """How many integers of linears are turned into floats when the file is loaded."""
    linears = [n for n in linear_names(w.cfg, w.head_name) if n in w.integers]
    return sum(w.integers[n].q.numel() for n in linears if kernels is Kernels.LEGACY or activation_bits(w, n) == 16)


def activation_bits(w: Weights, name: str) -> int:
    """Of a quantized linear; a head that shares the table has its own."""
    assert w.spec is not None
    return w.spec.head_activation_bits if name == EMBEDDING else w.integers[name].scheme.activation_bits


def place_table(g: Subgraph, w: Weights, ids: int, kernels: Kernels) -> int:
    """Rows of the embedding table, float32 `[T, D]` of int32 ids `[T]`."""
    t = w.integers.get(EMBEDDING)
    if t is None:
        table = g.constant(EMBEDDING, array(w.floats[EMBEDDING]))
        return look_up(g, ids, table, version=1)
    if kernels is Kernels.LITERT and (t.scheme.bits == 4 or not t.scheme.group_size):
        return look_up(g, ids, place_integers(g, EMBEDDING, t), version=4)
    return gather_rows(g, t, ids)


def look_up(g: Subgraph, ids: int, table: int, version: int) -> int:
    shape = (g.shapes[ids][0], g.shapes[table][1])
    return g.op("EMBEDDING_LOOKUP", [ids, table], shape, version=version)


def gather_rows(g: Subgraph, t: QuantizedTensor, ids: int) -> int:
    """Integer rows times their scales, each gathered: where a runtime has no look-up of the scheme."""
    T, D, groups = g.shapes[ids][0], t.q.shape[1], t.scale.shape[1]
    table = place_gathered(g, t)
    scale = g.constant(f"{EMBEDDING}.scale", array(t.scale))
    options, cast = (
        schema.GatherOptionsT(axis=0),
        schema.CastOptionsT(schema.TensorType.INT8, schema.TensorType.FLOAT32),
    )
    rows = g.op("GATHER", [table, ids], (T, D), dtype="int8", version=2, options=options)
    rows = g.op("CAST", [rows], (T, D), options=cast)
    factors = g.op("GATHER", [scale, ids], (T, groups), options=options)
    rows = reshape(g, rows, (T, groups, D // groups))
    factors = reshape(g, factors, (T, groups, 1))
    return reshape(g, g.op("MUL", [rows, factors], (T, groups, D // groups), options=schema.MulOptionsT()), (T, D))


def dequantized(g: Subgraph, weight: int) -> int:
    """float32 of an integer tensor."""
    key = f"dequantized {weight}"
    if key not in g.constants:
        dtype = g.tensors[weight].type
        version = 6 if dtype == schema.TensorType.INT4 else 5
        g.constants[key] = g.op(
            "DEQUANTIZE", [weight], g.shapes[weight], version=version, options=schema.DequantizeOptionsT()
        )
    return g.constants[key]


def place_integers(g: Subgraph, name: str, t: QuantizedTensor) -> int:
    """The tensor of a quantized weight: int8 or packed int4, per channel or in blocks with float16 scales."""
    if name in g.constants:
        return g.constants[name]
    q, scale, bits = array(t.q), array(t.scale), t.scheme.bits
    if t.scheme.group_size:
        scales = blocks(g.constant(f"{name}.scale", scale.astype(np.float16)), t.scheme.group_size)
    else:
        scales = g.file.scales(name, scale)
    return g.constant(name, pack_int4(q) if bits == 4 else q, f"int{bits}", q.shape, scales)


def place_gathered(g: Subgraph, t: QuantizedTensor) -> int:
    """The table without scales of its own: a gathered integer keeps its tensor's, and these differ by row."""
    return g.constant(f"{EMBEDDING}.rows", array(t.q), buffer_name=EMBEDDING)


def reshape(g: Subgraph, x: int, shape: tuple[int, ...], dtype: str = "float32") -> int:
    """The same numbers in another shape."""
    if g.shapes[x] == shape:
        return x
    wanted = g.constant(f"shape_{'x'.join(map(str, shape))}", np.array(shape, np.int32))
    return g.op("RESHAPE", [x, wanted], shape, dtype=dtype, options=schema.ReshapeOptionsT(list(shape)))
