"""Advantages of steps from trees of responses: TreeRPO (2025, arXiv 2506.05183) and TreeRL (2025, arXiv 2506.11902).

    V(s) = mean reward of the leaves below step s

    siblings            A(s) = (V(s) - mean V of its siblings) / (their std + e)        TreeRPO
    parent_and_prompt   A(s) = [(V(s) - V(root)) + (V(s) - V(parent))] / sqrt(|leaves(s)|)   TreeRL

Every prompt's response is drawn as a tree, whose shared beginnings are drawn once; there is no step reward model. With
one level and no siblings' shares this is GRPO.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.search._steps import Steps, limits_of
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts
from rlhf_dist.transforms import tree_advantage

NEEDS = ("TREE", "ROLL", "VER", "ADV")
PAPERS = {
    "tree_grpo": Paper(
        title="TreeRPO: tree relative policy optimisation",
        year=2025,
        arxiv="2506.05183",
        status="outline",
        needs=NEEDS,
        assumed="steps of a fixed number of tokens; the plain deviation of siblings; shape of the tree",
    ),
    "tree_rl": Paper(
        title="TreeRL: on-policy tree search",
        year=2025,
        arxiv="2506.11902",
        status="outline",
        needs=NEEDS,
        settings={
            "algorithm.against": "parent_and_prompt",
            "algorithm.scale": False,
            "algorithm.leaf_power": 0.5,
            "algorithm.once": False,
        },
        assumed="trees branch after a fixed number of tokens, not where the policy is least certain",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TreeGRPO:
    """Settings of advantages of steps."""

    trees: int = 1
    """Trees of each prompt."""
    expand: int = 4
    """Branches at each fork."""
    depth: int = 3
    """Steps of a response: a tree has up to expand ** depth leaves."""
    step_tokens: int = 128
    """Tokens of a step."""
    against: Literal["siblings", "parent", "prompt", "parent_and_prompt"] = "siblings"
    """What a step is compared with."""
    scale: bool = True
    """Divide by the deviation of what it is compared with."""
    leaf_power: float = 0.0
    """Divide by the number of leaves below, to this power."""
    once: bool = True
    """A token that several rows share has one loss; False: one in each."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    seconds: float = 300.0
    """Longest that a tree may take."""


@recipe
def tree_grpo(prompts: Prompts, actor: Actor, cfg: TreeGRPO) -> None:
    """Tree-relative policy optimisation."""
    grown = Steps(leaves=cfg.expand**cfg.depth, expand=cfg.expand, depth=cfg.depth, step_tokens=cfg.step_tokens)
    batch = actor.run_episodes(prompts, environment=grown, n=cfg.trees, limits=limits_of(grown, cfg.seconds))
    shape = {"against": cfg.against, "scale": cfg.scale, "leaf_power": cfg.leaf_power, "once": cfg.once}
    batch = tree_advantage(batch, **shape)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
