"""OREAL: outcome rewards for reasoning (Lyu et al. 2025, arXiv 2502.06781): copy what is right, avoid what is wrong.

    keep one right and one wrong response of each prompt that has both
    policy      -w+ log pi(y+)  -  eta A w- log pi(y-)  +  beta KL(pi, pi_ref)      w+ = max(2 sigma(w) - 1, 0)
                A = r - mean of the other rewards of the prompt (RLOO), below 0      w- = max(1 - 2 sigma(w), 0)
    token RM    cross-entropy of sigma(mean_t w_t) with whether y is right

w_t, what the token-level reward model says at each token, is learned at the same time. Averages over tokens, the k3
estimator and one optimizer step a batch are assumed; the paper's constants are the defaults.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.kl import k3
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms import rloo_advantage

PAPERS = {
    "oreal": Paper(
        title="OREAL",
        year=2025,
        arxiv="2502.06781",
        rows=(32,),
        needs=("ROLL", "VER", "REF", "FILT", "TOK", "CO", "ADV"),
        assumed="averages over tokens, the k3 estimator, one optimizer step a batch",
    )
}


@dataclass(frozen=True, kw_only=True)
class OREAL:
    """Settings of OREAL."""

    samples_per_prompt: int = 16
    """Responses to each prompt."""
    solved: float = 1.0
    """A reward from which on a response is right."""
    negative_coef: float = 0.5
    """eta, the weight of wrong responses."""
    kl_coef: float = 0.01
    """beta, the weight of the KL."""
    warmup: int = 10
    """Steps in which only the token-level reward model learns."""


@host_op(reads=("rewards", "group_id"), writes=("label",), scope="batch", rows="drop", least_group=2)
def right_and_wrong(batch: Batch, *, solved: float, rng: np.random.Generator) -> HostResult:
    """One right (label +1) and one wrong row (-1) of each group that has both, drawn."""
    right, keep = batch["rewards"].values >= solved, list[int]()
    groups = batch.group()
    for rows in groups:
        if right[rows].any() and not right[rows].all():
            keep += [int(rng.choice(rows[right[rows]])), int(rng.choice(rows[~right[rows]]))]
    kept = np.sort(np.array(keep, dtype=np.int64))
    label = np.where(right[kept], 1, -1).astype(np.int8)
    return HostResult(
        columns=Batch({"label": Column(label)}, len(kept)),
        keep=kept,
        metrics={
            "mixed_groups": Mean(len(kept) / 2, float(len(groups))),
            "right": Mean(float(right.sum()), len(right)),
        },
    )


@loss(reads=("label", "values", "advantages", "ref_log_probs"), average="tokens")
def copy_and_avoid(model, rows, eta: float = 0.5, beta: float = 0.01):
    """The policy's loss, with the weight of each token from `values`."""
    right = rows["label"][rows.row_of_token] > 0
    sure = 2 * rows["values"].sigmoid() - 1
    copied = -sure.clamp(min=0) * model.log_probs
    avoided = -eta * rows["advantages"] * (-sure).clamp(min=0) * model.log_probs
    kl = k3(model.log_probs, rows["ref_log_probs"])
    value = copied.where(right, avoided) + beta * kl
    return value, {"policy_loss": value.detach(), "ref_kl_k3": kl.detach()}


@loss(reads=("label",), outputs=("values",), average="rows")
def outcome_cross_entropy(model, rows):
    """-log sigma(+-mean of w_t), + for a right response."""
    logit = rows.mean_tokens(model.values)
    value = (-rows["label"] * logit).logaddexp(0.0 * logit)  # -log sigma(label * logit)
    return value, {"cross_entropy": value.detach(), "accuracy": ((logit > 0) == (rows["label"] > 0)).to(logit.dtype)}


@recipe
def oreal(
    prompts: Prompts, actor: Actor, reference: Reference, token_reward: Critic, reward: Reward, cfg: OREAL
) -> None:
    """A policy and a token-level reward model that learn from the same responses."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = right_and_wrong(rloo_advantage(batch), solved=cfg.solved)
    batch = reference.compute_ref_log_prob(token_reward.compute_values(batch))
    token_reward.update(batch, loss=outcome_cross_entropy())
    actor.update_actor(batch, loss=copy_and_avoid(cfg.negative_coef, cfg.kl_coef), after=cfg.warmup)
