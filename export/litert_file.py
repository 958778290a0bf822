"""A TFLite flatbuffer from tensors, operators and signatures: the format, and nothing of any model.

Tensors of several subgraphs may name one buffer, and one table of scales: that is how prefill, decode, the embedding
and a tied head share a weight. Data is copied once, into the finished file's bytes, aligned to 16 bytes as the schema
asks.
Importing it needs ai-edge-litert, whose generated schema packs everything but the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

SCHEMA_VERSION, IDENTIFIER, ALIGNMENT = 3, b"TFL3", 16
Array = NDArray[Any]

TYPES: dict[str, int] = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int32": schema.TensorType.INT32,
    "int8": schema.TensorType.INT8,
    "int4": schema.TensorType.INT4,
}


class Scales:
    """Per-channel scales along dimension 0, zero points all 0; packed once however many tensors name it."""

    def __init__(self, scale: NDArray[np.float32], zeros: dict[int, int]) -> None:
        self.scale, self._zeros, self._at = scale, zeros, 0

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802
        """Offset of the QuantizationParameters table; called by the generated code of a tensor."""
        if not self._at:
            n = self.scale.size
            if n not in self._zeros:
                self._zeros[n] = builder.CreateNumpyVector(np.zeros(n, np.int64))
            scale = builder.CreateNumpyVector(self.scale.astype(np.float32).ravel())
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scale)
            schema.QuantizationParametersAddZeroPoint(builder, self._zeros[n])
            self._at = schema.QuantizationParametersEnd(builder)
        return self._at


def blocks(scale_tensor: int, size: int) -> Any:
    """Quantization in blocks of `size` along dimension 1, with the float16 scales of a tensor of the same subgraph."""
    details = schema.BlockwiseQuantizationT(scales=scale_tensor, zeroPoints=-1, blockSize=size)
    kind = schema.QuantizationDetails.BlockwiseQuantization
    return schema.QuantizationParametersT(detailsType=kind, details=details)


@dataclass(frozen=True)
class Signature:
    """A named entry: the subgraph's tensors under the names by which a runtime sets and gets them."""

    name: str
    subgraph: Subgraph
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


class Subgraph:
    """Tensors and the operators between them, in running order. A tensor is its index."""

    def __init__(self, file: File, name: str) -> None:
        self.file, self.name = file, name
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []
        self.constants: dict[str, int] = {}

    def tensor(
        self, name: str, shape: Sequence[int], dtype: str = "float32", buffer: int = 0, scales: Any = None
    ) -> int:
        """A tensor; without a buffer it is computed, or set from outside."""
        self.tensors.append(
            schema.TensorT(np.asarray(shape, np.int32), TYPES[dtype], buffer, name, quantization=scales, hasRank=True)
        )
        self.shapes.append(tuple(shape))
        return len(self.tensors) - 1

    def constant(
        self, name: str, value: Array, dtype: str = "", shape: Sequence[int] = (), scales: Any = None,
        buffer_name: str = "",
    ) -> int:  # fmt: skip
        """A tensor whose content is in the file, once for each name; `dtype` and `shape` where they are not the
        array's own, as for packed integers, `buffer_name` where it shares another tensor's content."""
        if name not in self.constants:
            buffer = self.file.buffer(buffer_name or name, value)
            self.constants[name] = self.tensor(name, shape or value.shape, dtype or value.dtype.name, buffer, scales)
        return self.constants[name]

    def op(
        self, code: str, inputs: Sequence[int], shape: Sequence[int], *, dtype: str = "float32", version: int = 1,
        options: Any = None,
    ) -> int:  # fmt: skip
        """Append an operator with one output of `shape`; the output."""
        return self.op_many(code, inputs, [shape], dtype=dtype, version=version, options=options)[0]

    def op_many(
        self, code: str, inputs: Sequence[int], shapes: Sequence[Sequence[int]], *, dtype: str = "float32",
        version: int = 1, options: Any = None,
    ) -> list[int]:  # fmt: skip
        """Append an operator; its outputs."""
        stem = f"{code.lower()}_{len(self.operators)}"
        outputs = [self.tensor(stem if len(shapes) == 1 else f"{stem}_{i}", s, dtype) for i, s in enumerate(shapes)]
        kind = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T")) if options else 0
        index = self.file.opcode(getattr(schema.BuiltinOperator, code), version)
        self.operators.append(
            schema.OperatorT(
                index,
                np.asarray(inputs, np.int32),
                np.asarray(outputs, np.int32),
                builtinOptionsType=kind,
                builtinOptions=options,
            )
        )
        return outputs


