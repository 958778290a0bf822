"""`--target executorch --backend qnn:SOC`: lowering for the HTP of Qualcomm's chips in cars, through the partitioner of
ExecuTorch's wheel and Qualcomm's AI Engine Direct SDK.

**Never run to its end.** The SDK is under its own licence and was not at hand: what was seen is that the chips' compile
specs are made and that lowering goes as far as the SDK's first library. Knows the chips and what is missing.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gori.errors import GoriError, MissingEngine, nearest, one_line
from gori.export.executorch_warnings import upstream_warnings
from gori.targets import VARIANTS, Target

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from torch import nn

SOCS = ("SA8295", "SA8255", "SA8797")
"""Qualcomm's chips for cars in ExecuTorch's `QcomChipset`; the first is the default."""
SDK = "QNN_SDK_ROOT"
BINDINGS = "executorch.backends.qualcomm.python.PyQnnManagerAdaptor"
NEVER_RUN = "gori has never run this path to its end"


def chip(backend: str) -> str:
    """The chip of `qnn` or `qnn:SOC`."""
    soc = backend.partition(":")[2] or SOCS[0]
    if soc not in SOCS:
        raise GoriError(f"chip {soc!r} of --backend {backend} is unknown{nearest(soc, SOCS)}")
    return soc


def row(backend: str) -> Target:
    """The row of `qnn:SOC`; MissingEngine with all that is missing."""
    soc = chip(backend)
    if missing := missing_parts():
        raise MissingEngine(
            f"--backend qnn:{soc} lacks {' and '.join(missing)}: install Qualcomm's AI Engine Direct SDK and set {SDK} "
            f"to it ({NEVER_RUN}), or export with --target executorch alone, which is XNNPACK"
        )
    return replace(
        VARIANTS["coreml"],
        engine=f"ExecuTorch (QNN, HTP of {soc})",
        packages=("executorch",),
        opener="",
        stand_in=f"Qualcomm's HTP is on no machine of gori's, and {NEVER_RUN}: logits not measured",
    )


def missing_parts() -> list[str]:
    """What lowering for QNN needs and is not here, in words."""
    found = []
    root = os.environ.get(SDK)
    # unset, ExecuTorch 1.5.1 would download the SDK by itself, its licence unread
    if not root:
        found.append(f"Qualcomm's SDK (the environment variable {SDK} is not set)")
    elif not Path(root).is_dir():
        found.append(f"Qualcomm's SDK ({SDK} is {root}, which is no directory)")
    try:
        with upstream_warnings():
            importlib.import_module(BINDINGS)
    except ImportError as e:
        found.append(f"the wheel's Python bindings ({BINDINGS}: {one_line(e)})")
    return found


def compile_specs(soc: str) -> list[Any]:
    """What Qualcomm's compiler is told. Activations stay float16: a checkpoint has no ranges for integers."""
    with upstream_warnings():
        from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
        from executorch.backends.qualcomm.utils.utils import (
            generate_htp_compiler_spec,
            generate_qnn_executorch_compiler_spec,
        )

    options = generate_htp_compiler_spec(use_fp16=True)
    return generate_qnn_executorch_compiler_spec(QcomChipset[soc], options)


def to_edge(
    graph: nn.Module,
    arguments: Any,
    metadata: dict[str, int | bool | list[int]],
    soc: str,
) -> EdgeProgramManager:
    """The graph of one fixed length with what QNN takes behind a delegate."""
    from executorch.backends.qualcomm.utils.utils import to_edge_transform_and_lower_to_qnn

    return to_edge_transform_and_lower_to_qnn(graph, arguments, compile_specs(soc), constant_methods=metadata)
