"""What the doctor looks at: a cluster, facts of each of its nodes, and a pool of ranks such as a run has.

open_subject ──> Cluster (one of its own, or the one at --address) ──> a NodeProbe on each node ──> NodeFacts
subject.ranks ──> the pool, started by the first check that needs it, and anew after one that broke it
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from controller.cluster.start import Cluster
from controller.doctor.node_facts import NodeFacts, NodeProbe
from controller.doctor.rank_pool import CALL_S, READY_S, RankPool
from rlhf_dist.config import RayConfig
from rlhf_dist.failure import failure_of_call
from rlhf_dist.machine import local_machine

FACTS_S = 30.0
"""Until a node counts as one that does not answer: its process starts and imports Ray."""
ANSWER_S = 10.0
_ROUND_TRIPS = 5
_RANKS_ON_CPU = 2


@dataclass(kw_only=True)
class Subject:
    """A cluster with its nodes; only those that answered have facts."""

    nodes: list[NodeFacts]
    here: NodeFacts
    """This machine, where the command runs."""
    run_folder: str
    about: str = ""
    """Which cluster it is."""
    unreachable: Mapping[str, str] = field(default_factory=dict)
    """Node -> why there are no facts."""
    probes: Mapping[str, Any] = field(default_factory=dict)
    """Node -> the actor there."""
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Node -> what Ray counts there."""
    pool: RankPool | None = None

    @property
    def ranks(self) -> RankPool:
        """The pool of ranks."""
        assert self.pool is not None, "facts alone have no ranks"
        return self.pool

    def gpus_of(self, node: NodeFacts) -> float:
        """As Ray counts them."""
        return self.resources.get(node.name, {}).get("GPU", 0.0)

    def store_bytes(self, node: NodeFacts) -> int:
        """Ray's object store there."""
        return int(self.resources.get(node.name, {}).get("object_store_memory", 0.0))

    def clock_skew_s(self, node: str) -> tuple[float, float]:
        """(its clock minus ours, half of the shortest round trip)."""
        best = (0.0, float("inf"))
        for _ in range(_ROUND_TRIPS):
            started = time.time()
            theirs = ray.get(self.probes[node].now.remote(), timeout=ANSWER_S)
            ended = time.time()
            best = min(best, (theirs - (started + ended) / 2, (ended - started) / 2), key=lambda one: one[1])
        return best

    def send_object(self, size: int) -> dict[str, int]:
        """Node -> bytes that arrived of an object of `size`."""
        sent = ray.put(np.zeros(size, np.uint8))
        refs = {node: probe.size.remote(sent) for node, probe in self.probes.items()}
        return {node: int(ray.get(ref, timeout=ANSWER_S)) for node, ref in refs.items()}

    def read_and_write(self, folder: str, name: str) -> dict[str, str | None]:
        """Node -> the file that it wrote beside `name`; None where it did not find that, or could not."""
        own = {node: f"{name}-{k}" for k, node in enumerate(self.probes)}
        refs = {node: probe.read_and_write.remote(folder, name, own[node]) for node, probe in self.probes.items()}
        found: dict[str, str | None] = {}
        for node, ref in refs.items():
            try:
                found[node] = own[node] if ray.get(ref, timeout=ANSWER_S) == name else None
            except ray.exceptions.RayTaskError:
                found[node] = None
        return found


@contextmanager
def open_subject(address: str | None, run_folder: str, packages: tuple[str, ...]) -> Iterator[Subject]:
    """The cluster at `address` (None: one of its own on this machine) and what its nodes say of themselves.

    packages: distributions to look for. Everything that was started ends with it. Raises ClusterError.
    """
    folder = str(Path(run_folder).resolve())
    ranks = len(local_machine().gpus) or _RANKS_ON_CPU
    config = RayConfig(address=address, ready_timeout_s=READY_S, call_timeout_s=CALL_S)
    with Cluster(config, slots=1 if address else ranks, host_processes=0) as cluster:
        alive = _by_name([node for node in ray.nodes() if node["Alive"]])
        probes = {name: _probe(node["NodeID"]) for name, node in alive.items()}
        asked = {
            name: probe.facts.remote(name, alive[name]["NodeManagerAddress"], packages, folder, _ray_temp(alive[name]))
            for name, probe in probes.items()
        }
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=FACTS_S)
        facts: dict[str, NodeFacts] = {}
        unreachable: dict[str, str] = {}
        for name, ref in asked.items():
            if ref not in ready:
                unreachable[name] = f"no answer within {FACTS_S:g} s"
                continue
            try:
                facts[name] = ray.get(ref, timeout=ANSWER_S)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is what is found
                unreachable[name] = failure_of_call(error).text
        here = ray.util.get_node_ip_address()
        pool = RankPool(cluster)
        subject = Subject(
            nodes=list(facts.values()),
            here=facts.get(here) or NodeProbe().facts(here, here, packages, folder, "/tmp"),
            run_folder=folder,
            about=cluster.about,
            unreachable=unreachable,
            probes={name: probe for name, probe in probes.items() if name in facts},
            resources={name: node["Resources"] for name, node in alive.items()},
            pool=pool,
        )
        try:
            yield subject
        finally:
            pool.close()


def _by_name(nodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By address; a further raylet on one machine has a number behind it."""
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        address = node["NodeManagerAddress"]
        found[address if address not in found else f"{address} ({len(found) + 1})"] = node
    return found


def _ray_temp(node: dict[str, Any]) -> str:
    """/tmp/ray of /tmp/ray/session_.../sockets/raylet."""
    return str(Path(node["RayletSocketName"]).parents[2])


def _probe(node_id: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=where).remote()
