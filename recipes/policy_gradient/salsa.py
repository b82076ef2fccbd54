"""SALSA: a soup of two SFT models as reference (Chegini et al. 2024, arXiv 2411.01798).

    pi_ref = (SFT_1 + SFT_2) / 2, weight by weight, then PPO with its KL to that

The soup is made at the first step and kept in checkpoints; the roles `first` and `second` only give it their weights.
"""

from dataclasses import dataclass

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward

ONCE = 1 << 40
"""A cadence of which a run sees step 0 only."""


PAPERS = {
    "salsa": Paper(
        title="SALSA",
        year=2024,
        arxiv="2411.01798",
        rows=(191,),
        needs=("SNAP", "REF", "ROLL", "RM", "CRIT"),
    )
}


@dataclass(frozen=True, kw_only=True)
class SALSA(WithCritic):
    """Settings of SALSA."""

    share: float = 0.5
    """Of the second model in the soup."""


@recipe
def salsa(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    first: Reference,
    second: Reference,
    soup: Reference,
    reward: Reward,
    cfg: SALSA,
) -> None:
    """PPO near an average of models."""
    soup.merge_from([(first, 1 - cfg.share), (second, cfg.share)], every=ONCE)
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    learn_with_critic(batch, actor, critic, soup, cfg)
