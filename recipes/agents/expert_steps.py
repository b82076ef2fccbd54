"""An expert's action at each step of a trajectory against the policy's own: StepAgent.

Deng et al. 2024, arXiv 2411.03817.

    dpo    expert's action chosen, the policy's rejected, at the same state:  DPO of the step, every step's policy anew
    gail   a discriminator tells them apart, -log s(D(expert) - D(policy)); PPO on its score of the policy's action

A row is a step: the prompt is what the agent saw, the response what the expert did there. The policy acts from the
expert's states, so its errors do not add up over a trajectory.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import bradley_terry, dpo, ppo_clip
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, Reference, RewardModel
from rlhf_dist.transforms import mark_rows, rloo_advantage

PAPERS = {
    "expert_steps": Paper(
        title="StepAgent: implicit reward",
        year=2024,
        arxiv="2411.03817",
        rows=(170,),
        status="outline",
        needs=("TURN", "PFX", "PREF", "CO", "ROLL"),
        assumed="beta 0.1; the policy is compared at the expert's states; the reference is the start",
    ),
    "discriminator": Paper(
        title="StepAgent: inverse reinforcement learning",
        year=2024,
        arxiv="2411.03817",
        rows=(170,),
        status="outline",
        needs=("TURN", "PFX", "RMT", "CO", "ROLL", "ADV"),
        settings={"algorithm.kind": "gail", "algorithm.samples_per_step": 4},
        assumed="a pair loss for the discriminator; leave-one-out baselines in place of a critic; clip 0.2",
    ),
}


@host_op(reads=("group_id",), scope="groups", rows="drop")
def first_of_group(batch: Batch) -> HostResult:
    """The first row of each group."""
    keep = np.sort(np.array([rows[0] for rows in batch.group()], np.int64))
    return HostResult(columns=Batch({}, len(keep)), keep=keep)


@dataclass(frozen=True, kw_only=True)
class ExpertSteps:
    """Settings of learning from an expert's steps."""

    kind: Literal["dpo", "gail"] = "dpo"
    """How the expert is imitated."""
    samples_per_step: int = 1
    """Actions of the policy at each state; dpo takes one."""
    beta: float = 0.1
    """Of dpo: pull towards the reference."""
    clip: float = 0.2
    """Of gail: the probability ratio is cut at 1 - clip and 1 + clip."""


@recipe
def expert_steps(
    experts: Examples, actor: Actor, reference: Reference, discriminator: RewardModel, cfg: ExpertSteps
) -> None:
    """DPO or adversarial imitation, step by step."""
    own = actor.generate_sequences(experts, n=1 if cfg.kind == "dpo" else cfg.samples_per_step)
    columns = ("prompt_ids", "response_ids", "response_mask", "group_id")
    theirs, mine = (batch.select(*columns) for batch in (experts, own))
    expert = mark_rows(theirs, column="label", number=1)
    if cfg.kind == "dpo":
        pairs = expert.concat(mark_rows(mine, column="label", number=-1))
        actor.update_actor(reference.compute_ref_log_prob(pairs), loss=dpo(cfg.beta))
        return
    one = mark_rows(first_of_group(mine), column="label", number=-1)
    discriminator.update_reward_model(expert.concat(one), loss=bradley_terry())
    scored = rloo_advantage(discriminator.compute_reward(actor.compute_log_prob(own)))
    actor.update_actor(scored, loss=ppo_clip(cfg.clip))
