"""Questions that several tests ask: the paper's PPO, and small problems that can be enumerated."""

from __future__ import annotations

from typing import Any

from rlhf_dist.planner.case import parse_case
from rlhf_dist.planner.plan import Question

PAPER_LOAD = {"prompts": 1024, "prompt_tokens": 1024, "response_tokens": 1024, "mini_batches": 8}
ROLES = ("actor", "critic", "reference", "reward")


def paper(nodes: int, *models: str, placement: Any = "auto", **more: Any) -> Question:
    """HybridFlow's evaluation (section 8.1): PPO on nodes of 8 A100-80G. One model for all roles, or one each."""
    names = models * 4 if len(models) == 1 else models
    return parse_case(
        {
            "recipe": "ppo",
            "cluster": f"{nodes}x8xA100-80G",
            "models": dict(zip(ROLES, names, strict=True)),
            "workload": PAPER_LOAD,
            "placement": placement,
            **more,
        }
    )


def blocks(plan: Any) -> dict[frozenset[str], int]:
    """Roles of each pool -> its GPUs."""
    return {frozenset(pool.units): pool.gpus for pool in plan.best.pools}
