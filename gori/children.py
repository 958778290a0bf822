"""A measurement in a process of its own, whose result is the JSON that it prints. Knows nothing of what is measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from gori.errors import GoriError

LONGEST_S = 900.0


def printed(
    command: Sequence[str], what: str, longest_s: float = LONGEST_S, environment: Mapping[str, str] | None = None
) -> Any:
    """The JSON that a process prints, alone or after lines of a library's own; GoriError if it fails or is late, with
    the `error` that it prints in place of a result, or with the last line of its stderr."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=longest_s,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as e:
        raise GoriError(f"{what} could not be measured: {command[0]} is no program ({e.strerror})") from e
    except subprocess.TimeoutExpired as e:
        raise GoriError(f"{what} was not measured within {longest_s:.0f} s: ask for less") from e
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        said = json.loads(done.stdout)["error"] if done.returncode == 1 and done.stdout else lines[-1]
        raise GoriError(f"{what} could not be measured: {said}")
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return json.loads(done.stdout.splitlines()[-1])
