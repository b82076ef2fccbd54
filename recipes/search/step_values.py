"""What scores steps, learned from trees of responses: reward modelling on trees (Qiu et al. 2024, arXiv 2402.10184).

    pairs   -log sigma(r(w) - r(l)),   w and l siblings of a tree, better and worse by the leaves below
    q       (Q_theta(s) - Q(s))^2,   Q(s) = max over s' that follow on s of gamma Q(s'),  Q(leaf) = reward      QLASS

Responses that are drawn as a tree share beginnings, so that pairs differ from a fork on. A model of `q` guides
generation: it is the reward of guided_decoding. `imitate` has the policy learn the best leaf of each prompt
whose leaves are not all alike, too.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.search._steps import Steps, limits_of
from recipes.search.step_preferences import step_regression
from rlhf_dist.algorithms import bradley_terry, nll
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, RewardModel
from rlhf_dist.transforms import best_of_group, drop_equal_groups, tree_nodes, tree_pairs

PAPERS = {
    "step_values": Paper(
        title="Reward modelling on trees of responses",
        year=2024,
        arxiv="2402.10184",
        rows=(111,),
        status="outline",
        needs=("TREE", "RMT", "ROLL", "RM", "CRIT"),
        assumed="siblings are compared by a rule over their leaves; segments of a fixed number of tokens",
    ),
    "qlass": Paper(
        title="QLASS",
        year=2025,
        arxiv="2502.02584",
        rows=(179,),
        status="outline",
        needs=("TREE", "TURN", "RMT", "SFT"),
        settings={"algorithm.kind": "q", "algorithm.imitate": True},
        assumed="gamma 0.9; sums in place of the agents' tasks; the policy imitates its best leaves, not experts",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """Settings of values of steps."""

    kind: Literal["pairs", "q"] = "pairs"
    """Preferences between siblings, or Bellman's values of steps."""
    expand: int = 3
    """Branches at each fork."""
    depth: int = 3
    """Steps of a response."""
    step_tokens: int = 64
    """Tokens of a step."""
    gamma: float = 0.9
    """Of q: discount per step."""
    imitate: bool = False
    """The policy learns the best leaf of each prompt's trees, too."""
    seconds: float = 600.0
    """Longest that a tree may take."""


@recipe
def step_values(prompts: Prompts, actor: Actor, reward: RewardModel, cfg: StepValues) -> None:
    """A reward model on the steps of trees."""
    grown = Steps(leaves=cfg.expand**cfg.depth, expand=cfg.expand, depth=cfg.depth, step_tokens=cfg.step_tokens)
    tree = actor.run_episodes(prompts, environment=grown, limits=limits_of(grown, cfg.seconds))
    if cfg.kind == "pairs":
        reward.update_reward_model(tree_pairs(tree), loss=bradley_terry())
    else:
        steps = tree_nodes(tree, backup="max", gamma=cfg.gamma, most_steps=cfg.depth)
        reward.update_reward_model(steps, loss=step_regression())
    if cfg.imitate:
        actor.update_actor(best_of_group(drop_equal_groups(tree)), loss=nll())
