"""Takes a written .mlpackage apart: its program's operations and constants, and the integers and scales among them.

It reads the package alone: the protocol buffer of the program and the blob file that its constants name. NumPy and
coremltools' message classes; neither torch nor coremltools itself is imported, and nothing is shared with the writing
side but names.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gori.errors import GoriError, MissingEngine, one_line
from gori.export.contents import Array, Found, named, unpack_int4

PACKAGE = "model.mlpackage"
DATA = Path("Data", "com.apple.CoreML")
SPEC, WEIGHTS = DATA / "model.mlmodel", DATA / "weights" / "weight.bin"
KEYS, VALUES = "keyCache", "valueCache"
CONTEXT, CHUNK = "context", "chunk"
QUANTIZED = "constexpr_blockwise_shift_scale"
MESSAGES = "gori_coreml_messages"

STRING, INT4 = 2, 25
IMMEDIATE: dict[int, tuple[str, Any]] = {
    1: ("bools", np.bool_),
    10: ("bytes", np.float16),
    11: ("floats", np.float32),
    21: ("bytes", np.int8),
    23: ("ints", np.int32),
    31: ("bytes", np.uint8),
    32: ("ints", np.uint16),
}
"""MIL's number of a type → the field of a value in the program, NumPy's type."""
STORED: dict[int, tuple[int, Any]] = {
    10: (1, np.float16),
    11: (2, np.float32),
    21: (4, np.int8),
    23: (14, np.int32),
    31: (3, np.uint8),
    32: (7, np.uint16),
    INT4: (8, np.uint8),
}
"""MIL's number of a type → the blob file's own number, NumPy's type of its bytes."""
RECORD = struct.Struct("<IIQQ")
"""Head of a blob: sentinel, type, bytes, where they begin."""
SENTINEL = 0xDEADBEEF


@dataclass(frozen=True)
class Operation:
    """One operation of the program."""

    kind: str
    inputs: dict[str, list[str | Array]]
    """Argument → names of variables, or constants."""
    outputs: list[str]


@dataclass(frozen=True)
class Program:
    """What a package holds."""

    operations: list[Operation]
    """In running order, constants left out."""
    constants: dict[str, Array | str]
    integers: dict[str, tuple[int, Array, Array]]
    """Variable → bits, integers int8 and scales float16."""
    states: dict[str, tuple[int, ...]]
    outputs: list[str]
    facts: dict[str, Any]
    """User-defined metadata."""
    version: int = field(default=0)


def variable(name: str) -> str:
    """A Hugging Face name as MIL can spell it."""
    return name.replace(".", "_")


def read(directory: Path) -> dict[str, Found]:
    """Weight → what model.mlpackage holds. A head that shares the table has no entry of its own.

    Raises GoriError for a package that is not a decoder's.
    """
    table, linears = weights(read_program(directory / PACKAGE), "input_ids")
    return named(directory / PACKAGE, table, linears)


def weights(program: Program, ids: str) -> tuple[Found, list[Found]]:
    """The table that the tokens `ids`, cast or not, look up, and the linears in running order: found by the operations
    that use them, since a name says nothing of what is computed. Raises GoriError for integers that neither uses."""
    tokens, tables, linears = {ids}, [], []
    for o in program.operations:
        if o.kind == "cast" and o.inputs["x"][0] in tokens:
            tokens.add(o.outputs[0])
        elif o.kind == "gather" and o.inputs["indices"][0] in tokens:
            tables.append(str(o.inputs["x"][0]))
        elif o.kind == "linear":
            linears.append(str(o.inputs["weight"][0]))
    if len(tables) != 1:
        raise GoriError(f"the program looks up {len(tables)} embedding tables, a decoder has one: export it again")
    used = {name: _weight(program, name) for name in {*tables, *linears}}
    if spare := sorted({*program.integers, *_bytes(program)} - set(used)):
        raise GoriError(
            f"{len(spare)} constants of integers, {spare[0][:80]} among them, belong to no linear and no table: "
            "export it again"
        )
    return used[tables[0]], [used[name] for name in linears]


def _weight(program: Program, name: str) -> Found:
    if name in program.integers:
        bits, q, scale = program.integers[name]
        return Found(bits, q, scale.astype(np.float32))
    value = program.constants.get(name)
    if not isinstance(value, np.ndarray) or value.dtype != np.float16 or value.ndim != 2:
        raise GoriError(f"{name[:80]} is no matrix of integers with scales or of float16: export it again")
    return Found(16, value)


def _bytes(program: Program) -> list[str]:
    """Constants of 8 bits that no scale multiplies; gori and ExecuTorch write none with more than a number."""
    held = program.constants.items()
    return [n for n, v in held if isinstance(v, np.ndarray) and v.dtype in (np.int8, np.uint8) and v.size > 1]


