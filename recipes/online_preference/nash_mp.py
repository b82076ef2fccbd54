"""Nash mirror prox (Tiapkin et al. 2025, arXiv 2505.19731): two steps of a game, the second from where the first began.

    pi_k+1/2   a step from pi_k on    P(y > y') - 1/2 - tau log pi(y)/pi_ref(y),   y ~ pi_k,  y' ~ pi_k
    pi_k+1     a step from pi_k again, on the same with                            y ~ pi_k,  y' ~ pi_k+1/2

The first step looks ahead at what one will be; the second answers that. Nash-MD (nash_md) has one step against a tamer
self; a slow opponent in place of the look ahead is nash_md/average. P is a sigmoid of the difference of rewards.
"""

from dataclasses import dataclass

from recipes.online_preference.nash_md import win_advantage
from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward

PAPERS = {
    "nash_mp": Paper(
        title="Nash mirror prox (Nash-MP)",
        year=2025,
        arxiv="2505.19731",
        rows=(96,),
        status="outline",
        needs=("ROLL", "PAIRJ", "REF", "SNAP", "BRANCH"),
        assumed="a gradient step in place of each regularised best response, no pull towards pi_k beside its size; "
        "tau 0.02; P is a sigmoid of the difference of rewards",
    )
}


@dataclass(frozen=True, kw_only=True)
class NashMP:
    """Settings of Nash mirror prox."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    kl_coef: float = 0.02
    """tau, the price of the log-ratio to the reference."""
    scale: float = 1.0
    """Rewards are divided by it before the sigmoid."""


@recipe
def nash_mp(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: NashMP) -> None:
    """A step against oneself, then the step against what that made."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))

    def step_against(theirs: Batch) -> None:
        rows = batch.join(reward.compute_reward(theirs), their_rewards="rewards")
        rows = win_advantage(rows, kl_coef=cfg.kl_coef, scale=cfg.scale)
        actor.update_actor(rows, loss=policy_gradient())

    itself = actor.generate_sequences(prompts)
    actor.save_weights("start", optimizer=True)
    step_against(itself)
    ahead = actor.generate_sequences(prompts)
    actor.restore_weights("start")
    step_against(ahead)
