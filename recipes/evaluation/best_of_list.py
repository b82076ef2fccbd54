"""Whether a reward model finds the right response among several (RewardBench 2, Malik et al. 2025, arXiv 2506.01937).

    accuracy = share of prompts whose highest reward is of a right response          1 of 4; RewardMATH: 1 of 10
    ties     share of prompts with several right ones where each of these beats every wrong one, by more than the
             right ones are apart

Rows: prompt, response, `score` 1 if right, else 0; those of a prompt stand together.
"""

from dataclasses import dataclass

from recipes.preference.rankings import Scored, lists_of_prompts
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import RewardModel

PAPERS = {
    "best_of_list": Paper(
        title="RewardBench 2",
        year=2025,
        arxiv="2506.01937",
        rows=(199,),
        status="study",
        needs=("EVAL", "RM"),
        assumed="the weighting of the ties' two parts",
    ),
    "rewardmath": Paper(
        title="RewardMATH",
        year=2024,
        arxiv="2410.01729",
        rows=(200,),
        status="study",
        needs=("EVAL", "RM", "ROLL"),
        assumed=(
            "only the rows differ, nine wrong ones to a right one; correlation with an optimised policy is not computed"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class BestOfList:
    """Settings of the measurement."""

    right: float = 0.5
    """A response with a score above this is right."""


@host_op(reads=("scored", "rewards", "group_id"), scope="groups")
def found_right(batch: Batch, *, right: float) -> HostResult:
    """Accuracy of the highest reward, and of lists with several right responses. A tie at the top counts as wrong."""
    groups, best, ties, listed = batch.group(), 0.0, 0.0, 0.0
    for rows in groups:
        rewards, good = batch["scored"].values[rows], batch["rewards"].values[rows] > right
        if not good.any() or good.all():
            continue
        gap = float(rewards[good].min() - rewards[~good].max())
        best += float(rewards[good].max() > rewards[~good].max())
        if good.sum() > 1:
            listed += 1
            ties += float(gap > 0 and gap > float(rewards[good].max() - rewards[good].min()))
    metrics = {"best_accuracy": Mean(best, float(len(groups))), "ties_accuracy": Mean(ties, listed)}
    return HostResult(columns=Batch({}, batch.num_rows), metrics={k: v for k, v in metrics.items() if v.count})


@recipe
def best_of_list(examples: Scored, reward: RewardModel, cfg: BestOfList) -> None:
    """A reward model on lists with right and wrong responses."""
    lists = reward.compute_reward(lists_of_prompts(examples), out="scored")
    found_right(lists, right=cfg.right)