def read_program(package: Path) -> Program:
    """The program of a package with every constant read from its blob file."""
    try:
        messages = load_messages()
        spec = messages.Model()
        spec.ParseFromString((package / SPEC).read_bytes())
        return _program(spec, (package / WEIGHTS).read_bytes())
    except GoriError:
        raise
    except OSError as e:
        raise GoriError(f"{package} lacks {e.filename or 'a file'} ({e.strerror}): copy the whole package") from e
    except Exception as e:  # a damaged protocol buffer fails anywhere
        raise GoriError(f"{package} is not a Core ML package that can be read ({one_line(e)}): export it again") from e


def load_messages() -> ModuleType:
    """coremltools' message classes under a name of their own: `import coremltools` would import torch."""
    if MESSAGES not in sys.modules:
        spec = importlib.machinery.PathFinder.find_spec("coremltools")
        if spec is None or spec.origin is None:
            raise MissingEngine("reading a Core ML package needs coremltools: pip install 'gori[coreml]'")
        folder = Path(spec.origin).parent / "proto"
        here = importlib.util.spec_from_file_location(
            MESSAGES, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert here is not None
        sys.modules[MESSAGES] = importlib.util.module_from_spec(here)
    return importlib.import_module(f"{MESSAGES}.Model_pb2")


def _program(spec: Any, blobs: bytes) -> Program:
    if spec.WhichOneof("Type") != "mlProgram":
        raise GoriError(f"the package holds a {spec.WhichOneof('Type')}, gori writes an mlProgram: export it again")
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    states = {
        i.name: _shape(i.type.stateType.wrappedType.tensorType)
        for i in function.inputs
        if i.type.WhichOneof("type") == "stateType"
    }
    facts = {name: _fact(value) for name, value in spec.description.metadata.userDefined.items()}
    program = Program([], {}, {}, states, list(block.outputs), facts, spec.specificationVersion)
    for op in block.operations:
        _add(program, op, blobs)
    return program


def _fact(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _add(program: Program, op: Any, blobs: bytes) -> None:
    outputs = [o.name for o in op.outputs]
    if op.type == "const":
        program.constants[outputs[0]] = _value(op.attributes["val"], blobs)
        return
    inputs = {
        key: [b.name if b.WhichOneof("binding") == "name" else _value(b.value, blobs) for b in a.arguments]
        for key, a in op.inputs.items()
    }
    if op.type == QUANTIZED:
        program.integers[outputs[0]] = _quantized(op, inputs)
    else:
        program.operations.append(Operation(op.type, inputs, outputs))


def _quantized(op: Any, inputs: dict[str, list[Any]]) -> tuple[int, Array, Array]:
    data, scale = inputs["data"][0], inputs["scale"][0]
    if "offset" in inputs:
        raise GoriError(f"{op.outputs[0].name} has offsets, gori's integers are symmetric: export it again")
    if data.ndim != 2 or scale.ndim != 2 or len(data) != len(scale) or data.shape[1] % scale.shape[1]:
        raise GoriError(f"scales {list(scale.shape)} do not fit {op.outputs[0].name} {list(data.shape)}")
    bits = 4 if op.inputs["data"].arguments[0].value.type.tensorType.dataType == INT4 else 8
    return bits, data, scale


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(d.constant.size) for d in tensor.dimensions)


def _value(value: Any, blobs: bytes) -> Array | str:
    """A constant, whether it stands in the program or in the blob file."""
    tensor = value.type.tensorType
    shape, kind = _shape(tensor), tensor.dataType
    if value.WhichOneof("value") == "blobFileValue":
        return _blob(blobs, value.blobFileValue.offset, shape, kind)
    held = value.immediateValue.tensor
    if kind == STRING:
        return held.strings.values[0]
    name, dtype = IMMEDIATE[kind]
    values = getattr(held, name).values
    if name == "bytes":
        return np.frombuffer(values, dtype).reshape(shape)
    return np.array(values, dtype).reshape(shape)


def _blob(blobs: bytes, at: int, shape: Sequence[int], kind: int) -> Array:
    """One record of weight.bin, version 2: a head of 64 bytes says where its data stand; int4 is low nibble first."""
    sentinel, stored, size, offset = RECORD.unpack_from(blobs, at)
    expected, dtype = STORED[kind]
    if (sentinel, stored) != (SENTINEL, expected):
        raise GoriError(f"weight.bin has no record of type {expected} at byte {at}: copy the whole package again")
    raw: Array = np.frombuffer(blobs, dtype, size // np.dtype(dtype).itemsize, offset)
    if kind == INT4:
        return unpack_int4(raw).reshape(shape)
    return raw.reshape(shape)
