"""Seconds of collectives. A group's ranks are spread evenly; groups on a node share its network cards.

    time = max(V (g-1)/g / link  inside a node,  V (nodes-1)/nodes / (network x group's share)  between nodes) + start

V is the full (gathered) buffer of one group. All-gather and reduce-scatter move V once, all-reduce twice (ring
algorithm, Patarasuk and Yuan 2009: bandwidth-optimal, and what NCCL does for large buffers).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.hardware import Cluster
from rlhf_dist.planner.efficiency import Efficiency


@dataclass(frozen=True)
class Fabric:
    """Effective bandwidths of a cluster, bytes per second."""

    link: float
    network: float
    host: float
    link_latency_s: float
    network_latency_s: float
    gpus_per_node: int

    @classmethod
    def of(cls, cluster: Cluster, efficiency: Efficiency) -> Fabric:
        """Of this cluster with these efficiencies."""
        return cls(
            link=cluster.gpu.link_bytes_per_s * efficiency.link,
            network=cluster.network_bytes_per_s * efficiency.network,
            host=cluster.gpu.host_bytes_per_s * efficiency.host_link,
            link_latency_s=cluster.gpu.link_latency_s,
            network_latency_s=cluster.network_latency_s,
            gpus_per_node=cluster.gpus_per_node,
        )

    def gather_s(self, volume: float, ranks: int, stride: int = 1, pieces: int = 1) -> float:
        """All-gather (or reduce-scatter) of `volume` bytes over `ranks` GPUs that are `stride` apart.

        pieces: collectives that it takes, such as one a layer; each starts anew.
        """
        if ranks <= 1:
            return 0.0
        per_node = min(ranks, max(1, self.gpus_per_node // stride))
        nodes = -(-ranks // per_node)
        inside = volume * (ranks - 1) / ranks / self.link if per_node > 1 else 0.0
        if nodes == 1:
            return inside + pieces * self.link_latency_s
        share = min(1.0, per_node / self.gpus_per_node)
        between = volume * (nodes - 1) / nodes / (self.network * share)
        return max(inside, between) + pieces * self.network_latency_s

    def all_reduce_s(self, volume: float, ranks: int) -> float:
        """All-reduce of `volume` bytes over `ranks` GPUs of one node."""
        if ranks <= 1:
            return 0.0
        return 2.0 * volume * (ranks - 1) / ranks / self.link + self.link_latency_s

    def all_to_all_s(self, volume: float, ranks: int) -> float:
        """Every one of `ranks` GPUs of a node holds `volume` bytes and keeps 1/ranks of it."""
        if ranks <= 1:
            return 0.0
        return volume * (ranks - 1) / ranks / self.link + self.link_latency_s
