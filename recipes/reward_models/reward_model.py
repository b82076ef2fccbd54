"""A reward model from preferences (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325)."""

from dataclasses import dataclass

from rlhf_dist.algorithms import bradley_terry
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Preferences, RewardModel


@dataclass(frozen=True, kw_only=True)
class RewardModeling:
    """Settings of reward modelling."""

    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""
    use_margin: bool = False
    """Ask for a gap of at least the pair's margin (Llama 2)."""


@recipe
def reward_model(pairs: Preferences, reward: RewardModel, cfg: RewardModeling) -> None:
    """Reward model on labelled pairs."""
    loss = bradley_terry(use_margin=cfg.use_margin)
    reward.update_reward_model(pairs, loss=loss, mini_batches=cfg.mini_batches)
