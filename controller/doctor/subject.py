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

from controller.cluster import Cluster
from controller.doctor.node_facts import NodeFacts, NodeProbe
from controller.doctor.rank_pool import CALL_S, READY_S, RankPool
from rlhf_dist.config import RayConfig
from rlhf_dist.failure import failure_of_call
from rlhf_dist.slot_checks import visible_gpus

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
    """Address -> why there are no facts."""
    probes: Mapping[str, Any] = field(default_factory=dict)
    """Address -> the actor there."""
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Address -> what Ray counts there."""
    pool: RankPool | None = None

    @property
    def ranks(self) -> RankPool:
        """The pool of ranks."""
        assert self.pool is not None, "facts alone have no ranks"
        return self.pool

    def gpus_of(self, node: NodeFacts) -> float:
        """As Ray counts them."""
        return self.resources.get(node.address, {}).get("GPU", 0.0)

    def store_bytes(self, node: NodeFacts) -> int:
        """Ray's object store there."""
        return int(self.resources.get(node.address, {}).get("object_store_memory", 0.0))

    def clock_skew_s(self, address: str) -> tuple[float, float]:
        """(its clock minus ours, half of the shortest round trip)."""
        best = (0.0, float("inf"))
        for _ in range(_ROUND_TRIPS):
            started = time.time()
            theirs = ray.get(self.probes[address].now.remote(), timeout=ANSWER_S)
            ended = time.time()
            best = min(best, (theirs - (started + ended) / 2, (ended - started) / 2), key=lambda one: one[1])
        return best

    def send_object(self, size: int) -> dict[str, int]:
        """Address -> bytes that arrived of an object of `size`."""
        sent = ray.put(np.zeros(size, np.uint8))
        refs = {address: probe.size.remote(sent) for address, probe in self.probes.items()}
        return {address: int(ray.get(ref, timeout=ANSWER_S)) for address, ref in refs.items()}

    def read_and_write(self, folder: str, name: str) -> dict[str, str | None]:
        """Address -> the file that it wrote beside `name`; None where it did not find that, or could not."""
        own = {address: f"{name}-{k}" for k, address in enumerate(self.probes)}
        refs = {address: probe.read_and_write.remote(folder, name, own[address]) for address, probe in self.probes.items()}
        found: dict[str, str | None] = {}
        for address, ref in refs.items():
            try:
                found[address] = own[address] if ray.get(ref, timeout=ANSWER_S) == name else None
            except ray.exceptions.RayTaskError:
                found[address] = None
        return found


@contextmanager
def open_subject(address: str | None, run_folder: str, packages: tuple[str, ...]) -> Iterator[Subject]:
    """The cluster at `address` (None: one of its own on this machine) and what its nodes say of themselves.

    packages: distributions to look for. Everything that was started ends with it. Raises ClusterError.
    """
    folder = str(Path(run_folder).resolve())
    ranks = visible_gpus() or _RANKS_ON_CPU
    config = RayConfig(address=address, ready_timeout_s=READY_S, call_timeout_s=CALL_S)
    with Cluster(config, slots=1 if address else ranks, host_processes=0) as cluster:
        alive = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}
        temps = {at: str(Path(node["RayletSocketName"]).parents[2]) for at, node in alive.items()}
        probes = {at: _probe(node["NodeID"]) for at, node in alive.items()}
        asked = {at: probe.facts.remote(at, packages, folder, temps[at]) for at, probe in probes.items()}
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=FACTS_S)
        facts: dict[str, NodeFacts] = {}
        unreachable: dict[str, str] = {}
        for at, ref in asked.items():
            if ref not in ready:
                unreachable[at] = f"no answer within {FACTS_S:g} s"
                continue
            try:
                facts[at] = ray.get(ref, timeout=ANSWER_S)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is what is found
                unreachable[at] = failure_of_call(error).text
        here = ray.util.get_node_ip_address()
        yield Subject(
            nodes=list(facts.values()),
            here=facts.get(here) or NodeProbe().facts(here, packages, folder, temps.get(here, "/tmp")),
            run_folder=folder,
            about=cluster.about,
            unreachable=unreachable,
            probes={at: probe for at, probe in probes.items() if at in facts},
            resources={at: node["Resources"] for at, node in alive.items()},
            pool=RankPool(cluster),
        )


def _probe(node_id: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=where).remote()
