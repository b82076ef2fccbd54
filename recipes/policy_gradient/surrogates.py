"""GRPO's graph with another surrogate than PPO's clip: CISPO (MiniMax 2025, arXiv 2506.13585) and its relatives.

    L_t = -sg(clip(rho_t, 1 - low, 1 + high)) A log pi(y_t)        CISPO: the weight is cut, no token loses its gradient

All take group-relative advantages and several optimizer steps on one batch; `_surrogates.py` has the formulas.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from recipes.policy_gradient._advantages import response_advantage
from recipes.policy_gradient._surrogates import (
    PerRow,
    covariance_of,
    covariance_surrogate,
    row_surrogate,
    token_surrogate,
)
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import is_missing
from rlhf_dist.roles import Actor, Prompts, Reward

NEEDS = ("ROLL", "VER", "ADV")
REC = {"rows": (33,), "year": 2025, "arxiv": "2509.24203", "needs": ("ROLL", "VER", "ADV", "MIX", "FILT")}
COVARIANCE = {
    **{"year": 2025, "arxiv": "2505.22617", "needs": NEEDS},
    "assumed": "tokens are picked once a batch, by the log-probs that it was drawn with, not at each of its steps",
}
PAPERS = {
    "surrogates": Paper(
        title="CISPO",
        year=2025,
        arxiv="2506.13585",
        needs=NEEDS,
        assumed="no lower bound, as in the paper, and 1 + 4 above: the paper tunes the upper one",
    ),
    "gmpo": Paper(
        title="GMPO: geometric mean of ratios",
        year=2025,
        arxiv="2507.20673",
        needs=NEEDS,
        settings={"algorithm.kind": "gmpo", "algorithm.low": 0.4, "algorithm.high": 0.4},
    ),
    "sapo": Paper(
        title="SAPO: soft adaptive clipping",
        year=2025,
        arxiv="2511.20347",
        needs=NEEDS,
        settings={"algorithm.kind": "sapo", "algorithm.average": "rows"},
    ),
    "nft": Paper(
        title="NFT: negative-aware fine-tuning",
        year=2025,
        arxiv="2505.18116",
        rows=(31,),
        needs=(*NEEDS, "FILT"),
        settings={"algorithm.kind": "nft"},
        assumed="the floor e 1e-3; the weight of a prompt that makes one step GRPO's",
    ),
    "mdpo": Paper(
        title="MDPO: mirror descent",
        year=2020,
        arxiv="2005.09814",
        rows=(34,),
        needs=("ROLL", "ADV", "SNAP"),
        settings={"algorithm.kind": "mdpo", "algorithm.epochs": 4},
        assumed="one coefficient of the KL for all steps; group-relative advantages",
    ),
    "topr": Paper(
        title="TOPR: tapered off-policy REINFORCE",
        year=2025,
        arxiv="2503.14286",
        needs=NEEDS,
        settings={"algorithm.kind": "topr", "algorithm.scale": False},
        assumed="rewards are taken over the mean of their group, where the paper's are 1 and -1",
    ),
    "clip_cov": Paper(**COVARIANCE, title="Clip-Cov", settings={"algorithm.kind": "clip_cov"}),
    "kl_cov": Paper(**COVARIANCE, title="KL-Cov", settings={"algorithm.kind": "kl_cov"}),
    "rec_one_side": Paper(
        title="REC-OneSide without importance weights",
        **REC,
        settings={
            **{"algorithm.kind": "one_side", "algorithm.importance": False, "algorithm.scale": False},
            **{"algorithm.low": 0.2, "algorithm.high": 0.2},
        },
    ),
    "rec_two_side": Paper(
        title="REC-TwoSide with importance weights",
        **REC,
        settings={
            **{"algorithm.kind": "two_side", "algorithm.scale": False},
            **{"algorithm.low": 0.2, "algorithm.high": 0.2},
        },
    ),
    "rec_ring": Paper(
        title="REC-Ring without importance weights",
        **REC,
        status="outline",
        settings={
            **{"algorithm.kind": "ring", "algorithm.importance": False, "algorithm.scale": False},
            **{"algorithm.low": 0.2, "algorithm.high": 0.2},
        },
        assumed="the bounds 0.2, 0.2, 0.6 and 2.0 of the ring are from memory",
    ),
    "opmd": Paper(
        title="REP-OPMD", **REC, settings={"algorithm.kind": "opmd", "algorithm.scale": False}, assumed="tau 1"
    ),
    "asymre": Paper(
        title="AsymRE: a baseline shifted down",
        **REC | {"arxiv": "2506.20520"},
        settings={
            **{"algorithm.kind": "one_side", "algorithm.importance": False, "algorithm.scale": False},
            **{"algorithm.low": 1e3, "algorithm.high": 1e3, "algorithm.shift": -0.1},
        },
        assumed="the shift -0.1; no cut at all",
    ),
    "red_drop": Paper(
        title="RED-Drop: no more wrong responses than right ones",
        **REC,
        status="outline",
        settings={
            **{"algorithm.kind": "one_side", "algorithm.importance": False, "algorithm.scale": False},
            **{"algorithm.low": 0.2, "algorithm.high": 0.2, "algorithm.balance": "drop"},
        },
        assumed="responses below the mean of their group are dropped at random until they are as many as those above",
    ),
    "red_weight": Paper(
        title="RED-Weight: responses weighed by exp(A)",
        **REC,
        status="outline",
        settings={
            **{"algorithm.kind": "one_side", "algorithm.importance": False, "algorithm.scale": False},
            **{"algorithm.low": 0.2, "algorithm.high": 0.2, "algorithm.balance": "weight"},
        },
        assumed="the weight multiplies the advantage and has temperature 1",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Surrogates:
    """Settings of a policy gradient with another surrogate."""

    kind: Literal[
        *("cispo", "sapo", "mdpo", "nft", "one_side", "two_side", "ring"),
        *("gmpo", "opmd", "topr", "clip_cov", "kl_cov"),
    ] = "cispo"
    """The surrogate."""
    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    scale: bool = True
    """Divide by the standard deviation of the group's rewards."""
    shift: float = 0.0
    """Added to the group's mean as the baseline."""
    balance: Literal["none", "drop", "weight"] = "none"
    """What is done about many responses below their group's mean: some are dropped, or all weighed by exp(A)."""
    low: float = 1.0
    """The ratio is cut, or masked, at 1 - low (of gmpo its logarithm at -low); 1 for no bound."""
    high: float = 4.0
    """And at 1 + high (of gmpo its logarithm at high)."""
    importance: bool = True
    """Under a mask: rho A, or A log pi."""
    coef: float = 1.0
    """Of mdpo's KL, of opmd's square (tau), and of kl_cov's penalty."""
    clip: float = 0.2
    """Of clip_cov: the ratio's."""
    share: float = 2e-4
    """Of clip_cov and kl_cov: share of tokens that are picked."""
    average: Literal["tokens", "rows"] = "tokens"
    """What a per-token surrogate is averaged over."""
    mini_batches: int = 2
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1
    """Passes over the batch."""


