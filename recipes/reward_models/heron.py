"""HERON: labels from weak signals in order of importance (Bukharin et al. 2023, arXiv 2309.02632).

    of two responses, the first signal with |s_i(y) - s_i(y')| > d_i says which is better; a pair of which none does
    is dropped

A reward model learns these labels with Bradley-Terry, on responses of the policy; RL with it is another stage (ppo).
The signals are rules here, the first the most important, such as: the tests pass, the code parses, it is short.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import bradley_terry
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Opponent, Prompts, Reward, RewardModel

PAPERS = {
    "heron": Paper(
        title="HERON",
        year=2023,
        arxiv="2309.02632",
        rows=(117,),
        needs=("RMT", "VER", "ROLL", "CRIT"),
        assumed="two signals; thresholds 0; the PPO stage is the recipe ppo",
    )
}


@dataclass(frozen=True, kw_only=True)
class HERON:
    """Settings of hierarchical labels."""

    first_threshold: float = 0.0
    """d_1: a difference of the first signal up to this says nothing."""
    second_threshold: float = 0.0
    """d_2."""
    mini_batches: int = 1
    """Optimizer steps for each batch of pairs."""


@host_op(reads=("signal_1", "signal_2", "group_id"), writes=("label",), scope="groups", rows="drop")
def first_that_decides(batch: Batch, *, thresholds: tuple[float, float]) -> HostResult:
    """Pairs, labelled by the first signal that tells their two rows apart."""
    label, decided = np.zeros(batch.num_rows, np.int8), [0, 0]
    for rows in batch.group():
        one, other = rows[0], rows[-1]
        for level, (name, least) in enumerate(zip(("signal_1", "signal_2"), thresholds, strict=True)):
            gap = float(batch[name].values[one]) - float(batch[name].values[other])
            if one != other and abs(gap) > least:
                label[one], label[other] = (1, -1) if gap > 0 else (-1, 1)
                decided[level] += 1
                break
    keep, pairs = np.flatnonzero(label), float(len(batch.group()))
    metrics = {f"decided_by_{level + 1}": Mean(float(count), pairs) for level, count in enumerate(decided)}
    return HostResult(columns=Batch({"label": Column(label[keep])}, len(keep)), keep=keep, metrics=metrics)


@recipe
def heron(prompts: Prompts, policy: Opponent, first: Reward, second: Reward, learner: RewardModel, cfg: HERON) -> None:
    """A reward model on labels of ordered signals."""
    batch = first.compute_reward(policy.generate_sequences(prompts, n=2), out="signal_1")
    batch = second.compute_reward(batch, out="signal_2")
    pairs = first_that_decides(batch, thresholds=(cfg.first_threshold, cfg.second_threshold))
    learner.update_reward_model(pairs, loss=bradley_terry(), mini_batches=cfg.mini_batches)
