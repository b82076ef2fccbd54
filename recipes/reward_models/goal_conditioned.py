"""Goal-conditioned representations of a reward model (Nath et al. 2024, arXiv 2407.13887).

    L = -log sigma(r(w) - r(l)) + c L_con
    L_con = -log [ exp(cos(s, g+) / tau) / (exp(cos(s, g+) / tau) + exp(cos(s, g-) / tau)) ]

s is the state at a token of the chosen response, g+ at a later one of the same response, g- at one of the rejected
response: s and g- are drawn evenly, g+ evenly of what follows, anew at every step. A pair whose chosen response has one
token, or whose rejected one has none, has no contrast. The states are those that the score is made of.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Preferences, RewardModel

PAPERS = {
    "goal_conditioned": Paper(
        title="Goal-conditioned representations for reward models",
        year=2024,
        arxiv="2407.13887",
        rows=(109,),
        needs=("RMT", "AUX", "HID"),
        assumed="one state, one goal and one negative a pair; cosine similarity, tau 0.1, c 0.1",
    )
}


@dataclass(frozen=True, kw_only=True)
class GoalConditioned:
    """Settings of a reward model with a contrastive term."""

    contrast_coef: float = 0.1
    """c."""
    tau: float = 0.1
    """Temperature of the contrast."""
    mini_batches: int = 1
    """Optimizer steps for each batch of pairs."""


@host_op(reads=("response_mask", "label"), writes=("source", "goal"), scope="batch")
def drawn_states(batch: Batch, *, rng: np.random.Generator) -> Batch:
    """`source` and `goal`: 1 at one token each, the goal behind the source; a rejected response has a goal alone.
    A chosen response of fewer than two tokens has neither, nor has a row without tokens."""
    mask = batch["response_mask"]
    source, goal = np.zeros((2, len(mask.values)), np.float32)
    for row, length in enumerate(mask.lengths):
        start, count = int(mask.offsets[row]), int(length)
        if batch["label"].values[row] <= 0:
            if count:
                goal[start + rng.integers(count)] = 1
        elif count > 1:
            at = int(rng.integers(count - 1))
            source[start + at] = 1
            goal[start + rng.integers(at + 1, count)] = 1
    return Batch({"source": Column(source, mask.offsets), "goal": Column(goal, mask.offsets)}, batch.num_rows)


@loss(reads=("label", "source", "goal"), outputs=("scores", "hidden"), average="groups")
def contrastive_preference(model, rows, contrast_coef: float = 0.1, tau: float = 0.1):
    """Bradley-Terry, and the chosen response's states against the rejected one's."""
    won, lost = chosen_and_rejected(model.scores, rows)
    group = rows.group_of_row[rows.row_of_token]
    chosen = (rows["label"] > 0)[rows.row_of_token].to(model.hidden.dtype)

    def state(weight):
        zero = model.hidden.new_zeros(rows.num_groups, model.hidden.shape[1])
        found = zero.index_add(0, group, model.hidden * weight[:, None])
        return found / found.norm(dim=1, keepdim=True).clamp(min=1e-6)

    here, ahead, other = state(rows["source"]), state(rows["goal"] * chosen), state(rows["goal"] * (1 - chosen))
    drawn = (here.norm(dim=1) > 0) & (other.norm(dim=1) > 0)
    contrast = -log_sigmoid(((here * ahead).sum(1) - (here * other).sum(1)) / tau) * drawn
    value = -log_sigmoid(won - lost) + contrast_coef * contrast
    metrics = {"accuracy": (won > lost).to(value.dtype), "margin": (won - lost).detach(), "contrast": contrast.detach()}
    return value, metrics


@recipe
def goal_conditioned(pairs: Preferences, reward: RewardModel, cfg: GoalConditioned) -> None:
    """A reward model whose states know where a response goes."""
    loss_of = contrastive_preference(cfg.contrast_coef, cfg.tau)
    reward.update_reward_model(drawn_states(pairs), loss=loss_of, mini_batches=cfg.mini_batches)
