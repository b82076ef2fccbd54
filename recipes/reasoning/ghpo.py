"""GHPO: guided hybrid policy optimisation (Liu et al. 2025, arXiv 2507.10628): hints where a problem is too hard.

    all of a group wrong:  the prompt gets the first 25 % of the reference solution, then 50 %, then 75 %, and is
                           answered again, until a response is right
    else:                  GRPO as it is

Groups without a right response teach GRPO nothing. The hint is part of the prompt, so it has no loss. Rows have the
reference solution as their response.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Examples, Reward
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "ghpo": Paper(
        title="GHPO",
        year=2025,
        arxiv="2507.10628",
        rows=(149,),
        needs=("ROLL", "VER", "ADV", "PFX", "BRANCH", "SAMP"),
        assumed="no cold-start steps without hints; all three hints may be tried in one step",
    )
}
HINTS = (0.25, 0.5, 0.75)
"""Shares of the solution."""


@dataclass(frozen=True, kw_only=True)
class GHPO:
    """Settings of GHPO."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    right: float = 0.5
    """A response with a reward above this is right."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@host_op(reads=("rewards", "group_id"), writes=("too_hard",), scope="groups")
def all_wrong(batch: Batch, *, right: float) -> HostResult:
    """1 for the rows of groups without a right response."""
    hard, groups = np.zeros(batch.num_rows, np.float32), batch.group()
    for rows in groups:
        hard[rows] = not (batch["rewards"].values[rows] > right).any()
    found = sum(float(hard[rows[0]]) for rows in groups)
    metrics = {"too_hard": Mean(found, float(len(groups)))}
    return HostResult(columns=Batch({"too_hard": Column(hard)}), metrics=metrics)


@host_op(
    reads=(("prompt_ids", "response_ids", "group_id"), ("group_id",)),
    writes=("prompt_ids",),
    scope="groups",
    rows="drop",
)
def with_hint(problems: Batch, hard: Batch, *, share: float) -> HostResult:
    """The problems whose group is in `hard`, with the first `share` of their solution behind the prompt."""
    keep = np.flatnonzero(np.isin(problems["group_id"].values, hard["group_id"].values))
    prompts = []
    for row in keep:
        solution = problems["response_ids"].row(int(row))
        prompts.append(np.concatenate([problems["prompt_ids"].row(int(row)), solution[: int(share * len(solution))]]))
    return HostResult(columns=Batch({"prompt_ids": Column.ragged(prompts, dtype="int32")}, len(keep)), keep=keep)


@recipe
def ghpo(problems: Examples, actor: Actor, reward: Reward, cfg: GHPO) -> None:
    """GRPO with as much of the solution as a problem needs."""
    batch = reward.compute_reward(actor.generate_sequences(problems, n=cfg.samples_per_prompt))
    hard, batch = all_wrong(batch, right=cfg.right).where("too_hard")
    for number, share in enumerate(HINTS, start=1):
        again = actor.generate_sequences(with_hint(problems, hard, share=share), n=cfg.samples_per_prompt)
        again = all_wrong(reward.compute_reward(again), right=cfg.right)
        hard, helped = again.where("too_hard")
        batch = batch.concat(helped) if number < len(HINTS) else batch.concat(again)
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, on_policy=True))