class File:
    """The whole model: buffers and operator codes that its subgraphs share."""

    def __init__(self) -> None:
        self._buffers: list[Array | None] = [None]  # buffer 0 is the empty one
        self._named: dict[str, int] = {}
        self._opcodes: dict[tuple[int, int], int] = {}
        self._scales: dict[str, Scales] = {}
        self._zeros: dict[int, int] = {}
        self._metadata: list[Any] = []
        self.signatures: list[Signature] = []

    def buffer(self, name: str, value: Array) -> int:
        """The buffer of a name; its content is taken at the first call."""
        if name not in self._named:
            self._named[name] = len(self._buffers)
            self._buffers.append(np.ascontiguousarray(value))
        return self._named[name]

    def scales(self, name: str, scale: NDArray[np.float32]) -> Scales:
        """Per-channel scales of a name, once in the file."""
        return self._scales.setdefault(name, Scales(scale, self._zeros))

    def opcode(self, builtin: int, version: int) -> int:
        """Index of an operator's code."""
        return self._opcodes.setdefault((builtin, version), len(self._opcodes))

    def metadata(self, name: str, value: bytes) -> None:
        """Bytes that travel in the file under a name."""
        at = self.buffer(f"metadata {name}", np.frombuffer(value, np.uint8))
        self._metadata.append(schema.MetadataT(name, at))

    def write(self, path: Path, description: str) -> int:
        """Pack everything and write it; the bytes written. The same calls give the same bytes."""
        model = schema.ModelT(
            SCHEMA_VERSION,
            [
                schema.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), version=version, builtinCode=code)
                for code, version in self._opcodes
            ],
            [_pack_subgraph(s.subgraph, s) for s in self.signatures],
            description,
            [Data(b) for b in self._buffers],
            metadata=self._metadata,
            signatureDefs=[_signature_def(i, s) for i, s in enumerate(self.signatures)],
        )
        size = sum(b.nbytes + 64 for b in self._buffers if b is not None)
        builder = flatbuffers.Builder(size + (8 << 20))  # one allocation: growing doubles and copies
        builder.Finish(model.Pack(builder), IDENTIFIER)
        packed = memoryview(builder.Bytes)[builder.Head() :]
        path.write_bytes(packed)
        return len(packed)


class Data:
    """A buffer's content on its way into the file."""

    def __init__(self, value: Array | None) -> None:
        self._value = value

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802
        """Offset of the Buffer table; called by the generated code of the model."""
        at = None if self._value is None else self._pack_data(builder, self._value.reshape(-1).view(np.uint8))
        schema.BufferStart(builder)
        if at is not None:
            schema.BufferAddData(builder, at)
        return schema.BufferEnd(builder)

    @staticmethod
    def _pack_data(builder: flatbuffers.Builder, data: NDArray[np.uint8]) -> int:
        # flatbuffers' own CreateNumpyVector aligns to one byte, and engines read weights in place
        builder.StartVector(1, data.size, ALIGNMENT)
        builder.head = builder.Head() - data.size
        builder.Bytes[builder.head : builder.head + data.size] = data.data
        return builder.EndVector()


def _pack_subgraph(g: Subgraph, s: Signature) -> Any:
    inputs, outputs = ([*m.values()] for m in (s.inputs, s.outputs))
    return schema.SubGraphT(g.tensors, np.asarray(inputs, np.int32), np.asarray(outputs, np.int32), g.operators, g.name)


def _signature_def(index: int, s: Signature) -> Any:
    inputs, outputs = ([schema.TensorMapT(n, t) for n, t in m.items()] for m in (s.inputs, s.outputs))
    return schema.SignatureDefT(inputs, outputs, s.name, index)
