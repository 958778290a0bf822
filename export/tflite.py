"""A checkpoint's integers to one .tflite for tflite-runtime 2.14, the last of its name.

The same graph as LiteRT's with operators as old as that runtime: its product of float inputs and per-channel integers
gives NaN without an error, so a separate operator turns integers into floats when the file is loaded, and inputs are
not rounded. Nothing is quantized here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gori.export.litert import write_tflite
from gori.export.litert_weights import Kernels
from gori.export.weights import Options, Weights


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.tflite."""
    return write_tflite(w, out, o, Kernels.LEGACY)
