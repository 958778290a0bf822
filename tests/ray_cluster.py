"""Two Ray nodes on this machine, each of one CPU and with an object store, until stdin ends; prints the address."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 80 * 2**20


def main() -> None:
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
