"""The rates of a cluster: datasheet numbers times what software reaches of them."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.hardware import Cluster
from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.collectives import Fabric
from rlhf_dist.planner.efficiency import Efficiency


@dataclass(frozen=True)
class Machine:
    """A cluster with its efficiencies applied."""

    cluster: Cluster
    efficiency: Efficiency
    fabric: Fabric
    flops: float
    """Of one GPU in large matmuls."""

    @classmethod
    def of(cls, cluster: Cluster, efficiency: Efficiency) -> Machine:
        """This cluster with these efficiencies."""
        share = efficiency.matmul or cluster.gpu.matmul_efficiency
        return cls(cluster, efficiency, Fabric.of(cluster, efficiency), cluster.gpu.flops * share)

    def forward_s(self, model: ModelSpec, tokens: float, squares: float, ranks: int, pass_tokens: float) -> float:
        """A forward pass shared by `ranks` GPUs, of which each sees `pass_tokens` tokens at a time."""
        flops = model.forward_flops(tokens, squares)
        if model.experts:
            flops += model.expert_flops(tokens) * self.efficiency.experts_half_width / model.expert_intermediate
        return flops / ranks / self.flops * (1.0 + self.efficiency.matmul_half_tokens / max(pass_tokens, 1.0))
