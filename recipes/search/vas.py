"""VAS: value augmented sampling (Han et al. 2024, arXiv 2405.06639): a value of a frozen policy, used at decoding.

    V learns E[(V(s_t) - R_t^lambda)^2] on samples of the frozen policy, R^lambda the TD(lambda) return
    decoding draws from p(y_t) exp(V(s_t, y_t) / beta), y_t of some candidates: guided_decoding/value_augmented

The policy never changes, so that V is learned from as many samples as are wanted.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import value_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Critic, Opponent, Prompts, Reward
from rlhf_dist.transforms import gae

PAPERS = {
    "vas": Paper(
        title="VAS: value augmented sampling",
        year=2024,
        arxiv="2405.06639",
        rows=(194,),
        status="outline",
        needs=("CRIT", "ROLL", "RM", "TREE"),
        assumed="lambda 0.95, gamma 1; decoding is guided_decoding/value_augmented with this critic",
    )
}


@dataclass(frozen=True, kw_only=True)
class VAS:
    """Settings of the value."""

    samples_per_prompt: int = 8
    """Responses of the frozen policy to each prompt."""
    lam: float = 0.95
    """lambda of TD(lambda)."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""


@recipe
def vas(prompts: Prompts, policy: Opponent, critic: Critic, reward: Reward, cfg: VAS) -> None:
    """A value of a frozen policy's states."""
    batch = reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = gae(critic.compute_values(batch), gamma=1.0, lam=cfg.lam)
    critic.update_critic(batch, loss=value_clip(0.0), mini_batches=cfg.mini_batches)
