"""What ExecuTorch says on every import and export, by name, so that anything new is heard."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

UPSTREAM_WARNINGS = (
    ("is deprecated. Use files", DeprecationWarning),  # importlib.resources in executorch.exir
    ("`torch.jit.script_method` is deprecated", DeprecationWarning),  # torch.jit, imported by torchao
    ("This API is experimental", DeprecationWarning),  # executorch's pybindings, on import
    ("_check_is_size will be removed", FutureWarning),  # the meta kernel of llama::update_cache
    ("`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning),  # torch, while it copies a program
    ("Mutation on a buffer in the model", UserWarning),  # the KV caches, whose first content is never read
)
"""What ExecuTorch 1.5.1 says on every export: message and category, by name, so that a new one is seen."""


@contextmanager
def upstream_warnings() -> Iterator[None]:
    """Leave out what no user of gori can act on: warnings, and two loggers' words (torchao names kernels of other
    machines that it cannot load; torch names torchao's enums)."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message, category in UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", f".*{message}", category)
        yield
