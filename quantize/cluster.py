"""Candidates on an existing Ray cluster: checkpoint and rows travel through its object store, finished directories come
back as archives. Nodes need gori and the same libraries, but share no disk with each other or with this machine.

Only this process writes the journal and holds the candidates' locks, so a sweep comes out as it does on one machine.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gori.artifact import LIBRARIES, content_hash, library_versions, os_errors
from gori.cluster import check_same, connect
from gori.errors import GoriError, one_line
from gori.quantize.journal import held
from gori.quantize.workers import MACHINE, Event, Outcome, Run, Task, claimed, finished_elsewhere

RETRIES = 2
"""How often a candidate is begun again whose node was lost."""
CHECK_S = 300.0
"""For every node to say what is installed there; the first time Ray starts a process for it."""


class Cluster:
    """One task a CPU of the cluster, each on one thread."""

    def __init__(self, run: Run, address: str | None, packages: Iterable[str]) -> None:
        self._ray = connect(address)
        self._versions = library_versions([*LIBRARIES, *packages])
        self._remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(work)
        self._run = self._ray.put(run)
        self._scratch = f"gori-sweep-{secrets.token_hex(6)}"
        self._sent: dict[Path, tuple[str, Any]] = {}
        self._running: dict[Any, tuple[Task, ExitStack]] = {}
        self._ready: deque[Event] = deque()
        self._check_nodes()

    def room(self) -> int:
        """CPUs of the cluster that no task of ours has."""
        return int(self._ray.cluster_resources().get("CPU", 0)) - len(self._running)

    def submit(self, task: Task) -> None:
        """Take the candidate's lock and send it out; where another process has the lock, that is the outcome."""
        stack = ExitStack()
        if not stack.enter_context(held(task.lock, wait=False)) or finished_elsewhere(task):
            stack.close()
            self._ready.append(Event(task, None, {"state": "held"}))
            return
        stack.enter_context(held(task.out / MACHINE, wait=True, shared=True))
        student, data = self._send(task.checkpoint), self._send(task.data)
        names = (self._scratch, student[0], data[0])
        future = self._remote.remote(self._run, task, names, student[1], data[1], self._versions)
        self._running[future] = (task, stack)
        self._ready.append(Event(task, "on the cluster"))

    def events(self, timeout_s: float) -> list[Event]:
        """What happened until now; waits for the first event, at most `timeout_s`."""
        if self._ready:
            found = list(self._ready)
            self._ready.clear()
            return found
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._ended(future) for future in done]

    def close(self) -> None:
        """Cancel what is running, clear the nodes' scratch and leave the cluster, which goes on."""
        for future, (_, stack) in self._running.items():
            self._ray.cancel(future, force=True)
            stack.close()
        self._running = {}
        self._on_each_node(clear, self._scratch)
        self._ray.shutdown()

    def _send(self, directory: Path) -> tuple[str, Any]:
        """A directory's content hash and its archive in the object store, put there once."""
        if directory not in self._sent:
            self._sent[directory] = (content_hash(directory), self._ray.put(packed({".": directory})))
        return self._sent[directory]

    def _ended(self, future: Any) -> Event:
        task, stack = self._running.pop(future)
        with stack:
            try:
                outcome, archive = self._ray.get(future)
            except self._ray.exceptions.RayError as e:
                return Event(task, None, {"state": "failed", "error": f"{type(e).__name__}: {one_line(e)}"})
            with os_errors(task.out):
                unpack_result(archive, task)
            return Event(task, None, outcome)

    def _check_nodes(self) -> None:
        """Refuse a cluster where a node has other libraries: its figures would be of something else."""
        for node, found in self._on_each_node(library_versions, [*self._versions]).items():
            check_same(found, self._versions, node)

    def _on_each_node(self, function: Any, argument: Any) -> dict[str, Any]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {}
        for node in self._ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                remote = self._ray.remote(num_cpus=0, scheduling_strategy=place)(function)
                asked[node["NodeManagerAddress"]] = remote.remote(argument)
        try:
            return dict(zip(asked, self._ray.get(list(asked.values()), timeout=CHECK_S), strict=True))
        except self._ray.exceptions.RayError as e:
            raise GoriError(
                f"a node of the Ray cluster could not run gori ({one_line(e)}): install it on every node"
            ) from e


def work(
    run: Run, task: Task, names: tuple[str, str, str], student: bytes, data: bytes, versions: dict[str, str]
) -> tuple[Outcome, bytes]:
    """On a node: unpack what is not there yet, make and measure the candidate, and pack its directories. `names` are
    the scratch's and the hashes of checkpoint and rows."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    check_same(library_versions([*versions]), versions, node)
    scratch = scratch_of(names[0], node)
    there = replace(
        task,
        checkpoint=unpacked(student, scratch / f"student-{names[1][:16]}"),
        data=unpacked(data, scratch / f"data-{names[2][:16]}"),
        out=scratch / "work",
    )
    outcome = claimed(run, there, lambda stage: None)
    made = {"candidate": there.directory, "quantized": there.out / "quantized" / there.integers_key}
    archive = packed({name: d for name, d in made.items() if d.exists()})
    shutil.rmtree(there.directory, ignore_errors=True)
    return outcome, archive


def scratch_of(name: str, node: str) -> Path:
    """A node's scratch for one sweep, apart even where nodes share a machine."""
    path = Path(tempfile.gettempdir()) / f"{name}-{node[:12]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def clear(name: str) -> None:
    """On a node: remove a sweep's scratch."""
    import ray

    shutil.rmtree(scratch_of(name, ray.get_runtime_context().get_node_id()), ignore_errors=True)


def packed(directories: dict[str, Path]) -> bytes:
    """Directories as one archive, each under its name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, directory in directories.items():
            archive.add(directory, arcname=name)
    return out.getvalue()


def unpacked(archive: bytes, directory: Path) -> Path:
    """The directory with an archive's content, which is whole as soon as it has its name."""
    with held(directory.with_name(f".{directory.name}.lock"), wait=True):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unpacking-") as temporary:
                _extract(archive, Path(temporary) / "whole")
                os.rename(Path(temporary) / "whole", directory)
    return directory


def _extract(archive: bytes, directory: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(directory, filter="data")


def unpack_result(archive: bytes, task: Task) -> None:
    """Put what came back where a candidate of this machine would have it; integers that are there stay."""
    task.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=task.out, prefix=".arriving-") as temporary:
        _extract(archive, Path(temporary))
        for name, place in (
            ("candidate", task.directory),
            ("quantized", task.out / "quantized" / task.integers_key),
        ):
            came = Path(temporary) / name
            if not came.exists() or (name == "quantized" and place.exists()):
                continue
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(came, place)