@host_op(reads=("rewards", "group_id"), writes=("pass_rate", "right"), scope="groups", missing=True)
def pass_rates(batch: Batch) -> Batch:
    """Whether a response is right, its reward above 1/2, and the share of its group that is, of those whose reward is
    known."""
    known = ~is_missing(batch["rewards"].values)
    right = (known & (batch["rewards"].values > 0.5)).astype(np.float32)
    rate = np.zeros(batch.num_rows, np.float32)
    for rows in batch.group():
        rate[rows] = right[rows].sum() / max(known[rows].sum(), 1)
    return Batch({"pass_rate": Column(rate), "right": Column(right)})


@host_op(reads=("advantages", "group_id", "response_mask"), rows="drop", scope="batch")
def as_many_below(batch: Batch, *, rng: np.random.Generator) -> HostResult:
    """Of each group as many responses below its mean as above, drawn evenly, and all that are at it."""
    mask, keep = batch["response_mask"], []
    first = mask.offsets[:-1].clip(max=max(len(mask.values) - 1, 0))
    advantage = batch["advantages"].values[first]
    for rows in batch.group():
        below = rng.permutation(rows[advantage[rows] < 0])
        keep += [rows[advantage[rows] >= 0], below[: int((advantage[rows] > 0).sum())]]
    kept = np.sort(np.concatenate(keep)) if keep else np.empty(0, np.int64)
    share = Mean(float(len(kept)), float(batch.num_rows))
    return HostResult(columns=Batch({}, len(kept)), keep=kept, metrics={"kept": share})


@host_op(reads=("advantages",), writes=("advantages",))
def weighed_by_themselves(batch: Batch) -> Batch:
    """exp(A) A."""
    advantages = batch["advantages"].values
    return Batch({"advantages": Column(np.exp(advantages.clip(max=20)) * advantages, batch["advantages"].offsets)})


@recipe
def surrogates(prompts: Prompts, actor: Actor, reward: Reward, cfg: Surrogates) -> None:
    """CISPO, or GRPO with another surrogate."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = actor.compute_log_prob(batch)
    baseline = "group" if cfg.scale else "shifted"
    batch = response_advantage(batch, baseline=baseline, shift=cfg.shift)
    if cfg.balance == "drop":
        batch = as_many_below(batch)
    elif cfg.balance == "weight":
        batch = weighed_by_themselves(batch)
    if cfg.kind in ("clip_cov", "kl_cov"):
        batch = covariance_of(batch, kind=cfg.kind, share=cfg.share, low=1.0, high=5.0)
        loss = covariance_surrogate(cfg.kind, clip=cfg.clip, kl_coef=cfg.coef)
    elif cfg.kind in get_args(PerRow):
        loss = row_surrogate(cfg.kind, low=cfg.low, high=cfg.high, tau=cfg.coef)
    else:
        batch = pass_rates(batch) if cfg.kind == "nft" else batch
        bounds = {"low": cfg.low, "high": cfg.high, "importance": cfg.importance}
        loss = token_surrogate(cfg.kind, **bounds, coef=cfg.coef, average=cfg.average)
    actor.update_actor(batch, loss=loss, mini_batches=cfg.mini_batches, epochs=cfg.epochs)
