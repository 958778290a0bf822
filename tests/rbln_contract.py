"""Run in an environment of its own: the real optimum-rbln, over a stub of `rebel`, reads an exported directory.

`python rbln_contract.py EXPORTED OPS OUT`: EXPORTED/compile_atom_max.py is run as a user would run it, with a `rebel`
that compiles nothing; then optimum-rbln's own wrapper, over the bodies in the file OPS, computes logits of two chunks
and of decode for the ids in OUT/ids.npy, which go to OUT/logits.npy. It shows that checkpoint and request are accepted
and mean what gori means. It does not show that they compile.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch

CAPTURED: list[tuple[Any, list[Any], dict[str, Any]]] = []
"""(module, input_info, keywords) of every call of the compiler."""


class Compiled:
    """What the compiler would give."""

    def save(self, path: Any) -> None:
        Path(path).write_bytes(b"stub")

    def __getattr__(self, name: str) -> Any:
        return lambda *_a, **_k: {}


class CompileContext:
    def __init__(self, use_weight_sharing: bool = False) -> None:
        self.static: list[str] = []

    def mark_static_address(self, tensor: Any, name: str) -> None:
        self.static.append(name)


def compile_from_torch(module: Any, input_info: list[Any], **named: Any) -> Compiled:
    CAPTURED.append((module, input_info, named))
    return Compiled()


def install_stub(ops: Path) -> None:
    """A `rebel` in sys.modules, and the operators that it would register."""
    rebel, context = types.ModuleType("rebel"), types.ModuleType("rebel.compile_context")
    for module in (rebel, context):
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=module is rebel)
        sys.modules[module.__name__] = module
    body = {
        "__version__": "0.0.0", "__path__": [], "compile_context": context, "compile_from_torch": compile_from_torch,
        "compile": lambda *_a, num_devices=None, **_k: Compiled(), "get_npu_name": lambda *_: "RBLN-CA25",
        "npu_is_available": lambda *_: False, "device_count": lambda: 0,
        "Runtime": type("Runtime", (), {}), "RBLNCompiledModel": Compiled,
    }  # fmt: skip
    for name, value in body.items():
        setattr(rebel, name, value)
    context.CompileContext = CompileContext  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("ops", ops)
    assert spec is not None
    assert spec.loader is not None
    bodies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bodies)
    bodies.register(force=True)


def wrapper_logits(ids: list[int], decoded: int) -> np.ndarray:
    """Logits of optimum-rbln's wrapper after the prompt `ids[:-decoded]`, in chunks, and after each further token."""
    wrapped, info, _ = CAPTURED[0]
    shapes = {name: tuple(shape) for name, shape, _dtype in info}
    chunk, blocks = shapes["input_ids"][1], shapes["block_tables"][0]
    prompt, rows = len(ids) - decoded, []
    caches = [torch.zeros(shapes[n]) for n in shapes if n.startswith("past_key_values")]
    table = torch.arange(blocks, dtype=torch.int16)
    with torch.inference_mode():
        wrapped.phase = "prefill"
        for start in range(0, prompt, chunk):
            part = ids[start : min(start + chunk, prompt)]
            padded = torch.tensor([part + [0] * (chunk - len(part))])
            at = torch.arange(start, start + chunk, dtype=torch.int32).unsqueeze(0)
            out = wrapped(padded, at, table, torch.tensor(len(part) - 1, dtype=torch.int16), *caches)
        rows.append(out[0, -1])
        wrapped.phase = "decode"
        for i in range(prompt, len(ids)):
            at = torch.tensor([[i]], dtype=torch.int32)
            rows.append(wrapped(torch.tensor([[ids[i]]]), at, table.unsqueeze(0), *caches)[0, -1])
    return torch.stack(rows).numpy()


def main() -> None:
    exported, ops, out = map(Path, sys.argv[1:4])
    install_stub(ops)
    sys.argv = ["compile_atom_max.py", "--out", str(out / "compiled")]
    driver = runpy.run_path(str(exported / "compile_atom_max.py"))
    code = driver["main"]()
    assert code == 0, code
    ids = np.load(out / "ids.npy").tolist()
    np.save(out / "logits.npy", wrapper_logits(ids, decoded=4))
    devices = {named.get("num_devices", named.get("tensor_parallel_size")) for _, _, named in CAPTURED}
    print("compiler calls", len(CAPTURED), "devices", devices, "inputs", CAPTURED[0][1][:5], CAPTURED[-1][1][:4])


if __name__ == "__main__":
    main()
