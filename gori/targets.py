"""The targets as data: what each writes, which engine runs it, what it needs and which schemes it holds.

One table for `gori export`, `gori doctor`, the README and docs/targets.md. Knows nothing of how a file is made; the
exporter and the reader of a target are named and imported when they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gori.errors import GoriError, nearest

PARITY = "parity.json"
"""What an exported artifact says of itself: which target, which engine ran, what was measured."""


@dataclass(frozen=True)
class Target:
    """One row of TARGETS."""

    name: str
    file: str
    """What the artifact's directory holds for the engine."""
    engine: str
    extra: str
    """`pip install 'gori[extra]'` brings what exporting and checking need."""
    packages: tuple[str, ...]
    """Distributions whose versions an export records."""
    writer: str
    """Module with `write(weights, out, options) → metrics`."""
    reader: str
    """Module with `read(directory) → {weight: Found}`, which reads the file alone."""
    opener: str
    """`module:function` of (directory, threads) → Session: the engine itself, or what stands in for it here; empty
    where nothing here runs the file (`stand_in` then says why)."""
    linears: tuple[str, ...]
    """Schemes of linear layers that the format holds."""
    tables: tuple[str, ...]
    """Schemes of the embedding table."""
    activations: str
    """How the engine rounds a quantized linear's input: `scheme` as the scheme says, `none` not at all, `q8_0`
    llama.cpp's blocks of 32."""
    arithmetic: str
    """`float32` or `float16`."""
    copied_head: bool = False
    """Whether the format stores a tied table once more as the head."""
    float_bits: int = 32
    """Width of the weights that stayed float."""
    carries_tokenizer: bool = False
    """Whether the file holds the tokenizer, too: its size is then no waste."""
    stand_in: str = ""
    """Where the engine does not run on Linux: what was run in its place. Empty: the engine itself runs."""
    second: tuple[str, str] | None = None
    """A second file for another engine, made where the checkpoint has a tokenizer, and `module:function` of (directory,
    golden answers, longest) that says how many of them that engine gives."""
    docs: str = ""


