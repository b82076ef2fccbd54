"""What a policy reaches in n tries: held-out reward, pass@k (Chen et al. 2021, arXiv 2107.03374) and best-of-n.

Their formulas stand at `rlhf_dist.transforms.tries`; during training they are an evaluation (docs/writing-a-recipe.md).
"""

from dataclasses import dataclass

from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Opponent, Prompts, Reward
from rlhf_dist.transforms import tries

PAPERS = {
    "samples": Paper(
        title="Held-out reward, pass@k and best-of-n",
        year=2021,
        arxiv="2107.03374",
        status="study",
        needs=("EVAL", "ROLL", "VER", "RM"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Settings of the measurement."""

    samples_per_prompt: int = 8
    """n: tries at each prompt."""
    right: float = 0.5
    """A try with a reward above this is right."""


@recipe
def samples(prompts: Prompts, policy: Opponent, reward: Reward, cfg: Samples) -> None:
    """Rewards of n tries at each prompt."""
    tries(reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt)), right=cfg.right)
