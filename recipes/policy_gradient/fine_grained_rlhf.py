"""Fine-grained RLHF (Wu et al. 2023, arXiv 2306.01693): several reward models, each after every segment of its own.

    r_t = sum_k w_k sum_j 1[t ends segment j of model k] R_k(segment) - beta log pi(y_t) / pi_ref(y_t)

The models are value models that are not trained; R_k is what one says of the text before a segment's last token.
Segments are of so many tokens each here (the paper's are sub-sentences and sentences, which no column marks).
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.algorithms.ragged import row_of_token
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Critic, Prompts, Reference

PAPERS = {
    "fine_grained_rlhf": Paper(
        title="Fine-Grained RLHF",
        year=2023,
        arxiv="2306.01693",
        rows=(137,),
        needs=("TOK", "MRM", "ROLL", "CRIT"),
        assumed="segments of so many tokens in place of sub-sentences and sentences",
    )
}


@dataclass(frozen=True, kw_only=True)
class FineGrained(WithCritic):
    """Settings of fine-grained RLHF."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    relevance_every: int = 8
    """Tokens of a segment that is judged for relevance."""
    relevance_weight: float = 0.3
    """w of the relevance model."""
    facts_every: int = 16
    """Tokens of a segment that is judged for its facts."""
    facts_weight: float = 0.5
    """w of the model of facts."""
    kl_coef: float = 0.3
    """beta, the penalty on log pi - log pi_ref."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""


@host_op(reads=("relevance", "facts", "response_mask"), writes=("token_rewards", "rewards"))
def rewards_of_segments(
    batch: Batch, *, relevance_every: int, relevance_weight: float, facts_every: int, facts_weight: float
) -> HostResult:
    """Each model's weighted score at the last token of its segments; nothing more at the end of the response."""
    offsets = batch["response_mask"].offsets
    row = row_of_token(offsets)
    place = np.arange(len(row)) - offsets[row] + 1
    last = place == np.diff(offsets)[row]
    total = np.zeros(len(row), np.float32)
    metrics = {}
    for name, every, weight in (
        ("relevance", relevance_every, relevance_weight),
        ("facts", facts_every, facts_weight),
    ):
        ends = (place % every == 0) | last
        total[ends] += np.float32(weight) * batch[name].values[ends]
        metrics[name] = Mean(float(batch[name].values[ends].sum()), float(ends.sum()))
    columns = {"token_rewards": Column(total, offsets), "rewards": Column(np.zeros(batch.num_rows, np.float32))}
    return HostResult(columns=Batch(columns), metrics=metrics)


@recipe
def fine_grained_rlhf(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    relevance: Critic,
    facts: Critic,
    cfg: FineGrained,
) -> None:
    """PPO on dense rewards of two models."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = facts.compute_values(relevance.compute_values(batch, out="relevance"), out="facts")
    batch = rewards_of_segments(
        batch,
        relevance_every=cfg.relevance_every,
        relevance_weight=cfg.relevance_weight,
        facts_every=cfg.facts_every,
        facts_weight=cfg.facts_weight,
    )
    learn_with_critic(batch, actor, critic, reference, cfg, dense=True)
