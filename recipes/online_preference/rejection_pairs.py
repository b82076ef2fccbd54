"""RSO: statistical rejection sampling (Liu et al. 2023, arXiv 2309.06657): pairs that the optimal policy would make.

    y ~ pi_sft is accepted with probability exp((r(y) - r_max) / beta),   r_max the best of the prompt's responses

What is accepted is distributed as pi*(y) ~ pi_sft(y) exp(r(y) / beta); pairs of it, labelled by reward, take DPO's loss
or the hinge, both on log pi/pi_sft. All of a prompt's responses are drawn at once; two accepted ones make its pair.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recipes.preference._pairs import with_reference
from rlhf_dist.algorithms import dpo
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reference, Reward

NEEDS = ("ROLL", "RM", "FILT", "PAIR", "PREF", "REF")
PAPERS = {
    "rejection_pairs": Paper(
        title="RSO with the sigmoid-norm loss",
        year=2023,
        arxiv="2309.06657",
        rows=(53,),
        needs=NEEDS,
        assumed="beta 0.5 of the sampling, gamma 0.05 of the loss, 64 responses; r_max is of all of them",
    ),
    "hinge": Paper(
        title="RSO with the hinge-norm loss",
        year=2023,
        arxiv="2309.06657",
        rows=(53,),
        needs=NEEDS,
        settings={"algorithm.kind": "hinge"},
        assumed="as rejection_pairs",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RSO:
    """Settings of RSO."""

    samples_per_prompt: int = 64
    """Responses to each prompt, of the SFT model."""
    temperature: float = 0.5
    """beta of the acceptance, reward units; large: all are accepted, 0+: the best alone."""
    kind: Literal["dpo", "hinge"] = "dpo"
    """The loss on a pair."""
    beta: float = 0.05
    """Scale of log-ratios in the loss."""


@host_op(reads=("rewards", "group_id"), writes=("label",), rows="drop", scope="batch")
def accepted_pairs(batch: Batch, *, temperature: float, rng: np.random.Generator) -> HostResult:
    """Two of each group's accepted responses, +1 the one with the higher reward. Groups with fewer than two that are
    accepted and apart in reward have no pair."""
    rewards, label, accepted = batch["rewards"].values, np.zeros(batch.num_rows, np.int8), 0
    for rows in batch.group():
        chance = np.exp((rewards[rows] - rewards[rows].max()) / temperature)
        taken = rng.permutation(rows[rng.random(len(rows)) < chance])
        accepted += len(taken)
        for row in taken[1:]:
            if rewards[row] != rewards[taken[0]]:
                better, worse = (row, taken[0]) if rewards[row] > rewards[taken[0]] else (taken[0], row)
                label[better], label[worse] = 1, -1
                break
    keep = np.flatnonzero(label)
    share = Mean(float(accepted), float(batch.num_rows))
    metrics = {"accepted": share, "pairs": Mean(len(keep) / 2, 0)}
    return HostResult(columns=Batch({"label": Column(label[keep])}, len(keep)), keep=keep, metrics=metrics)


@recipe
def rejection_pairs(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: RSO) -> None:
    """Preference optimisation on rejection samples of the reference."""
    batch = reward.compute_reward(reference.generate_sequences(prompts, n=cfg.samples_per_prompt))
    pairs = reference.compute_ref_log_prob(accepted_pairs(batch, temperature=cfg.temperature))
    actor.update_actor(pairs, loss=dpo(cfg.beta) if cfg.kind == "dpo" else with_reference("hinge", cfg.beta))
