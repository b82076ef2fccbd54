"""PMPO: preference optimisation as inference (Abdolmaleki et al. 2024, arXiv 2410.04166): good and bad, unpaired.

    L = -alpha E_{y good}[log pi(y)] + (1 - alpha) E_{y bad}[log pi(y)] + beta KL(pi_ref || pi)

Either side may be empty; the forward KL, over the whole vocabulary at each token, holds what pushing bad responses down
would otherwise let go. Good are responses with a reward above the mean of their group, bad those below.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import distill, loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward

PAPERS = {
    "pmpo": Paper(
        title="PMPO",
        year=2024,
        arxiv="2410.04166",
        rows=(39,),
        needs=("ROLL", "JUDGE", "REF", "PREF"),
        assumed="alpha 0.5 and beta 0.5; a reward says what is good; the KL is of the drawn responses' tokens",
    )
}


@dataclass(frozen=True, kw_only=True)
class PMPO:
    """Settings of PMPO."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    alpha: float = 0.5
    """Weight of good responses; bad ones have 1 - alpha. 1: good ones alone, 0: bad ones alone."""
    beta: float = 0.5
    """Weight of KL(pi_ref || pi)."""


@host_op(reads=("rewards", "group_id"), writes=("weight",), scope="groups")
def good_and_bad(batch: Batch, *, alpha: float) -> Batch:
    """alpha, or -(1 - alpha), shared by the good, or bad, responses of a group; 0 for those at its mean."""
    weight = np.zeros(batch.num_rows, np.float32)
    for rows in batch.group():
        above = batch["rewards"].values[rows] - batch["rewards"].values[rows].mean()
        good, bad = rows[above > 0], rows[above < 0]
        weight[good], weight[bad] = alpha / max(len(good), 1), -(1 - alpha) / max(len(bad), 1)
    return Batch({"weight": Column(weight)})


@loss(reads=("weight",), average="groups")
def weighted_likelihood(model, rows):
    """-sum over a group of weight log pi(y)."""
    value = -rows.sum_groups(rows["weight"] * rows.sum_tokens(model.log_probs))
    return value, {"likelihood": -value.detach()}


@recipe
def pmpo(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: PMPO) -> None:
    """Good responses up, bad ones down, the rest held."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = good_and_bad(reference.compute_hidden(batch), alpha=cfg.alpha)
    actor.update_actor([(batch, weighted_likelihood()), (batch, distill("reference", "forward"), cfg.beta)])
