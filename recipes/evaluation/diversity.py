"""What RLHF does to diversity (Kirk et al. 2023, arXiv 2310.06452): of one prompt's responses, and across prompts.

    distinct_n(texts) = number of different n-grams / number of n-grams, mean over n = 1 .. 5         (of words)
    per input         mean over prompts of distinct_n of the prompt's responses
    across inputs     distinct_n of one response of each prompt

Run it for an SFT, a best-of-n and an RLHF model, on prompts like those of training and others. `reward` is reported
too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Opponent, Prompts, Reward

PAPERS = {
    "diversity": Paper(
        title="RLHF's effects on generalisation and diversity",
        year=2023,
        arxiv="2310.06452",
        rows=(203,),
        status="study",
        needs=("EVAL", "ROLL", "RM", "FILT", "CRIT"),
        assumed="diversity by expectation-adjusted n-grams and by embeddings is not computed",
    )
}
LONGEST = 5


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Settings of the measurement."""

    samples_per_prompt: int = 16
    """Responses to each prompt."""


@host_op(reads=("response", "rewards", "group_id"), scope="batch")
def measured(batch: Batch) -> HostResult:
    """Both diversities and the mean reward, as metrics."""
    texts, groups = list(batch["response"].rows()), batch.group()
    per_input = [distinct([texts[row] for row in rows]) for rows in groups]
    across = distinct([texts[rows[0]] for rows in groups])
    metrics = {
        "diversity_per_input": Mean(sum(per_input), float(len(groups))),
        "diversity_across_inputs": Mean(across),
        "reward": Mean(float(batch["rewards"].values.sum()), float(batch.num_rows)),
    }
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


def distinct(texts: Sequence[str]) -> float:
    """Share of different n-grams of words, mean over n; a length n that no text reaches is left out, 0 without
    words."""
    shares = []
    for n in range(1, LONGEST + 1):
        words = [text.split() for text in texts]
        found = Counter(tuple(one[at : at + n]) for one in words for at in range(len(one) - n + 1))
        if found:
            shares.append(len(found) / found.total())
    return sum(shares) / len(shares) if shares else 0.0


@recipe
def diversity(prompts: Prompts, policy: Opponent, reward: Reward, cfg: Diversity) -> None:
    """Diversity and reward of a policy's responses."""
    measured(reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt)))
