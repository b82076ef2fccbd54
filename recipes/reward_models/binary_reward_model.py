"""A reward model of one response at a time: RLUF's P[Love] (2025, arXiv 2505.14946), outcomes, two classes of text.

    L = -[y log s(r) + (1 - y) log s(-r)]          r the score, y `desirable`: 1 or 0

No pair is needed, so that what users click, or what text is of which class, can be learned from. Unlike
Bradley-Terry's, its zero means something: s(r) is a probability.
"""

from dataclasses import dataclass

from recipes.preference.kto import Labelled
from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import RewardModel

PAPERS = {
    "binary_reward_model": Paper(
        title="RLUF: a model of users' reactions",
        year=2025,
        arxiv="2505.14946",
        rows=(120,),
        needs=("RMT", "MRM", "ROLL", "ADV"),
        assumed="RL on it beside other rewards is reward_ensemble/rluf",
    ),
    "simplification": Paper(
        title="Health text simplification: a classifier of originals and simplified texts",
        year=2024,
        arxiv="2401.15043",
        rows=(133,),
        status="outline",
        needs=("RMT", "RM", "ROLL", "CRIT"),
        assumed="only the rows differ; RL on it is the recipe ppo, a reward of similarity beside it reward_ensemble",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Binary:
    """Settings of a reward model of reactions."""

    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@loss(reads=("desirable",), outputs=("scores",), average="rows")
def binary_cross_entropy(model, rows):
    """One number a response."""
    good = rows["desirable"] > 0
    value = -log_sigmoid(model.scores.where(good, -model.scores))
    right = (model.scores > 0) == good
    return value, {"accuracy": right.to(value.dtype), "score": model.scores.detach()}


@recipe
def binary_reward_model(examples: Labelled, reward: RewardModel, cfg: Binary) -> None:
    """Binary cross-entropy on labelled responses."""
    reward.update_reward_model(examples, loss=binary_cross_entropy(), mini_batches=cfg.mini_batches)
