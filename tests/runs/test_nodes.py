"""Pools over several nodes, several on a node, spilling, too many slots: on a Ray cluster of simulated nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import time

import numpy as np
import ray
from ray.cluster_utils import Cluster as Nodes
from controller.cluster.start import Cluster
from controller.cluster.pool import ClusterError
from controller.cluster.object_store import ObjectStore
from rlhf_dist.config import PoolConfig, RayConfig

nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 100 << 20})
nodes.add_node(num_cpus=3, object_store_memory=100 << 20)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
try:
    with Cluster(RayConfig(ready_timeout_s=30), slots=5, host_processes=1) as cluster:
        cluster.add_host_pool()
        wide = cluster.add_pool("wide", PoolConfig(slots=2, nodes=2, device="cpu"))
        near = cluster.add_pool("near", PoolConfig(slots=1, device="cpu"))
        first, second = wide.node_ids[0], wide.node_ids[2]
        print("spread", wide.node_ids == (first, first, second, second) and first != second)
        print("shared", near.node_ids[0] in (first, second))
        store, kept = ObjectStore(every_s=0.0), [ray.put(np.zeros(30 << 20, np.uint8)) for _ in range(5)]
        deadline = time.monotonic() + 60
        found = {}
        while found.get("store/spilled_bytes", 0) < 30 << 20 and time.monotonic() < deadline:
            time.sleep(0.2)
            found = store.metrics() or found
        print("spilled", found["store/spilled_bytes"] >= 30 << 20, found["store/used_bytes"] <= 200 << 20, len(kept))
        try:
            cluster.config = RayConfig(ready_timeout_s=2)
            cluster.add_pool("wider", PoolConfig(slots=1, nodes=3, device="cpu"))
        except ClusterError as error:
            print("refused", "'wider' needs 3 nodes with 1 CPU" in str(error))
    ray.shutdown()
    try:
        Cluster(RayConfig(address=nodes.address), slots=7, host_processes=1).__enter__()
    except ClusterError as error:
        print("too many", "needs 7 slots and 1 host processes" in str(error) and "7 CPU" in str(error))
finally:
    ray.shutdown()
    nodes.shutdown()
"""


def test_a_pool_spans_as_many_nodes_as_it_says_and_shares_them_with_others(tmp_path: Path) -> None:
    script = tmp_path / "nodes.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "True" in line or "False" in line]
    assert said == ["spread True", "shared True", "spilled True True 5", "refused True", "too many True"]