def named(place: str) -> Callable[..., Any]:
    """The function that a row names as `module:function`; what its module needs is imported now."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def spelled(*parts: str) -> tuple[str, ...]:
    """Scheme names of bits-and-activations × granularities: `spelled("w4a8:channel,g32")`."""
    return tuple(f"{b}-{g}" for part in parts for b, _, gs in [part.partition(":")] for g in gs.split(","))


EVERY_LINEAR = spelled(*(f"{bits}:channel,g32,g64,g128" for bits in ("w8a8", "w8a16", "w4a8", "w4a16")))
EVERY_TABLE = ("float", *spelled("w8:channel,g32,g64,g128", "w4:channel,g32,g64,g128"))

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="executorch",
            file="model.pte",
            engine="ExecuTorch (XNNPACK)",
            extra="executorch",
            packages=("executorch",),
            writer="gori.export.executorch",
            reader="gori.export.executorch_read",
            opener="gori.runtime.executorch:open_directory",
            linears=spelled("w8a8:channel", "w4a8:channel,g32,g64,g128"),
            tables=EVERY_TABLE,
            activations="scheme",
            arithmetic="float32",
            copied_head=True,
            docs="executorch.md",
        ),
        Target(
            name="litert",
            second=("model.litertlm", "gori.runtime.litert_lm:same_answers"),
            file="model.tflite",
            engine="LiteRT",
            extra="litert",
            packages=("ai-edge-litert", "litert-lm-builder", "litert-lm-api"),
            writer="gori.export.litert",
            reader="gori.export.litert_read",
            opener="gori.runtime.litert:open_directory",
            linears=spelled("w8a8:channel", "w4a8:channel,g32,g64,g128", "w8a16:channel", "w4a16:channel"),
            tables=EVERY_TABLE,
            activations="scheme",
            arithmetic="float32",
            docs="litert.md",
        ),
        Target(
            name="tflite",
            file="model.tflite",
            engine="tflite-runtime 2.14",
            extra="litert",
            packages=("ai-edge-litert",),
            writer="gori.export.tflite",
            reader="gori.export.litert_read",
            opener="gori.runtime.tflite:open_directory",
            linears=spelled("w8a8:channel", "w8a16:channel"),
            tables=("float", *spelled("w8:channel,g32,g64,g128")),
            activations="none",
            arithmetic="float32",
            docs="litert.md",
        ),
        Target(
            name="coreml",
            file="model.mlpackage",
            engine="Core ML",
            extra="coreml",
            packages=("coremltools",),
            writer="gori.export.coreml",
            reader="gori.export.coreml_read",
            opener="gori.export.coreml_run:open_directory",
            linears=EVERY_LINEAR,
            tables=EVERY_TABLE,
            activations="none",
            arithmetic="float16",
            float_bits=16,
            stand_in="an interpreter of the MIL program in NumPy: graph parity, not device",
            docs="coreml.md",
        ),
        Target(
            name="gguf",
            carries_tokenizer=True,
            file="model.gguf",
            engine="llama.cpp",
            extra="gguf",
            packages=("gguf", "xllamacpp"),
            writer="gori.export.gguf",
            reader="gori.export.gguf_read",
            opener="gori.runtime.gguf:open_directory",
            linears=(*EVERY_LINEAR, *spelled("w5a8:channel,g32,g64,g128", "w5a16:channel,g32,g64,g128")),
            tables=(*EVERY_TABLE, *spelled("w5:channel,g32,g64,g128")),
            activations="q8_0",
            arithmetic="float32",
            docs="gguf.md",
        ),
        Target(
            name="atom-max",
            carries_tokenizer=True,
            file="checkpoint",
            engine="RBLN SDK on ATOM-Max",
            extra="atom-max",
            packages=(),
            writer="gori.export.atom_max",
            reader="gori.export.atom_max_read",
            opener="gori.export.atom_max_run:open_directory",
            linears=spelled("w8a8:channel", "w8a16:channel", "w4a8:channel", "w4a16:channel"),
            tables=EVERY_TABLE,
            activations="none",
            arithmetic="float16",
            copied_head=True,
            float_bits=16,
            stand_in="the static reference graphs in torch: estimates, not the device",
            docs="atom-max.md",
        ),
    )
}
"""Target's name → its row. XNNPACK's partitioner takes no weight-only layer and block scales for 4 bits only."""


VARIANTS: dict[str, Target] = {
    "coreml": replace(
        TARGETS["executorch"],
        engine="ExecuTorch (Core ML)",
        packages=("executorch", "coremltools"),
        writer="gori.export.executorch_backends",
        reader="gori.export.executorch_backends_read",
        opener="gori.export.executorch_backends_read:open_coreml",
        linears=EVERY_LINEAR,
        activations="none",
        arithmetic="float16",
        copied_head=False,
        float_bits=16,
        stand_in="an interpreter of the delegate's MIL program in NumPy: graph parity, not device",
        docs="executorch-backends.md",
    ),
    "vulkan": replace(
        TARGETS["executorch"],
        engine="ExecuTorch (Vulkan)",
        writer="gori.export.executorch_backends",
        reader="gori.export.executorch_backends_read",
        opener="",
        linears=spelled("w4a8:g32,g64,g128", "w4a16:g32,g64,g128"),
        tables=spelled("w4:g32,g64,g128"),
        stand_in="ExecuTorch's wheel holds no Vulkan runtime: integers read back, logits not measured",
        docs="executorch-backends.md",
    ),
}
"""ExecuTorch's backend → the target's row with what that backend holds. OpenVINO's holds nothing that gori could prove,
QNN's is made where Qualcomm's SDK is: export/executorch_backends.py says why and how."""


def answering(names: Iterable[str]) -> list[str]:
    """Those of the targets whose own engine answers here."""
    return [n for n in names if not TARGETS[n].stand_in]


def target(name: str) -> Target:
    """A target's row; an unknown name is refused with the nearest."""
    if name not in TARGETS:
        raise GoriError(f"target {name!r} is unknown{nearest(name, TARGETS)}")
    return TARGETS[name]


def exported_row(entry: Mapping[str, Any]) -> Target:
    """The row of an artifact's parity.json, a variant's where it names one."""
    name, backend = entry.get("target"), entry.get("backend")
    if name == "executorch" and backend:
        if backend not in VARIANTS:
            raise GoriError(f"backend {backend!r} is unknown{nearest(str(backend), VARIANTS)}")
        return VARIANTS[backend]
    return target(str(name))


def markdown() -> str:
    """The README's table of targets; a test keeps it true to this file."""
    head = "| target | file | run here by | linears | embedding |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| [`{t.name}`](docs/{t.docs}) | `{t.file}` | {t.stand_in or t.engine} | {shortened(t.linears)} | "
        f"{shortened(t.tables)} |\n"
        for t in TARGETS.values()
    )


def shortened(schemes: Iterable[str]) -> str:
    """`w4a8-channel, w4a8-g32` as `w4a8: channel, g32`."""
    found: dict[str, list[str]] = {}
    for name in schemes:
        bits, _, granularity = name.partition("-")
        found.setdefault(bits, []).append(granularity)
    return "; ".join(f"{bits}: {', '.join(g)}" if any(g) else bits for bits, g in found.items())


def scheme_table() -> str:
    """Schemes of linears × targets, for docs/targets.md; a test keeps it true to this file."""
    names = sorted({s for t in TARGETS.values() for s in t.linears}, key=lambda s: (s[:2], -len(s.split("-")[0]), s))
    head = f"| scheme of the linears | {' | '.join(TARGETS)} |\n|---|{'---|' * len(TARGETS)}\n"
    rows = (f"| `{s}` | {' | '.join('yes' if s in t.linears else '–' for t in TARGETS.values())} |\n" for s in names)
    return head + "".join(rows)
