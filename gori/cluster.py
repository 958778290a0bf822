"""A Ray cluster that runs already: connecting to it, and refusing nodes that have other libraries.

Knows nothing of what is computed there.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from gori.errors import GoriError, one_line

ANSWER_S = 10.0


def connect(address: str | None) -> Any:
    """Ray, connected to a cluster that runs already."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray 2.60 warns of its own next default
    try:
        import ray
    except ImportError as e:
        raise GoriError("a Ray cluster needs Ray: pip install 'gori[cluster]'") from e
    try:
        check_answers(address)
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise GoriError(
            f"no Ray cluster answers at {address or 'auto'} ({one_line(e)}): start one with `ray start --head`, or "
            "name it with --address HOST:PORT"
        ) from e
    return ray


def check_answers(address: str | None) -> None:
    """OSError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()


def check_same(found: dict[str, str], wanted: dict[str, str], node: str) -> None:
    """GoriError where a node has another version of a library."""
    if other := sorted(k for k in wanted if found.get(k) != wanted[k]):
        name = other[0]
        raise GoriError(
            f"node {node} has {name} {found.get(name, 'not at all')}, this machine {wanted[name]}: what is made "
            "together is made by one set of libraries; install the same on every node"
        )
