"""DAPO: decoupled clip and dynamic sampling (Yu et al. 2025, arXiv 2503.14476).

GRPO without a KL term, its loss averaged over tokens (eq. 12), the ratio cut higher above than below, prompts whose
responses are all right or all wrong replaced by others (eq. 11), and long responses charged softly (eq. 13).
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import refill
from rlhf_dist.dataflow.recipe import follows, recipe
from rlhf_dist.roles import Actor, Prompts, Reward
from rlhf_dist.transforms import drop_equal_groups, grpo_advantage, penalise_overlong

PAPERS = {
    "dapo": Paper(
        title="DAPO",
        year=2025,
        arxiv="2503.14476",
        needs=("ROLL", "VER", "ADV", "FILT", "SHAPE"),
    )
}


@dataclass(frozen=True, kw_only=True)
class DAPO:
    """Settings of DAPO."""

    samples_per_prompt: int = 16
    """Responses to each prompt: the group."""
    groups: int = follows("data.prompts_per_step")
    """Prompts that a step trains on."""
    rounds: int = 4
    """Times that a step draws prompts, at most, to have so many that are neither all right nor all wrong."""
    short: Literal["stop", "train"] = "train"
    """What becomes of a step with fewer: it ends the run, or trains on them."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip."""
    clip_high: float = 0.28
    """And at 1 + clip_high."""
    longest: int = follows("actor.rollout.max_response_tokens")
    """Tokens after which a response is cut."""
    slack: float = 0.2
    """Share of them, the last, in which a response begins to cost; 0 for no price (the paper: 4,096 of 20,480)."""


@recipe
def dapo(prompts: Prompts, actor: Actor, reward: Reward, cfg: DAPO) -> None:
    """Groups that teach something, and a loss over all of their tokens."""

    def attempt(given: Batch) -> Batch:
        batch = actor.generate_sequences(given, n=cfg.samples_per_prompt)
        return drop_equal_groups(reward.compute_reward(batch))

    batch = refill(prompts, attempt, groups=cfg.groups, rounds=cfg.rounds, short=cfg.short)
    if cfg.slack:
        batch = penalise_overlong(batch, longest=cfg.longest, slack=cfg.slack)
    if cfg.mini_batches > 1:
        batch = actor.compute_log_prob(batch)
    batch = grpo_advantage(batch)
    loss = ppo_clip(cfg.clip, clip_high=cfg.clip_high, on_policy=cfg.mini_batches == 1)
    actor.update_actor(batch, loss=loss, mini_batches=cfg.mini_batches)
