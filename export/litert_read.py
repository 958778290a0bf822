"""Takes integers and scales back out of a written .tflite, whichever runtime it is for.

It reads the file alone and shares no code with the writing side: it walks the operators of every signature, and a
weight is what an operator really reads. How a layer is called follows from where it stands; the name in the file must
agree. Field numbers are those of tflite's schema. Knows the graphs that gori writes. NumPy alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gori.errors import GoriError
from gori.export.contents import EMBEDDING, HEAD, Found, unpack_int4
from gori.export.litert_bundle_read import BUNDLE, check_bundle
from gori.runtime.flatbuffer import FormatError, Table, at, mapped, metadata, root

FILE, IDENTIFIER = "model.tflite", b"TFL3"
FULLY_CONNECTED, EMBEDDING_LOOKUP, GATHER, DEQUANTIZE = 9, 7, 36, 6
FLOAT32, FLOAT16, INT8, INT4 = 0, 1, 9, 17
DTYPES = {FLOAT32: "<f4", FLOAT16: "<f2", INT8: "i1", INT4: "u1"}
BLOCKWISE = 2
DAMAGE = (ValueError, OverflowError, MemoryError, RecursionError)
"""What damaged bytes end in, in the parser, in NumPy, UTF-8 or JSON."""
IN_LAYER = tuple(
    [f"self_attn.{p}_proj.weight" for p in "kvqo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
)
"""The linears of a block in the order in which they run: keys and values first, since a prefill's last block ends
there."""


def read(directory: Path) -> dict[str, Found]:
    """Weight → what model.tflite holds. A head that shares the table has no entry of its own.

    Raises GoriError for a file that is not a decoder as gori writes them, or is damaged, and for a model.litertlm
    beside it that holds another model, or other text, than the directory (gori.export.litert_bundle_read).
    """
    path, bundle = directory / FILE, directory / BUNDLE
    try:
        data = mapped(path)
        found = read_tflite(data)
    except OSError as e:
        raise GoriError(f"{path} cannot be read ({e.strerror}): export it again") from e
    except DAMAGE as e:
        raise GoriError(f"{path} is not a .tflite of gori's that can be read ({e}): export it again") from e
    if bundle.exists():
        check_bundle(bundle, data)
    return found


def read_tflite(data: memoryview) -> dict[str, Found]:
    """The weights of a model; FormatError (a ValueError) for anything but gori's own.

    Every signature must read the same weights: decode has all of them, a prefill a part.
    """
    model = root(data, IDENTIFIER)
    facts = metadata(model, "gori")
    if facts is None or not isinstance(json.loads(facts), dict):
        raise FormatError("it has no metadata of gori's")
    buffers, graphs = model.tables(4), model.tables(2)
    codes = [max(c.number(0, "<b"), c.number(3)) for c in model.tables(1)]
    by_name = {s.string(2): Subgraph(at(graphs, s.number(4, "<I")), buffers, codes) for s in model.tables(7)}
    if "decode" not in by_name:
        raise FormatError(f"its signatures are {', '.join(by_name) or 'none'}, expected decode and prefill_…")
    weights = by_name["decode"].weights()
    check_complete(list(weights))
    for name, graph in by_name.items():
        check_same(graph.weights(), weights, name)
    return {name: w.found() for name, w in weights.items()}


def check_complete(names: list[str]) -> None:
    """FormatError unless the names, in running order, are a decoder's."""
    linears = names[1:]
    layers = len(linears) // len(IN_LAYER)
    want = [EMBEDDING, *(f"model.layers.{i}.{part}" for i in range(layers) for part in IN_LAYER)]
    if names not in (want, [*want, HEAD]):
        wrong = next(((n, w) for n, w in zip(names, [*want, HEAD], strict=False) if n != w), (names[-1], "another"))
        raise FormatError(f"it reads {wrong[0]} where a decoder has {wrong[1]}")


def check_same(part: dict[str, Weight], whole: dict[str, Weight], signature: str) -> None:
    """FormatError unless every weight of one signature is the other's: the same bytes under the same scales."""
    for name, w in part.items():
        other = whole.get(name)
        if other is None or not w.same(other):
            raise FormatError(f"signature {signature} reads another {name} than decode does")


