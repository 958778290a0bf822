"""Compiles this directory's checkpoint for ATOM-Max with Rebellions' SDK: python compile_atom_max.py [--out DIR]

Written by `gori export --target atom-max`; needs Python and the SDK, not gori. Reads compile_request.json and
checkpoint/ beside itself and writes what optimum-rbln writes: prefill.rbln, decoder_batch_N.rbln, rbln_config.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

ABSENT = 3
"""Exit code where the SDK is not installed."""
INSTALL = """SDK absent: {0}
Compiling needs, on a Linux machine (an NPU is not needed to compile):
  1. an account at Rebellions' portal and its package index, for rebel-compiler
  2. pip install rebel-compiler optimum-rbln=={1}
Then run this script again. Nothing was written."""


def main() -> int:
    here = Path(__file__).resolve().parent
    request = json.loads((here / "compile_request.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="compile for ATOM-Max")
    parser.add_argument("--out", type=Path, default=here / "compiled", help="directory for the compiled files")
    out: Path = parser.parse_args().out
    try:
        importlib.import_module("rebel")
        auto = importlib.import_module("optimum.rbln").RBLNAutoModelForCausalLM
    except ImportError as e:
        print(INSTALL.format(e, request["optimum_rbln"]), file=sys.stderr)
        return ABSENT
    model = auto.from_pretrained(
        str(here / request["checkpoint"]), export=True, rbln_config=request["rbln_config"], local_files_only=True
    )
    model.save_pretrained(str(out))
    print(json.dumps({"compiled": sorted(p.name for p in out.iterdir())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
