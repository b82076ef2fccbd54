"""What n tries at a prompt come to: pass@k and best-of-n, and of each data set by itself, too.

    pass@k      mean over prompts of 1 - C(n - c, k) / C(n, k),  c of n tries right     (Chen et al. 2021, 2107.03374)
    best of k   mean over prompts of the expected highest reward among k of the n tries, drawn without replacement

k goes 1, 2, 4, ... up to n. Estimated from all n tries, both have less variance than k tries would have. A try whose
reward is missing is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
import numpy.typing as npt

from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.missing import is_missing


@host_op(reads=("rewards", "group_id", "source"), scope="groups", missing=True)
def tries(batch: Batch, *, right: float = 0.5) -> HostResult:
    """`pass_at_k` and `best_of_k` as metrics; of each source that has a name (a part of `data.heldout.mix`, or a row's
    `data_source`) `SOURCE/pass_at_k`, ... and its mean reward, `SOURCE/reward`. right: a try with a reward above it is
    right. A prompt with fewer than k tries is not in the means of k."""
    rewards = batch["rewards"].values.astype(np.float64)
    known, sources = ~is_missing(batch["rewards"].values), batch["source"].rows()
    totals: dict[str, Mean] = {}
    for rows in batch.group():
        of = rewards[rows[known[rows]]]
        found, source = _of_prompt(of, right), sources[rows[0]]
        if source:
            found |= {f"{source}/{name}": mean for name, mean in found.items()}
            found |= {f"{source}/reward": Mean(float(of.sum()), float(len(of)))} if len(of) else {}
        for name, mean in found.items():
            totals[name] = totals[name] + mean if name in totals else mean
    metrics: Metrics = {**totals, "missing_rewards": Mean(float((~known).sum()), 0)}
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


def _of_prompt(rewards: npt.NDArray[np.float64], right: float) -> dict[str, Mean]:
    found: dict[str, Mean] = {}
    k = 1
    while k <= len(rewards):
        found[f"pass_at_{k}"] = Mean(pass_at_k(len(rewards), int((rewards > right).sum()), k))
        found[f"best_of_{k}"] = Mean(best_of_k(rewards.tolist(), k))
        k *= 2
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n tries, drawn without replacement, hold one of the right ones."""
    return 1 - comb(n - right, k) / comb(n, k)


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Expected highest of k of these, drawn without replacement."""
    ordered = sorted(rewards)
    return sum(comb(at, k - 1) * reward for at, reward in enumerate(ordered)) / comb(len(ordered), k)
