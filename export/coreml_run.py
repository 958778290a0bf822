"""The session over a saved .mlpackage: Core ML on macOS; elsewhere an interpreter of its program in NumPy.

The interpreter runs what was written, reloaded from the disk, with states, one rounding to float16 behind every
operation and dequantized constants. That shows that the graph is right: graph parity, not device. Knows nothing of how
a package is made.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gori.errors import GoriError, MissingEngine, one_line
from gori.export.coreml_read import PACKAGE, SPEC, WEIGHTS, Array, Operation, Program, read_program
from gori.export.mil_ops import OPERATIONS, wide
from gori.runtime.session import Logits, Session, SessionInfo

ROWS = 1024
"""Rows of a weight that are multiplied out at a time."""


class Interpreter:
    """A program with its states. It takes the program's integers away, one after the other. Linears' weights are held
    as float32, each value one of float16's: widened per call, a token of a 100M model would take eight times as long.
    """

    def __init__(self, program: Program) -> None:
        unknown = sorted({o.kind for o in program.operations} - {*OPERATIONS, "read_state", "write_state"})
        if unknown:
            raise GoriError(f"the program uses MIL's {', '.join(unknown)}, which gori does not write: export it again")
        self.program = program
        self.constants: dict[str, Any] = dict(program.constants)
        while program.integers:
            name, (_, q, scale) = program.integers.popitem()
            self.constants[name] = dequantize(q, scale)
        for name in {str(o.inputs["weight"][0]) for o in program.operations if o.kind == "linear"}:
            self.constants[name] = wide(self.constants[name])
        self.states = {name: np.zeros(shape, np.float16) for name, shape in program.states.items()}
        self.last_use = {n: i for i, o in enumerate(program.operations) for n in names(o)}

    def run(self, **inputs: Array) -> dict[str, Array]:
        """The program's outputs; its states keep what it wrote."""
        values: dict[str, Any] = dict(inputs)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            for index, operation in enumerate(self.program.operations):
                self._step(operation, values)
                for name in names(operation):
                    if self.last_use[name] == index and name not in self.program.outputs:
                        values.pop(name, None)
        return {name: values[name] for name in self.program.outputs}

    def _step(self, operation: Operation, values: dict[str, Any]) -> None:
        if operation.kind == "read_state":
            values[operation.outputs[0]] = self.states[str(operation.inputs["input"][0])]
            return

        def value(argument: str | Array) -> Any:
            if not isinstance(argument, str):
                return argument
            return values[argument] if argument in values else self.constants[argument]

        if operation.kind == "write_state":
            self.states[str(operation.inputs["input"][0])] = value(operation.inputs["data"][0])
            return
        arguments = {key: [value(a) for a in found] for key, found in operation.inputs.items()}
        result = OPERATIONS[operation.kind](arguments)
        outputs = result if isinstance(result, list) else [result]
        values.update(zip(operation.outputs, outputs, strict=True))


def names(operation: Operation) -> list[str]:
    """The variables that an operation reads."""
    return [a for found in operation.inputs.values() for a in found if isinstance(a, str)]


def dequantize(q: Array, scale: Array) -> Array:
    """What constexpr_blockwise_shift_scale gives, `[out, in]`: products rounded to float16, held as float32."""
    out, width = q.shape
    values = np.empty((out, width), np.float32)
    for i in range(0, out, ROWS):  # a few rows at a time: two copies of a large table would be the session's peak
        rows = q[i : i + ROWS]
        blocks = rows.reshape(len(rows), scale.shape[1], -1) * scale[i : i + ROWS].astype(np.float32)[:, :, None]
        values[i : i + ROWS] = blocks.astype(np.float16).reshape(len(rows), width)
    return values


class InterpretedSession(Session):
    """The stand-in; see Session. `inputs` are what a program calls the ids and the position of the first."""

    def __init__(
        self, program: Program, info: SessionInfo, inputs: tuple[str, str] = ("input_ids", "position")
    ) -> None:
        super().__init__()
        self.info, self._inputs = info, inputs
        self._interpreter = Interpreter(program)

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        values = np.array([ids], np.int32), np.array([start], np.int32)
        try:
            found = self._interpreter.run(**dict(zip(self._inputs, values, strict=True)))
            return finite(next(iter(found.values())), self.info)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, StopIteration, TypeError, ValueError) as e:
            raise GoriError(f"the program in {self.info.path} is damaged ({one_line(e)}): export it again") from e


class CoreMLSession(Session):
    """Core ML itself, on macOS 15 or later; see Session."""

    def __init__(self, package: Path, info: SessionInfo) -> None:
        super().__init__()
        import coremltools

        self.info = info
        # a flexible number of tokens is not for the Neural Engine
        self._model = coremltools.models.MLModel(str(package), compute_units=coremltools.ComputeUnit.CPU_AND_GPU)
        self._state = self._model.make_state()

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        inputs = {"input_ids": np.array([ids], np.int32), "position": np.array([start], np.int32)}
        return finite(self._model.predict(inputs, self._state)["logits"], self.info)


def finite(logits: Array, info: SessionInfo) -> Logits:
    """float32 `[V]`; GoriError where float16 overflowed."""
    row = np.asarray(logits, np.float32).reshape(-1)
    if not np.isfinite(row).all():
        raise GoriError(f"{info.path} overflows float16, its logits are not finite: export to executorch (float32)")
    return row


def check() -> None:
    """MissingEngine if what reading and running a package needs is not installed."""
    if importlib.util.find_spec("coremltools") is None:
        raise MissingEngine("running a Core ML package needs coremltools: pip install 'gori[coreml]'")


def open_directory(directory: Path, threads: int | None) -> Session:
    """Open `directory/model.mlpackage`. Neither Core ML nor NumPy takes a number of threads: 1 is what is told."""
    package = directory / PACKAGE
    program = read_program(package)
    real = sys.platform == "darwin"
    try:
        facts = program.facts
        info = SessionInfo(
            engine="Core ML" if real else "MIL interpreter",
            engine_version=platform.mac_ver()[0] if real else f"specification {program.version}",
            path=str(package),
            vocab_size=int(facts["vocab_size"]),
            context=int(facts["context"]),
            chunk=int(facts["chunk"]),
            bos_id=facts["bos_id"],
            eos_ids=tuple(facts["eos_ids"]),
            threads=threads or 1,
            file_bytes=sum((package / f).stat().st_size for f in (SPEC, WEIGHTS)),
            stand_in=not real,
        )
        return CoreMLSession(package, info) if real else InterpretedSession(program, info)
    except (AttributeError, LookupError, MemoryError, TypeError, ValueError) as e:
        raise GoriError(f"{package} is not a package that gori exported ({type(e).__name__}: {one_line(e)})") from e
