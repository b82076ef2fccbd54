"""A-LoL: leftover lunch (Baheti et al. 2023, arXiv 2305.14718): given responses, weighed by their advantage.

    A = r - V(x)          rows with A < 0 are dropped          L = -A clip(pi/pi_ref, 1 - e, 1 + e) log pi(y)

The whole response is one action; the ratio carries no gradient. Plain likelihood on the rows that beat the value of
their prompt, more for those that beat it by more. The first `warmup` steps fit V alone. Rows have `reward`.
"""

from dataclasses import dataclass

import numpy as np

from recipes.preference.dro import Rated, prompt_value
from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Critic, Reference

PAPERS = {
    "alol": Paper(
        title="A-LoL",
        year=2023,
        arxiv="2305.14718",
        rows=(29,),
        status="outline",
        needs=("MIX", "REF", "CRIT", "FILT", "RM"),
        assumed="clip 0.9; V is fitted to the given rows' rewards instead of those of the reference's own responses",
    )
}


@dataclass(frozen=True, kw_only=True)
class ALoL:
    """Settings of A-LoL."""

    clip: float = 0.9
    """The ratio to the reference is cut at 1 - clip and 1 + clip."""
    warmup: int = 100
    """Steps in which only the value learns."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@host_op(reads=("reward",), writes=("value_target",))
def rewards_as_targets(batch: Batch) -> Batch:
    """What V is fitted to."""
    return Batch({"value_target": Column(batch["reward"].values)})


@host_op(reads=("reward", "values", "response_mask"), writes=("advantage",), rows="drop")
def leftover(batch: Batch) -> HostResult:
    """Rows whose reward is V(x) at least, with the difference."""
    mask = batch["response_mask"]
    value = batch["values"].values[mask.offsets[:-1].clip(max=max(len(mask.values) - 1, 0))]
    advantage = (batch["reward"].values - value).astype(np.float32)
    keep = np.flatnonzero(advantage >= 0)
    kept = Mean(float(len(keep)), float(batch.num_rows))
    return HostResult(columns=Batch({"advantage": Column(advantage[keep])}), keep=keep, metrics={"kept": kept})


@loss(reads=("ref_log_probs", "advantage"), average="rows")
def weighted_imitation(model, rows, clip: float = 0.9):
    """-A clip(pi/pi_ref) log pi of whole responses."""
    log_prob = rows.sum_tokens(model.log_probs)
    ratio = (log_prob - rows.sum_tokens(rows["ref_log_probs"])).detach()
    weight = ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(1 - clip, 1 + clip)
    return -rows["advantage"] * weight * log_prob, {"ratio": weight, "advantage": rows["advantage"]}


@recipe
def alol(examples: Rated, actor: Actor, reference: Reference, critic: Critic, cfg: ALoL) -> None:
    """Imitation of what beats the value."""
    batch = critic.compute_values(reference.compute_ref_log_prob(rewards_as_targets(examples)))
    good = leftover(batch)
    critic.update_critic(batch, loss=prompt_value(), mini_batches=cfg.mini_batches)
    actor.update_actor(good, loss=weighted_imitation(cfg.clip), mini_batches=cfg.mini_batches, after=cfg.warmup)
