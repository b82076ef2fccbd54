"""CDR: the density ratio of two models as the reward (Xu et al. 2024, arXiv 2411.02481), pairs of it, and SimPO.

    r(x, y) = log pi_strong(y|x) - log pi_weak(y|x)          best and worst of n samples make the pair

Nothing is labelled: what an aligned model likes more than the model before it stands for what people like.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import simpo
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, LanguageModel, Prompts
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "density_ratio": Paper(
        title="CDR: density ratio of a strong and a weak model",
        year=2024,
        arxiv="2411.02481",
        rows=(89,),
        needs=("XLM", "ALT", "ROLL", "PAIR", "PREF"),
        assumed="SimPO's beta and gamma; no prompt with criteria",
    )
}


@dataclass(frozen=True, kw_only=True)
class DensityRatio:
    """Settings of learning from a density ratio."""

    samples_per_prompt: int = 8
    """Responses to each prompt."""
    beta: float = 2.0
    """SimPO's scale of mean log-probs."""
    gamma: float = 1.0
    """Its margin."""


@host_op(reads=("strong_log_probs", "weak_log_probs", "response_mask"), writes=("rewards",))
def log_density_ratio(batch: Batch) -> Batch:
    """log pi_strong(y) - log pi_weak(y), summed over a response's tokens."""
    mask = batch["response_mask"]
    gap = (batch["strong_log_probs"].values - batch["weak_log_probs"].values) * (mask.values > 0)
    return Batch({"rewards": Column(sum_rows(gap, mask.offsets).astype(np.float32))})


@recipe
def density_ratio(
    prompts: Prompts, actor: Actor, strong: LanguageModel, weak: LanguageModel, cfg: DensityRatio
) -> None:
    """SimPO on pairs that two frozen models make."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = strong.compute_log_prob(batch, out={"log_probs": "strong_log_probs", "entropy": "strong_entropy"})
    batch = weak.compute_log_prob(batch, out={"log_probs": "weak_log_probs", "entropy": "weak_entropy"})
    actor.update_actor(keep_best_and_worst(log_density_ratio(batch)), loss=simpo(cfg.beta, cfg.gamma))
