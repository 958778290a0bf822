"""A .pte taken apart: its program by ExecuTorch's own parser, its segments as views of the file's bytes.

ExecuTorch's `deserialize_pte_binary` would copy every segment twice. Knows nothing of any backend or of decoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gori.errors import GoriError
from gori.export.executorch_warnings import upstream_warnings

with upstream_warnings():
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _get_extended_header
    from executorch.exir.schema import DataLocation


class Pte:
    """One file."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        header = _get_extended_header(raw[:64])
        if header is None or not header.is_valid() or not header.segment_base_offset:
            raise GoriError(f"{path} has no segments, gori writes weights there: export it again")
        self.program = _flatbuffer_to_program(raw[: header.program_size])
        self.plan: Any = next(p for p in self.program.execution_plan if p.name == "forward")
        body = memoryview(raw)[header.segment_base_offset :]
        self._segments = [body[s.offset : s.offset + s.size] for s in self.program.segments]
        self._named = {entry.key: entry.segment_index for entry in self.program.named_data or ()}

    def instructions(self) -> Iterator[Any]:
        """What `forward` does, in running order."""
        return (i.instr_args for chain in self.plan.chains for i in chain.instructions)

    def payload(self, delegate: Any) -> memoryview:
        """What one of the plan's delegates hands to its backend."""
        processed = delegate.processed
        if processed.location != DataLocation.SEGMENT:
            return memoryview(bytes(self.program.backend_delegate_data[processed.index].data))
        return self._segments[processed.index]

    def constant(self, index: int) -> memoryview:
        """The bytes of a constant outside the delegates, with their padding."""
        held = self.program.constant_segment
        assert held is not None
        end = held.offsets[index + 1] if index + 1 < len(held.offsets) else None
        return self._segments[held.segment_index][held.offsets[index] : end]

    def named(self, key: str) -> memoryview:
        """The bytes that a delegate knows by this key."""
        return self._segments[self._named[key]]

    def facts(self) -> dict[str, list[int]]:
        """The methods that return integers."""
        return {
            plan.name: [int(plan.values[i].val.int_val) for i in plan.outputs if hasattr(plan.values[i].val, "int_val")]  # type: ignore[union-attr]
            for plan in self.program.execution_plan
        }
