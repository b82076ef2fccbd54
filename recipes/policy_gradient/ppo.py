"""Proximal policy optimisation for language models.

Schulman et al. 2017, arXiv 1707.06347; InstructGPT, Ouyang et al. 2022, arXiv 2203.02155. Its graph is the
first example of HybridFlow (Sheng et al. 2024, arXiv 2409.19256).
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms import gae, penalise_cut_responses, whiten

PAPERS = {
    "ppo": Paper(
        title="HybridFlow: PPO for language models",
        year=2024,
        arxiv="2409.19256",
        rows=(1,),
        needs=("PLACE", "ROLL", "RM", "REF", "CRIT", "ADV"),
    ),
    "realhf": Paper(
        title="ReaLHF: placement and parallelism of each node",
        year=2024,
        arxiv="2406.14088",
        rows=(2,),
        status="outline",
        needs=("PLACE", "ROLL", "RM", "REF", "CRIT"),
        settings={"placement": "standalone"},
        assumed=(
            "every role, and generation, on devices and with parallelism of its own; `rlhf-dist plan` searches the "
            "plan by a cost model; weights move between roles and generation, not between two calls of one role"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Settings of PPO."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    mini_batches: int = 4
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1
    """Passes over the batch."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    value_clip: float = 0.2
    """A new value may move this far from the old one; in reward units; 0 for any distance."""
    value_coef: float = 0.5
    """Factor of the squared error in the critic's loss."""
    average: Literal["tokens", "rows", "rows_with_tokens", "groups"] = "tokens"
    """What both losses are averaged over: all tokens, responses, responses with a counted token, or prompts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: float = 0.02
    """Penalty on the KL estimate, added to each token's reward; 0 for none."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of the KL in the reward; k1 is log pi - log pi_ref."""
    kl_cap: float = 0.0
    """Largest penalised KL estimate of a token, nats; 0 for none."""
    whiten: bool = True
    """Bring the advantages of the step to mean 0 and standard deviation 1."""
    ddof: Literal[0, 1] = 0
    """That standard deviation has divisor n - ddof."""
    cut_penalty: float = 0.0
    """Taken off the reward of a response that the token limit cut, reward units; 0 for none."""
    critic_warmup: int = 0
    """Steps in which only the critic learns."""
    correction: Literal["none", "token", "sequence", "masked", "geometric"] = "none"
    """Importance correction for rows of an older policy (placement.max_staleness): truncated per token or per
    sequence, masked per token, responses left out by their geometric mean, or none."""
    correction_cap: float = 2.0
    """Largest importance weight (of geometric: mean), >= 1."""


@recipe
def ppo(prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward, cfg: PPO) -> None:
    """PPO with a critic, a reference and a reward."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = actor.compute_log_prob(batch)
    batch = critic.compute_values(batch)
    batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    if cfg.cut_penalty:
        batch = penalise_cut_responses(batch, penalty=cfg.cut_penalty)
    penalty = {"kl_coef": cfg.kl_coef, "kl_estimator": cfg.kl_estimator, "kl_cap": cfg.kl_cap}
    batch = gae(batch, gamma=cfg.gamma, lam=cfg.lam, **penalty)
    if cfg.whiten:
        batch = whiten(batch, ddof=cfg.ddof)
    cuts = {"mini_batches": cfg.mini_batches, "epochs": cfg.epochs}
    critic.update_critic(batch, loss=value_clip(cfg.value_clip, coef=cfg.value_coef, average=cfg.average), **cuts)
    loss = ppo_clip(cfg.clip, average=cfg.average, correction=cfg.correction, correction_cap=cfg.correction_cap)
    actor.update_actor(batch, loss=loss, after=cfg.critic_warmup, **cuts)
