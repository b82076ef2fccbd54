"""POPri: preferences from private clients (Hou et al. 2025, arXiv 2504.16438): synthetic data like what nobody may see.

    s_c(y) = mean over client c's texts of cos(e(y), e(text)),   the vector over all samples cut to length 1
    r = (sum_c s_c + N(0, sigma^2)) / clients                    all that leaves the clients
    DPO on (best, l-th best) of each prompt's samples; the policy draws new ones at the next step

e is the mean of a frozen model's last states over a text's tokens. A row of `clients` is a client with one text; the
source draws those who take part in a step. Which sigma gives which privacy is for an accountant to say, who knows how
many clients there are and how many steps: nothing here keeps an account.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.algorithms import dpo
from rlhf_dist.algorithms.ragged import row_of_token
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Examples, LanguageModel, Prompts, Reference
from rlhf_dist.transforms.columns import mean_of

PAPERS = {
    "popri": Paper(
        title="POPri: preferences of private clients",
        year=2025,
        arxiv="2504.16438",
        rows=(91,),
        needs=("ROLL", "JUDGE", "PAIR", "PREF", "SNAP"),
        assumed="a client has one text; the states of a language model in place of an encoder of sentences; "
        "l the middle rank; no accountant of privacy",
    )
}


@dataclass(frozen=True, kw_only=True)
class POPri:
    """Settings of learning from private clients."""

    samples_per_prompt: int = 10
    """J: samples of each prompt."""
    rank: int = 5
    """l: the sample of this rank, from 1, is the rejected one; the last where there are fewer."""
    noise: float = 1.0
    """sigma: standard deviation of what is added to the clients' sum."""
    longest: float = 1.0
    """Length that a client's vector is cut to."""
    beta: float = 0.1
    """DPO's strength of the pull towards the reference."""
    iteration: int = 1
    """Steps after which the policy becomes the reference."""


@host_op(reads=(("hidden", "response_mask"), ("hidden", "response_mask")), writes=("rewards",), scope="batch")
def private_scores(
    batch: Batch, clients: Batch, *, noise: float, longest: float, rng: np.random.Generator
) -> HostResult:
    """The noisy mean over clients of their cut similarities, for each sample."""
    similar = directions(clients) @ directions(batch).T
    lengths = np.linalg.norm(similar, axis=1, keepdims=True)
    cut = similar * np.minimum(1.0, longest / np.maximum(lengths, 1e-12))
    total = cut.sum(0) + rng.normal(0.0, noise, batch.num_rows) if noise else cut.sum(0)
    rewards = total / max(clients.num_rows, 1)
    metrics = {"cut_clients": mean_of(lengths[:, 0] > longest), "reward": mean_of(rewards)}
    return HostResult(columns=Batch({"rewards": Column(rewards.astype(np.float32))}, batch.num_rows), metrics=metrics)


def directions(batch: Batch) -> np.ndarray[Any, Any]:
    """[B, H] the mean state over each row's counted tokens, of length 1; 0 for a row without any."""
    hidden, mask = batch["hidden"], batch["response_mask"]
    total = np.zeros((batch.num_rows, hidden.values.shape[1]))
    np.add.at(total, row_of_token(mask.offsets), hidden.values * (mask.values > 0)[:, None])
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


@host_op(reads=("rewards", "group_id"), writes=("label",), scope="groups", rows="drop", least_group=2)
def best_and_ranked(batch: Batch, *, rank: int) -> HostResult:
    """Of each group the best row (+1) and the one of this rank (-1); the first of equal ones stands in front."""
    keep, label = list[int](), list[int]()
    for rows in batch.group():
        order = rows[np.argsort(-batch["rewards"].values[rows], kind="stable")]
        if len(order) > 1:
            keep += [int(order[0]), int(order[min(rank, len(order)) - 1])]
            label += [1, -1]
    kept = np.array(keep, np.int64)
    order = np.argsort(kept)
    columns = Batch({"label": Column(np.array(label, np.int8)[order])}, len(kept))
    return HostResult(columns=columns, keep=kept[order], metrics={"pairs": Mean(len(kept) / 2, 0)})


@recipe
def popri(
    prompts: Prompts, clients: Examples, actor: Actor, encoder: LanguageModel, reference: Reference, cfg: POPri
) -> None:
    """DPO on what clients find like their own."""
    batch = encoder.compute_hidden(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = private_scores(batch, encoder.compute_hidden(clients), noise=cfg.noise, longest=cfg.longest)
    pairs = reference.compute_ref_log_prob(best_and_ranked(batch.drop("hidden"), rank=cfg.rank))
    actor.update_actor(pairs, loss=dpo(cfg.beta))
    reference.copy_from(actor, every=cfg.iteration)
