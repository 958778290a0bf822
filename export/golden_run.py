"""Golden inputs of an artifact through its engine, as a process of its own: an engine that a damaged file ends does not
end what asked.

`python -m gori.export.golden_run DIRECTORY` prints one JSON object: `here` with what was found, `missing` with what to
install, or `problem` with a sentence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gori.artifact import read_object
from gori.errors import GoriError, MissingEngine
from gori.export import golden
from gori.targets import PARITY, Target, exported_row, named

LONGEST_S = 1800.0
"""An engine that takes longer is given up."""
MARK = "golden:"
"""Before the JSON: engines print to stdout, too."""


def run(directory: Path) -> dict[str, Any]:
    """What this machine's engine gives; raises GoriError, MissingEngine where there is no such engine."""
    target, found = exported_row(read_object(directory / PARITY)), golden.read(directory)
    session = named(target.opener)(directory, 1)
    info, check = session.info, golden.check(session, found)
    here = {**vars(check), "met": check.met, "engine": info.engine, "engine_version": info.engine_version}
    del session
    return here | _second(target, directory, found)


def _second(target: Target, directory: Path, found: golden.Golden) -> dict[str, Any]:
    """The engine of a second file; one that is not installed is a note, the first has run."""
    try:
        return {"second": golden.second_engine(target, directory, found.answers), "second_missing": ""}
    except (ImportError, MissingEngine) as e:
        return {"second": None, "second_missing": missing(e, target)}


def missing(e: Exception, target: Target) -> str:
    """What to install, from a loader's error."""
    if isinstance(e, MissingEngine):
        return str(e)
    return f"needs {getattr(e, 'name', None) or e}: pip install 'gori[{target.extra}]'"


def in_process(directory: Path) -> dict[str, Any]:
    """`run` in a process of its own; `problem` where it ended otherwise than with an answer."""
    command = [sys.executable, "-m", "gori.export.golden_run", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"the engine of {directory} gave no answer in {LONGEST_S:.0f} s: export it again"}
    for line in done.stdout.decode("utf-8", errors="replace").splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    last = done.stderr.decode("utf-8", errors="replace").strip().splitlines()[-1:] or [""]
    ended = f"by signal {-done.returncode}" if done.returncode < 0 else f"with {done.returncode}"
    return {
        "problem": f"the engine of {directory} ended {ended} ({last[0][:120]}): the file is damaged, export it again"
    }


def main(directory: Path) -> dict[str, Any]:
    try:
        return {"here": run(directory)}
    except MissingEngine as e:
        return {"missing": str(e)}
    except ImportError as e:
        return {"missing": missing(e, exported_row(read_object(directory / PARITY)))}
    except GoriError as e:
        return {"problem": str(e)}


if __name__ == "__main__":
    print(f"\n{MARK}{json.dumps(main(Path(sys.argv[1])))}", flush=True)
