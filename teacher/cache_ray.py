"""A cache's shards on an existing Ray cluster: each node opens the teacher from its own disk, or one that they share,
and sends shards back; this process alone writes them, so that the cache comes out as it does on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gori.artifact import LIBRARIES, content_hash, library_versions
from gori.cluster import check_same, connect
from gori.errors import GoriError, one_line
from gori.teacher.cache import Answers, Part, Row, Rows, Work, rows_of

AHEAD = 2
"""Shards that wait at each worker, so that it never does."""


class Worker:
    """A process of the cluster with the teacher open; on one thread, as everywhere."""

    def __init__(self, work: Work, hashes: dict[str, str], versions: dict[str, str]) -> None:
        import ray
        import torch

        check_same(library_versions([*versions]), versions, ray.util.get_node_ip_address())
        for name, wanted in hashes.items():
            path = getattr(work, name)
            if content_hash(path) != wanted:
                raise GoriError(f"{name} {path} on {ray.util.get_node_ip_address()} is another: copy it there")
        torch.set_num_threads(1)
        self._maker = work.maker()

    def shard(self, rows: Sequence[Row], part: Part) -> tuple[Part, bytes, dict[str, Any]]:
        return (part, *self._maker.shard(rows, part))


@contextmanager
def on_cluster(work: Work, address: str) -> Iterator[Answers]:
    """One worker a GPU of the cluster, or a CPU where this machine has no GPU; `address` is HOST:PORT or auto."""
    ray = connect(address)
    try:
        resource = "GPU" if work.device == "cuda" else "CPU"
        count = int(ray.cluster_resources().get(resource, 0))
        if not count:
            raise GoriError(f"the Ray cluster has no {resource}: the teacher runs on the kind that this machine has")
        hashes = {name: content_hash(getattr(work, name)) for name in ("teacher", "tokenizer")}
        options = {"num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}
        remote = ray.remote(**options, max_restarts=2, max_task_retries=2)(Worker)
        workers = [remote.remote(work, hashes, library_versions(LIBRARIES)) for _ in range(count)]

        def answers(parts: Sequence[Part], made: Rows) -> Iterator[tuple[Part, bytes, dict[str, Any]]]:
            jobs, running = rows_of(parts, made), {}
            free = [w for w in workers for _ in range(AHEAD)]
            while True:
                while free and (job := next(jobs, None)):
                    worker = free.pop()
                    running[worker.shard.remote(job[1], job[0])] = worker
                if not running:
                    return
                (done,), _ = ray.wait(list(running), num_returns=1)
                free.append(running.pop(done))
                yield _result(ray, done)

        yield answers
    finally:
        ray.shutdown()


def _result(ray: Any, done: Any) -> tuple[Part, bytes, dict[str, Any]]:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as e:
        raise GoriError(f"a worker of the Ray cluster could not make a shard: {one_line(e)}") from e
