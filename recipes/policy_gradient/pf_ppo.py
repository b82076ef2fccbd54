"""PF-PPO: policy filtration (Shen and Zhang 2024, arXiv 2409.06957): PPO on the responses whose rewards can be trusted.

Of N responses to a prompt, ranked by reward, those are kept at which the reward model agrees best with the truth: the
best, the best and one at random, or the best and the worst. They go into a buffer of earlier steps' rows, too.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.replay import Replay
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.schema import TRAINABLE

Strategy = Literal["best", "best_random", "best_worst"]


PAPERS = {
    "pf_ppo": Paper(
        title="PF-PPO",
        year=2024,
        arxiv="2409.06957",
        rows=(22,),
        needs=("ROLL", "RM", "CRIT", "FILT", "MIX"),
        assumed="which rows are kept is a setting, not found from R^2 of reward and truth",
    )
}


@dataclass(frozen=True, kw_only=True)
class PFPPO(WithCritic):
    """Settings of PF-PPO."""

    samples_per_prompt: int = 5
    """Responses to each prompt."""
    keep: Strategy = "best_worst"
    """Which of them are trained on."""
    replayed: int = 0
    """Rows of earlier steps that are trained on, too."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""


@host_op(reads=("rewards", "group_id"), rows="drop", scope="batch")
def filtered(batch: Batch, *, keep: Strategy, rng: np.random.Generator) -> HostResult:
    """The rows of each group that `keep` says; the first wins a tie."""
    kept = []
    for rows in batch.group():
        order = rows[np.argsort(-batch["rewards"].values[rows], kind="stable")]
        kept.append(order[0])
        if len(order) > 1 and keep != "best":
            kept.append(order[-1] if keep == "best_worst" else order[rng.integers(1, len(order))])
    chosen = np.sort(np.array(kept, dtype=np.int64))
    share = Mean(float(len(chosen)), float(batch.num_rows))
    return HostResult(columns=Batch({}, len(chosen)), keep=chosen, metrics={"kept": share})


@recipe
def pf_ppo(
    prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward, buffer: Replay, cfg: PFPPO
) -> None:
    """PPO on filtered rows, new and old."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = filtered(reward.compute_reward(batch), keep=cfg.keep)
    if cfg.replayed:
        # Without rollout_log_probs: rows of older policies are not expected to have the log-probs that they had.
        old = buffer.sample(rows=cfg.replayed, columns=(*TRAINABLE, "rewards"))
        buffer.add(batch)
        batch = batch.concat(old)
    learn_with_critic(batch, actor, critic, reference, cfg)
