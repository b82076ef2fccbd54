"""RLCCF: several policies that share a vote (Yuan et al. 2025, arXiv 2508.12338): no ground truth, no reward model.

    w_m = share of policy m's most frequent answer among its own: its self-consistency
    y^  = the answer with the most weight over the answers of all policies
    r   = 1[answer = y^],  GRPO for each policy on its own responses

Two policies here, of different models. The answer is what the last \\boxed holds, else the last number, else
the text.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "rlccf": Paper(
        title="RLCCF: collective feedback",
        year=2025,
        arxiv="2508.12338",
        rows=(153,),
        needs=("CO", "ROLL", "XLM", "ADV"),
        assumed="two policies; how an answer is read from a response",
    )
}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class RLCCF:
    """Settings of learning from a shared vote."""

    samples_per_prompt: int = 8
    """Responses of each policy to each prompt."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


def answer_of(response: str) -> str:
    """What a response says in the end."""
    found = _BOXED.findall(response) or _NUMBER.findall(response)
    return found[-1].strip() if found else response.strip()


@host_op(reads=(("response", "group_id"), ("response", "group_id")), writes=("rewards",), scope="groups")
def agrees_with_vote(batch: Batch, others: Batch) -> HostResult:
    """1 for the responses of `batch` whose answer is that of the weighted vote of both batches, else 0; the first
    answer to come wins a tie."""
    mine, theirs = _answers(batch), _answers(others)
    rewards, agreed = np.zeros(batch.num_rows, np.float32), 0.0
    for group, rows in mine.items():
        # In the order of the answers themselves, so that both policies see one vote.
        votes: dict[str, float] = defaultdict(float)
        for said in ([answer for _, answer in rows], [answer for _, answer in theirs.get(group, [])]):
            weight = max((said.count(answer) for answer in set(said)), default=0) / max(len(said), 1)
            for answer in said:
                votes[answer] += weight / len(said)
        elected = max(sorted(votes), key=votes.__getitem__)
        for row, answer in rows:
            rewards[row] = answer == elected
        agreed += votes[elected] / max(sum(votes.values()), 1e-9)
    metrics = {"reward": Mean(float(rewards.sum()), batch.num_rows), "agreement": Mean(agreed, float(len(mine)))}
    return HostResult(columns=Batch({"rewards": Column(rewards)}), metrics=metrics)


def _answers(batch: Batch) -> dict[int, list[tuple[int, str]]]:
    """Group -> its rows with their answers."""
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    said = zip(batch["group_id"].values.tolist(), batch["response"].rows(), strict=True)
    for row, (group, response) in enumerate(said):
        found[group].append((row, answer_of(response)))
    return found


@recipe
def rlccf(prompts: Prompts, first: Actor, second: Actor, cfg: RLCCF) -> None:
    """Two policies learn from what both agree on."""
    own = first.generate_sequences(prompts, n=cfg.samples_per_prompt)
    theirs = second.generate_sequences(prompts, n=cfg.samples_per_prompt)
    for policy, batch, others in ((first, own, theirs), (second, theirs, own)):
        batch = grpo_advantage(agrees_with_vote(batch, others))
        policy.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
