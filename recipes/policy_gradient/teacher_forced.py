"""Rewards of a model trained by teacher forcing (Hao et al. 2022, arXiv 2210.08708): its logits are worth of actions.

    r_t = q(s_t, y_t) - max_a q(s_t+1, a)            q: logits of a supervised model; after the last token the max is 0
    REINFORCE:  -(sum_k>=t gamma^(k - t) r_k) log pi(y_t)

A supervised model's logits are taken for Q-values, of which the Bellman equation gives the reward. No reward model, no
data besides prompts. What comes after y_t counts against it as much as q thinks the best of it to be worth.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, LanguageModel, Prompts
from rlhf_dist.transforms import whiten

PAPERS = {
    "teacher_forced": Paper(
        title="Teacher forcing recovers reward functions",
        year=2022,
        arxiv="2210.08708",
        rows=(142,),
        needs=("XLM", "TOK", "ROLL", "ADV"),
        assumed="returns are whitened over the batch; gamma 1; no rows of parallel data beside the policy's own",
    )
}


@dataclass(frozen=True, kw_only=True)
class TeacherForced:
    """Settings of REINFORCE on recovered rewards."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    gamma: float = 1.0
    """Discount per token."""
    whiten: bool = True
    """Bring the returns of the step to mean 0 and standard deviation 1."""


@host_op(reads=("logits", "largest_logits", "response_mask"), writes=("token_rewards", "advantages"))
def recovered_rewards(batch: Batch, *, gamma: float) -> HostResult:
    """q(s_t, y_t) - max_a q(s_t+1, a) at every token that counts, and the sum of what follows from it."""
    mask = batch["response_mask"]
    offsets, counted = mask.offsets, mask.values > 0
    ahead = np.append(batch["largest_logits"].values[1:], 0.0).astype(np.float64)
    ahead[offsets[1:][mask.lengths > 0] - 1] = 0.0
    rewards = np.where(counted, batch["logits"].values - ahead, 0.0)
    returns = np.zeros(len(rewards))
    for row in range(batch.num_rows):
        total = 0.0
        for at in range(int(offsets[row + 1]) - 1, int(offsets[row]) - 1, -1):
            total = rewards[at] + gamma * total
            returns[at] = total * counted[at]
    columns = {
        "token_rewards": Column(rewards.astype(np.float32), offsets),
        "advantages": Column(returns.astype(np.float32), offsets),
    }
    metrics = {"return": Mean(float(rewards.sum()), batch.num_rows)}
    return HostResult(columns=Batch(columns, batch.num_rows), metrics=metrics)


@recipe
def teacher_forced(prompts: Prompts, actor: Actor, teacher: LanguageModel, cfg: TeacherForced) -> None:
    """REINFORCE on what a supervised model thinks each token worth."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = recovered_rewards(teacher.compute_logits(batch), gamma=cfg.gamma)
    actor.update_actor(whiten(batch) if cfg.whiten else batch, loss=policy_gradient())
