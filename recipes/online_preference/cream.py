"""CREAM: consistency-regularised self-rewarding (Wang et al. 2024, arXiv 2410.12735): the policy's own log-ratio ranks.

    r(y) = log pi(y)/pi_0(y)                        ranks n responses; the best and the worst make the pair
    C = (tau + 1) / 2                               tau: Kendall's, of this ranking and that of the previous iterate's r
    L = C L_DPO(w, l) + (1 - C) L_DPO(l, w)         where two iterates disagree, the label is worth less

C is the mean over the prompts of a step. The previous iterate is the policy of `every` steps ago, DPO's reference too.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reference
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "cream": Paper(
        title="CREAM",
        year=2024,
        arxiv="2410.12735",
        rows=(80,),
        needs=("ROLL", "SNAP", "PAIR", "PREF", "REF", "STATE"),
        assumed="an iteration is `every` steps; C is of a step's prompts, not of the whole data",
    )
}


@dataclass(frozen=True, kw_only=True)
class CREAM:
    """Settings of CREAM."""

    samples_per_prompt: int = 5
    """Responses to each prompt."""
    beta: float = 0.1
    """Strength of the pull towards the previous iterate."""
    every: int = 100
    """Steps of an iteration, after which the policy becomes the previous iterate."""


@host_op(
    reads=("old_log_probs", "previous_log_probs", "ref_log_probs", "response_mask", "group_id"),
    writes=("rewards", "consistency"),
    scope="batch",
)
def self_rewards(batch: Batch) -> HostResult:
    """The implicit reward of each response, and C, the same for every row."""
    mask = batch["response_mask"]

    def ratio(name: str) -> np.ndarray:
        gap = (batch[name].values - batch["ref_log_probs"].values) * (mask.values > 0)
        return sum_rows(gap, mask.offsets)

    own, before = ratio("old_log_probs"), ratio("previous_log_probs")
    taus = [kendall(own[rows], before[rows]) for rows in batch.group() if len(rows) > 1]
    consistency = (float(np.mean(taus)) + 1) / 2 if taus else 1.0
    columns = {
        "rewards": Column(own.astype(np.float32)),
        "consistency": Column(np.full(batch.num_rows, consistency, np.float32)),
    }
    return HostResult(columns=Batch(columns), metrics={"consistency": Mean(consistency)})


def kendall(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's tau-a of two rankings of n > 1 things: (concordant - discordant pairs) / pairs."""
    agree = np.sign(one[:, None] - one[None, :]) * np.sign(other[:, None] - other[None, :])
    return float(agree.sum() / (len(one) * (len(one) - 1)))


@loss(reads=("label", "previous_log_probs", "consistency"), average="groups")
def consistent_dpo(model, rows, beta: float = 0.1):
    """DPO with the label smoothed by 1 - C, towards the previous iterate."""
    ratio = rows.sum_tokens(model.log_probs - rows["previous_log_probs"])
    chosen, rejected = chosen_and_rejected(beta * ratio, rows)
    trust, _ = chosen_and_rejected(rows["consistency"], rows)
    value = -trust * log_sigmoid(chosen - rejected) - (1 - trust) * log_sigmoid(rejected - chosen)
    return value, {"margin": (chosen - rejected).detach(), "consistency": trust}


@recipe
def cream(prompts: Prompts, actor: Actor, previous: Reference, reference: Reference, cfg: CREAM) -> None:
    """DPO on pairs that the policy ranks, trusted as far as it agrees with itself."""
    batch = actor.compute_log_prob(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = reference.compute_ref_log_prob(batch)
    batch = previous.compute_ref_log_prob(batch, out="previous_log_probs")
    pairs = keep_best_and_worst(self_rewards(batch))
    actor.update_actor(pairs, loss=consistent_dpo(cfg.beta))
    previous.copy_from(actor, every=cfg.every, after=cfg.every)