@dataclass(frozen=True)
class Weight:
    """What an operator reads, not yet unpacked."""

    kind: int
    shape: tuple[int, ...]
    raw: NDArray[Any]
    scale: NDArray[Any] | None

    def same(self, other: Weight) -> bool:
        """Whether both stand at one place in the file and have equal scales."""
        here = self.raw.ctypes.data == other.raw.ctypes.data and self.raw.nbytes == other.raw.nbytes
        return here and (self.kind, self.shape) == (other.kind, other.shape) and _equal(self.scale, other.scale)

    def found(self) -> Found:
        """Integers int8 `[out, in]` and float32 scales `[out, groups]`, or floats."""
        out, width = self.shape
        if self.scale is None:
            return Found(32, self.raw.reshape(out, width))
        scale = self.scale.astype(np.float32)
        fits = scale.size >= out and scale.size % out == 0 and width % (scale.size // out) == 0
        if not (fits and np.isfinite(scale).all() and (scale > 0).all()):
            raise FormatError(f"{scale.size} scales do not fit a weight of {out} x {width}")
        q, bits = (unpack_int4(self.raw), 4) if self.kind == INT4 else (self.raw, 8)
        return Found(bits, q.reshape(out, width), scale.reshape(out, -1))


def _equal(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


class Subgraph:
    """One signature's tensors and operators."""

    def __init__(self, table: Table, buffers: list[Table], codes: list[int]) -> None:
        self._buffers, self._codes = buffers, codes
        self._tensors, self._operators = table.tables(0), table.tables(3)

    def weights(self) -> dict[str, Weight]:
        """The table, and the linears in running order, under the names that their places give them."""
        table, linears = None, []
        for code, inputs in self._calls:
            if code == FULLY_CONNECTED:
                linears.append(self._named(self._source(_item(inputs, 1))))
            elif code == EMBEDDING_LOOKUP:
                table = self._named(_item(inputs, 1))
            elif code == GATHER and self._kind(_item(inputs, 0)) == INT8:
                table = self._gathered(_item(inputs, 0))
        if table is None:
            raise FormatError("it looks up no embedding table")
        return self._by_place(table, linears)

    def _by_place(self, table: tuple[str, Weight], linears: list[tuple[str, Weight]]) -> dict[str, Weight]:
        found = {EMBEDDING: table[1]}
        for i, (name, weight) in enumerate(linears):
            layer, part = divmod(i, len(IN_LAYER))
            place = f"model.layers.{layer}.{IN_LAYER[part]}"
            last = i == len(linears) - 1 and not part
            if name == EMBEDDING and last and weight.same(table[1]):
                continue  # the head is the table
            if name != (HEAD if last else place):
                raise FormatError(f"it reads {name[:80]} where {HEAD if last else place} belongs")
            found[name] = weight
        return found

    @cached_property
    def _calls(self) -> list[tuple[int, NDArray[Any]]]:
        return [(self._code(op), op.vector(1, "<i4")) for op in self._operators]

    @cached_property
    def _made_by(self) -> dict[int, tuple[int, NDArray[Any]]]:
        """Tensor → the operator that computes it."""
        outputs = [op.vector(2, "<i4") for op in self._operators]
        return {int(o): call for call, made in zip(self._calls, outputs, strict=True) for o in made}

    def _code(self, op: Table) -> int:
        index = op.number(0, "<I")
        if index >= len(self._codes):
            raise FormatError(f"operator code {index} of {len(self._codes)}")
        return self._codes[index]

    def _source(self, tensor: int) -> int:
        """The stored tensor behind one that DEQUANTIZE computes."""
        code, inputs = self._made_by.get(tensor, (None, np.zeros(0)))
        return _item(inputs, 0) if code == DEQUANTIZE else tensor

    def _kind(self, tensor: int) -> int:
        return at(self._tensors, tensor).number(1, "<b")

    def _named(self, tensor: int) -> tuple[str, Weight]:
        t = at(self._tensors, tensor)
        return t.string(3), self._weight(t, self._scale(t))

    def _gathered(self, tensor: int) -> tuple[str, Weight]:
        """A table whose scales are gathered, too: the float tensor that another GATHER reads."""
        scales = [i for code, inputs in self._calls if code == GATHER and self._kind(i := _item(inputs, 0)) == FLOAT32]
        if len(scales) != 1:
            raise FormatError(f"it gathers {len(scales)} tables of scales, expected one")
        return EMBEDDING, self._weight(at(self._tensors, tensor), self._content(at(self._tensors, scales[0])))

    def _weight(self, t: Table, scale: NDArray[Any] | None) -> Weight:
        shape, raw = tuple(int(n) for n in t.vector(0, "<i4")), self._content(t)
        kind, name = t.number(1, "<b"), t.string(3)[:80]
        if len(shape) != 2 or min(shape) < 1 or (scale is None) != (kind == FLOAT32):
            raise FormatError(f"{name} has type {kind}, shape {list(shape)} and {'no ' * (scale is None)}scales")
        if raw.size * (2 if kind == INT4 else 1) != shape[0] * shape[1]:
            raise FormatError(f"{name} has {raw.size} stored values for {shape[0]} x {shape[1]}")
        return Weight(kind, shape, raw, scale)

    def _scale(self, t: Table) -> NDArray[Any] | None:
        """Per channel from the tensor itself, in blocks from the tensor that it names."""
        q = t.find(4)
        if q is None:
            return None
        if q.number(4, "<B") == BLOCKWISE:
            details = q.table(5)
            scale = at(self._tensors, details.number(0))
            if scale.vector(0, "<i4").tolist() != _blocks(t, details.number(2)):
                raise FormatError(f"{t.string(3)[:80]} has blocks of {details.number(2)} and other scales")
            return self._content(scale)
        scale, zeros = q.vector(2, "<f4"), q.vector(3, "<i8")
        if zeros.any() or q.number(6):
            raise FormatError(f"{t.string(3)[:80]} is not symmetric by rows, as gori's weights are")
        return scale if scale.size else None

    def _content(self, t: Table) -> NDArray[Any]:
        kind = t.number(1, "<b")
        if kind not in DTYPES:
            raise FormatError(f"{t.string(3)[:80]} is of type {kind}, gori writes none of that")
        raw = at(self._buffers, t.number(2, "<I")).vector(0, "u1")
        return raw.view(DTYPES[kind])


def _blocks(t: Table, size: int) -> list[int]:
    shape = t.vector(0, "<i4").tolist()
    if size < 1 or len(shape) != 2:
        raise FormatError(f"blocks of {size} of a tensor {shape}")
    return [shape[0], shape[1] // size]


def _item(values: NDArray[Any], index: int) -> int:
    if index >= len(values):
        raise FormatError(f"an operator has {len(values)} inputs")
    return int(values[index])
