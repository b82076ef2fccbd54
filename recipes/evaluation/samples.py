"""What a policy reaches in n tries: held-out reward, pass@k and best-of-n.

    reward      mean over prompts and tries
    pass@k      mean over prompts of 1 - C(n - c, k) / C(n, k),  c of n tries right     (Chen et al. 2021, 2107.03374)
    best of k   mean over prompts of the expected highest reward among k of the n tries, drawn without replacement

k goes 1, 2, 4, ... up to n. Estimated from all n tries, both have less variance than k tries would have. A try whose
reward is missing is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import is_missing
from rlhf_dist.roles import Opponent, Prompts, Reward

PAPERS = {
    "samples": Paper(
        title="Held-out reward, pass@k and best-of-n",
        year=2021,
        arxiv="2107.03374",
        status="study",
        needs=("EVAL", "ROLL", "VER", "RM"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Settings of the measurement."""

    samples_per_prompt: int = 8
    """n: tries at each prompt."""
    right: float = 0.5
    """A try with a reward above this is right."""


@host_op(reads=("rewards", "group_id"), scope="groups")
def tries(batch: Batch, *, right: float) -> HostResult:
    """The three as metrics; a prompt with fewer than k tries is not in the means of k."""
    rewards = batch["rewards"].values.astype(np.float64)
    known = ~is_missing(batch["rewards"].values)
    found: dict[str, list[float]] = {}
    for rows in batch.group():
        of = rewards[rows[known[rows]]]
        k = 1
        while k <= len(of):
            found.setdefault(f"pass_at_{k}", []).append(pass_at_k(len(of), int((of > right).sum()), k))
            found.setdefault(f"best_of_{k}", []).append(best_of_k(of.tolist(), k))
            k *= 2
    metrics = {name: Mean(sum(values), float(len(values))) for name, values in found.items()}
    metrics["missing_rewards"] = Mean(float((~known).sum()), 0)
    if known.any():
        metrics["reward"] = Mean(float(rewards[known].sum()), float(known.sum()))
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n tries, drawn without replacement, hold one of the right ones."""
    return 1 - comb(n - right, k) / comb(n, k)


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Expected highest of k of these, drawn without replacement."""
    ordered = sorted(rewards)
    return sum(comb(at, k - 1) * reward for at, reward in enumerate(ordered)) / comb(len(ordered), k)


@recipe
def samples(prompts: Prompts, policy: Opponent, reward: Reward, cfg: Samples) -> None:
    """Rewards of n tries at each prompt."""
    tries(reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt)), right=cfg.right)
