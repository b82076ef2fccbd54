"""Online iterative DPO (Xiong et al. 2023, arXiv 2312.11456): pairs from the policy's own responses, every step."""

from dataclasses import dataclass

from rlhf_dist.algorithms import dpo
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst


@dataclass(frozen=True, kw_only=True)
class IterativeDPO:
    """Settings of online iterative DPO."""

    samples_per_prompt: int = 8
    """Responses to each prompt; the best and the worst make the pair."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""


@recipe
def iterative_dpo(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: IterativeDPO) -> None:
    """DPO on the best and the worst of each group of responses; prompts whose rewards are all equal drop out."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = reward.compute_reward(batch)
    pairs = keep_best_and_worst(batch)
    pairs = reference.compute_ref_log_prob(pairs)
    actor.update_actor(pairs, loss=dpo(cfg.beta))
