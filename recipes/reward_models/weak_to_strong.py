"""Weak-to-strong generalisation (Burns et al. 2023, arXiv 2312.09390): a strong reward model learns from a weak one.

    L = (1 - a) CE(f, f_weak) + a CE(f, 1[f > t])          a rises linearly from 0 to its value in `warmup` steps

f is the chance that a pair's first response is better, sigma(r_1 - r_2). The second term is the student's own answer,
hardened: it may trust itself where it is sure. t is 1/2 (the paper: what hardens as many to either side as there are).
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Preferences, RewardModel, State, state_op

PAPERS = {
    "weak_to_strong": Paper(
        title="Weak-to-strong generalisation with a confidence loss",
        year=2023,
        arxiv="2312.09390",
        rows=(130,),
        needs=("XLM", "RMT", "AUX"),
        assumed="a 0.5 after 100 steps; the threshold of hardening is 1/2",
    )
}


@dataclass(frozen=True, kw_only=True)
class WeakToStrong:
    """Settings of weak-to-strong learning."""

    confidence: float = 0.5
    """a after the warm-up, the share of the student's own answers."""
    warmup: int = 100
    """Steps until then."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class Confidence(State):
    """a of the step at hand."""

    def initial(self, cfg: WeakToStrong) -> dict[str, float]:
        return {"step": 0.0, "share": 0.0}

    @state_op(reads=("group_id",))
    def advance(
        self, numbers: dict[str, float], batch: Batch, *, confidence: float, warmup: int
    ) -> tuple[dict[str, float], Metrics]:
        """To the next step."""
        step = numbers["step"] + 1
        share = confidence * min(1.0, step / max(warmup, 1))
        return {"step": step, "share": share}, {"confidence": Mean(numbers["share"])}


@host_op(reads=("weak_rewards", "label", "group_id"), writes=("weak_chance",), scope="groups")
def weak_labels(batch: Batch) -> Batch:
    """For both rows of a pair, the weak model's chance that the row labelled +1 is better. The label says which row is
    which, and not that it is right."""
    chance = np.zeros(batch.num_rows, np.float32)
    for rows in batch.group():
        chance[rows] = 1 / (
            1 + np.exp(-float((batch["weak_rewards"].values[rows] * batch["label"].values[rows]).sum()))
        )
    return Batch({"weak_chance": Column(chance)})


@loss(reads=("label", "weak_chance"), outputs=("scores",), average="groups")
def confident(model, rows, share: float = 0.5):
    """Cross-entropy with the weak model's answer, and with one's own, hardened."""
    first, second = chosen_and_rejected(model.scores, rows)
    gap, (weak, _) = first - second, chosen_and_rejected(rows["weak_chance"], rows)
    own = (gap.detach() > 0).to(gap.dtype)
    target = (1 - share) * weak + share * own
    value = -target * log_sigmoid(gap) - (1 - target) * log_sigmoid(-gap)
    return value, {"agrees_with_weak": (own == (weak > 0.5)).to(gap.dtype), "accuracy": own}


@recipe
def weak_to_strong(
    pairs: Preferences, reward: RewardModel, weak: RewardModel, share: Confidence, cfg: WeakToStrong
) -> None:
    """A reward model on the labels of a weaker one."""
    pairs = weak_labels(weak.compute_reward(pairs, out="weak_rewards"))
    reward.update_reward_model(pairs, loss=confident(share.value("share")), mini_batches=cfg.mini_batches)
    share.advance(pairs, confidence=cfg.confidence, warmup=cfg.warmup)
