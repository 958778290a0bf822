"""A checkpoint's integers to one .mlpackage for Core ML (iOS 18, macOS 15).

Knows the package's layout and what its description must say; the program and the reader are files of their own. The
program is serialised as it was built: none of coremltools' passes runs, so nothing is folded, merged or rounded again.
Nothing is quantized here.
"""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gori.console import log
from gori.errors import GoriError
from gori.export.coreml_read import CHUNK, CONTEXT, DATA, PACKAGE, SPEC, WEIGHTS
from gori.export.executorch_warnings import upstream_warnings
from gori.export.weights import Options, Weights
from gori.quantized import QuantizedTensor

MEMORY = [
    "the compiled copy of the package that Core ML makes on the device",
    "what Core ML plans for activations on the device",
]
"""What is neither in the package nor in the caches; not measured here."""
LARGEST = 65504.0
SMALLEST = 2.0**-14
"""Normal float16; a scale below it would lose digits."""


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.mlpackage; its size and what it is made of.

    Raises GoriError, and writes nothing, for a value that float16 does not hold.
    """
    check_range(w)
    load_exporter()
    from coremltools.converters.mil.backend.mil.load import load

    from gori.export.coreml_graph import OPSET, Graph

    log(f"building a MIL program of {w.cfg.layers} layers")
    program = Graph(w, o.context).program(o.chunk)
    weights = out / PACKAGE / WEIGHTS
    weights.parent.mkdir(parents=True)
    spec = load(program, str(weights.parent), specification_version=OPSET.value)
    describe(spec, w, o)
    (out / PACKAGE / SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    (out / PACKAGE / "Manifest.json").write_text(json.dumps(manifest(), indent=4) + "\n")
    operations = len(program.functions["main"].operations)
    log(f"{operations} operations, {weights.stat().st_size} bytes of weights")
    return {"mil_operations": operations, "spec_version": spec.specificationVersion, "memory_notes": MEMORY}


def describe(spec: Any, w: Weights, o: Options) -> None:
    """Say to a developer, and to gori's session, what the model takes and gives."""
    d = spec.description
    d.metadata.shortDescription = f"A {w.cfg.kind} decoder of {w.cfg.layers} layers, scheme {scheme_name(w)}"
    texts = {
        "input_ids": f"Token ids, 1 to {o.chunk} of them",
        "position": "Tokens that stand before these ids in the caches, as one number",
        "logits": "Scores of the token after the last id",
    }
    for feature in [*d.input, *d.output]:
        feature.shortDescription = texts[feature.name]
    facts = {
        CONTEXT: o.context,
        CHUNK: o.chunk,
        "vocab_size": w.cfg.vocab_size,
        "bos_id": o.bos_id,
        "eos_ids": list(o.eos_ids),
        "scheme": scheme_name(w),
    }
    for name, value in facts.items():
        d.metadata.userDefined[name] = value if isinstance(value, str) else json.dumps(value)


def scheme_name(w: Weights) -> str:
    return w.spec.scheme if w.spec else "float"


def manifest() -> dict[str, Any]:
    """The package's Manifest.json; its identifiers are made from the names, so that the same bytes come out twice."""
    files = {"Specification": SPEC, "Weights": WEIGHTS.parent}
    paths = {kind: str(path.relative_to(DATA.parent)) for kind, path in files.items()}
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper(): {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {kind}",
            "name": Path(path).name,
            "path": path,
        }
        for kind, path in paths.items()
    }
    return {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": next(iter(entries))}


def check_range(w: Weights) -> None:
    """Refuse what float16 would clip, flush or round: values, and scales with the integers that they multiply."""
    for name, t in {**w.floats, **w.integers}.items():
        values = t.scale * 2 ** (t.scheme.bits - 1) if isinstance(t, QuantizedTensor) else t
        largest = float(values.abs().max())
        if not largest <= LARGEST:
            raise GoriError(
                f"{name} reaches {largest:g} and Core ML's float16 ends at {LARGEST:g}: "
                "export with --target executorch, which computes in float32"
            )
        if isinstance(t, QuantizedTensor) and not _portable(t.scale):
            raise GoriError(
                f"scales of {name} begin at {float(t.scale.min()):g} and are not all float16 values of at least "
                f"{SMALLEST:g}, as gori's portable scales are: quantize the float checkpoint with `gori quantize`"
            )


def _portable(scale: Tensor) -> bool:
    return torch.equal(scale.half().float(), scale) and float(scale.min()) >= SMALLEST


def load_exporter() -> None:
    """Import what builds the program; GoriError if coremltools is missing."""
    # it names packages and versions that it was not tried with; torchao and ExecuTorch, which its torch front end
    # imports where they are installed, name kernels of other machines and warn
    for name in ("coremltools", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with upstream_warnings():
            from gori.export import coreml_graph  # noqa: F401
    except ImportError as e:
        raise GoriError("exporting to Core ML needs coremltools: pip install 'gori[coreml]'") from e
