"""Intuitive fine-tuning (Hua et al. 2024, arXiv 2405.11870): SFT whose context is partly the policy's own.

    y'_t = the policy's likeliest token in place of y_t, with probability mix, else y_t
    L = -sum_t w_t log pi(y_t | x, y'_<t),   w_t = (1 + g + ... + g^t) (1 - g)  of the tokens before it and itself

The policy learns to come back to the data from where it goes by itself, with nothing but the data of SFT. A token
answers for all that is said before it, the nearer the more: its weight is the discounted count of the tokens that lead
to it. mix = 0 and g = 0 are SFT.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Examples

PAPERS = {
    "ift": Paper(
        title="Intuitive fine-tuning (IFT)",
        year=2024,
        arxiv="2405.11870",
        rows=(63,),
        status="outline",
        needs=("SFT",),
        assumed="whole tokens are mixed, where the paper mixes embeddings; the mix 0.2, g 0.95 and the form of w",
    )
}


@dataclass(frozen=True, kw_only=True)
class IFT:
    """Settings of intuitive fine-tuning."""

    mix: float = 0.2
    """Share of the context's tokens that are the policy's own."""
    discount: float = 0.95
    """g, in [0, 1)."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@host_op(
    reads=("response_ids", "response_mask", "top_ids"),
    writes=("response_ids", "response_mask", "gold_ids"),
    scope="batch",
)
def mixed_context(batch: Batch, *, mix: float, rng: np.random.Generator) -> HostResult:
    """Responses with some of their counted tokens replaced by likeliest ones, and the given tokens as `gold_ids`
    [T, 1]."""
    given, mask = batch["response_ids"], batch["response_mask"]
    own = (rng.random(len(given.values)) < mix) & (mask.values > 0)
    said = np.where(own, batch["top_ids"].values[:, 0], given.values).astype(np.int32)
    columns = {
        "response_ids": Column(said, given.offsets),
        "response_mask": mask,
        "gold_ids": Column(given.values[:, None].astype(np.int32), given.offsets),
    }
    changed = Mean(float((said != given.values).sum()), float(len(said)))
    return HostResult(columns=Batch(columns, batch.num_rows), metrics={"changed": changed} if len(said) else {})


@host_op(reads=("response_mask",), writes=("token_weight",))
def discounted_count(batch: Batch, *, discount: float) -> Batch:
    """w of the module. Raises ValueError for a discount out of [0, 1)."""
    if not 0 <= discount < 1:
        raise ValueError(f"discounted_count needs a discount in [0, 1), got {discount}")
    mask = batch["response_mask"]
    place = np.concatenate([np.arange(length) for length in mask.lengths] or [np.empty(0)])
    return Batch({"token_weight": Column((1 - discount ** (place + 1)).astype(np.float32), mask.offsets)})


@loss(reads=("gold_ids", "token_weight"), outputs=("log_probs_at.gold_ids",), average="tokens")
def weighted_nll(model, rows):
    """-w_t log pi of the given tokens, in the context that the rows have."""
    log_probs = model.log_probs_at["gold_ids"][:, 0]
    return -rows["token_weight"] * log_probs, {"nll": -log_probs.detach()}


@recipe
def ift(examples: Examples, actor: Actor, cfg: IFT) -> None:
    """Likelihood of the data behind a context that is partly the policy's own."""
    batch = mixed_context(actor.compute_top_k(examples, k=1), mix=cfg.mix)
    batch = discounted_count(batch, discount=cfg.discount)
    actor.update_actor(batch, loss=weighted_nll(), mini_batches=cfg.mini_batches)
