"""OSP: online self-preferring language models (Zhai et al. 2024, arXiv 2405.14103): pairs with a strength.

    p = P(y > y') by the policy's own verdicts,   D = log pi/pi_ref(y) - log pi/pi_ref(y')
    L = -p log s(beta D) - (1 - p) log s(-beta D)

The policy compares its responses in both orders and ranks them by how often they win; the first is paired with the
last, the second with the one before it, and so on. p is 1/2 plus half the difference of both win rates. The reference
is the policy of the iteration before. p = 1 is DPO.
"""

from dataclasses import dataclass

import numpy as np

from recipes.online_preference._compared import compared
from recipes.online_preference.oaif import QUESTION
from recipes.preference._pairs import soft_pairs
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reference

PAPERS = {
    "self_preferring": Paper(
        title="Online self-preferring (OSP)",
        year=2024,
        arxiv="2405.14103",
        rows=(78,),
        needs=("ROLL", "JUDGE", "PAIR", "PREF", "SNAP"),
        assumed="who is paired with whom; p of two win rates; the wording; steps of an iteration",
    )
}


@dataclass(frozen=True, kw_only=True)
class SelfPreferring:
    """Settings of online self-preferring."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    rounds: int = 1
    """Responses of its group that each one is compared with: samples_per_prompt // 2 for all."""
    votes: int = 1
    """Verdicts on each pair in each order."""
    question: str = QUESTION
    """What the policy is asked about {prompt}, {response_a} and {response_b}."""
    marker: str = "Better:"
    """What stands before 1, 2 or tie in its answer."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    iteration: int = 100
    """Steps after which the policy becomes the reference."""


@host_op(reads=("rewards", "group_id"), writes=("label", "win", "group_id"), rows="drop", scope="groups", least_group=2)
def ranked_pairs(batch: Batch, *, most: int) -> HostResult:
    """Pairs of each group's rows by win rates in [0, 1]: first and last, second and last but one; label +1 for the
    higher, `win` its chance. Two of one rate are no pair.

    most: rows of a group at most. Pairs after the first have negative group ids, which no source gives.
    """
    wins, group = batch["rewards"].values, batch["group_id"].values
    label, chance, ids = np.zeros(batch.num_rows, np.int8), np.zeros(batch.num_rows, np.float32), group.copy()
    for rows in batch.group():
        order = rows[np.argsort(-wins[rows], kind="stable")]
        for place in range(len(order) // 2):
            pair = [order[place], order[-1 - place]]
            if wins[pair[0]] > wins[pair[1]]:
                label[pair], chance[pair] = (1, -1), (1 + wins[pair[0]] - wins[pair[1]]) / 2
                ids[pair] = group[pair[0]] if place == 0 else -(most * group[pair[0]] + place)
    keep = np.flatnonzero(label)
    columns = {"label": Column(label[keep]), "win": Column(chance[keep]), "group_id": Column(ids[keep])}
    strength = {"strength": Mean(float(chance[keep].sum()), float(len(keep)))} if len(keep) else {}
    metrics = {"pairs": Mean(len(keep) / 2, 0), **strength}
    return HostResult(columns=Batch(columns, len(keep)), keep=keep, metrics=metrics)


@recipe
def self_preferring(prompts: Prompts, actor: Actor, reference: Reference, cfg: SelfPreferring) -> None:
    """DPO with soft labels on pairs that the policy ranks itself."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    asked = {"votes": cfg.votes, "rounds": cfg.rounds}
    judged, _ = compared(batch, actor, cfg.question, cfg.marker, **asked).where("judged")
    pairs = reference.compute_ref_log_prob(ranked_pairs(judged, most=cfg.samples_per_prompt))
    actor.update_actor(pairs, loss=soft_pairs(cfg.beta))
    reference.copy_from(actor, every=cfg.iteration)
