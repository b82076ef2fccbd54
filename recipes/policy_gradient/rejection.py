"""Imitation of one's own best responses: RAFT (Dong et al. 2023, arXiv 2304.06767) and its relatives.

    y_1 ... y_K ~ pi,   L = -log pi(y*),   y* = argmax_k r(y_k)          RAFT; no gradient of a reward, no bad response

`keep=right` takes all responses with r >= `least` (rejection sampling, expert iteration, STaR); `dedupe` keeps equal
ones once. RAFT++ trains on them with PPO's clipped ratio, A = 1. `rank_by=likelihood` takes the response the policy
finds likeliest (sharpening). `kl_coef` adds beta KL(pi || pi_ref) over these responses (SuperHF). `from_base`: each
step's responses train the model that the run began with, not the one that drew them (expert iteration).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import distill, nll, ppo_clip
from rlhf_dist.algorithms.ragged import spread, sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, LanguageModel, Prompts, Reference, Reward
from rlhf_dist.transforms import best_of_group

PAPERS = {
    "rejection": Paper(title="RAFT", year=2023, arxiv="2304.06767", rows=(20,), needs=("ROLL", "RM", "FILT", "SFT")),
    "raft_kl": Paper(
        title="RAFT, ranked by reward less beta log pi/pi_ref",
        year=2023,
        arxiv="2304.06767",
        rows=(20,),
        needs=("ROLL", "RM", "FILT", "SFT", "REF"),
        settings={"algorithm.rank_by": "penalised"},
        assumed="beta 0.1",
    ),
    "raft_plus_plus": Paper(
        title="RAFT++",
        year=2025,
        arxiv="2504.11343",
        rows=(19,),
        needs=("ROLL", "VER", "FILT", "ADV"),
        settings={"algorithm.keep": "right", "algorithm.loss": "clip", "algorithm.mini_batches": 2},
    ),
    "expert_iteration": Paper(
        title="Expert iteration (Teaching LLMs to reason with RL)",
        year=2024,
        arxiv="2403.04642",
        rows=(11,),
        status="outline",
        needs=("ROLL", "VER", "RM", "CRIT", "FILT", "SFT"),
        settings={
            "algorithm.keep": "right",
            "algorithm.dedupe": True,
            "algorithm.from_base": True,
            "algorithm.epochs": 2,
        },
        assumed="K, and two epochs on a step's responses; PPO on the same verifier is ppo; no return-conditioned loop",
    ),
    "rest_em": Paper(
        title="ReST-EM",
        year=2023,
        arxiv="2312.06585",
        needs=("ROLL", "VER", "FILT", "SFT"),
        settings={"algorithm.keep": "right", "algorithm.from_base": True},
        assumed="no cap on the correct responses of a prompt",
    ),
    "rft": Paper(
        title="Rejection sampling fine-tuning (RFT)",
        year=2023,
        arxiv="2308.01825",
        needs=("ROLL", "VER", "FILT", "SFT"),
        settings={"algorithm.keep": "right", "algorithm.dedupe": True},
        assumed="responses are equal where their texts are, not their equations",
    ),
    "superhf": Paper(
        title="SuperHF",
        year=2023,
        arxiv="2310.16763",
        rows=(21,),
        status="outline",
        needs=("ROLL", "RM", "REF", "FILT", "SFT"),
        settings={"algorithm.kl_coef": 0.35},
        assumed="the direction KL(pi || pi_0) over the kept responses, and its weight",
    ),
    "sharpening": Paper(
        title="Sharpening: best of n by one's own likelihood",
        year=2024,
        arxiv="2412.01951",
        rows=(92,),
        needs=("ROLL", "FILT", "SFT", "PREF"),
        settings={"algorithm.rank_by": "likelihood"},
        assumed="SFT-Sharpening; the form with DPO is not here",
    ),
    "pika": Paper(
        title="PiKa: the best responses of another model",
        year=2025,
        arxiv="2510.06670",
        rows=(15,),
        status="outline",
        needs=("SFT", "FILT", "RM", "PREF"),
        settings={"algorithm.generator": "generator"},
        assumed="prompts of personas are given as data; SFT on the best, no pairs",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Settings of imitation of one's own best."""

    samples_per_prompt: int = 8
    """Responses to each prompt."""
    keep: Literal["best", "right"] = "best"
    """Of each prompt the best response, or all that are right."""
    least: float = 1.0
    """A reward from which on a response is right."""
    rank_by: Literal["reward", "penalised", "likelihood"] = "reward"
    """What is best: the reward, that less kl_price log pi/pi_ref, or log pi itself."""
    kl_price: float = 0.1
    """Of penalised."""
    dedupe: bool = False
    """Keep equal responses to a prompt once."""
    loss: Literal["nll", "clip"] = "nll"
    """Likelihood, or PPO's clipped ratio with an advantage of 1."""
    clip: float = 0.2
    """The ratio is cut at 1 - clip and 1 + clip."""
    kl_coef: float = 0.0
    """Weight of KL(pi || pi_ref) over the kept responses; 0 for none."""
    from_base: bool = False
    """Train the initial model on each step's responses."""
    generator: Literal["actor", "generator"] = "actor"
    """Who draws the responses: the model that learns, or a role of its own."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the kept responses."""
    epochs: int = 1
    """Passes over them."""


@host_op(reads=("old_log_probs", "response_mask"), writes=("rewards",))
def own_likelihood(batch: Batch) -> Batch:
    """log pi(y) as the reward."""
    mask = batch["response_mask"]
    said = sum_rows(batch["old_log_probs"].values * (mask.values > 0), mask.offsets)
    return Batch({"rewards": Column(said.astype(np.float32))})


@host_op(reads=("rewards", "old_log_probs", "ref_log_probs", "response_mask"), writes=("rewards",))
def penalised(batch: Batch, *, price: float) -> Batch:
    """r - price log pi/pi_ref of the response."""
    mask = batch["response_mask"]
    gap = (batch["old_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0)
    rewards = batch["rewards"].values - price * sum_rows(gap, mask.offsets)
    return Batch({"rewards": Column(rewards.astype(np.float32))})


@host_op(reads=("rewards",), rows="drop")
def right_ones(batch: Batch, *, least: float) -> HostResult:
    """Responses with a reward of `least` or more."""
    keep = np.flatnonzero(batch["rewards"].values >= least)
    kept = Mean(float(len(keep)), float(batch.num_rows))
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={"kept": kept})


@host_op(reads=("response", "group_id"), rows="drop", scope="groups")
def different_ones(batch: Batch) -> HostResult:
    """The first of equal responses to a prompt."""
    seen: dict[tuple[int, str], int] = {}
    said = zip(batch["group_id"].values.tolist(), batch["response"].rows(), strict=True)
    for row, key in enumerate(said):
        seen.setdefault(key, row)
    keep = np.array(sorted(seen.values()), np.int64)
    return HostResult(
        columns=Batch({}, len(keep)), keep=keep, metrics={"unique": Mean(float(len(keep)), batch.num_rows)}
    )


@host_op(reads=("response_mask",), writes=("advantages",))
def all_good(batch: Batch) -> Batch:
    """An advantage of 1 at every token that counts."""
    mask = batch["response_mask"]
    return Batch({"advantages": Column(spread(np.ones(batch.num_rows), mask.offsets, mask.values), mask.offsets)})


@recipe
def rejection(
    prompts: Prompts, actor: Actor, generator: LanguageModel, reference: Reference, reward: Reward, cfg: Rejection
) -> None:
    """RAFT, or another way to imitate one's best."""
    drawer = actor if cfg.generator == "actor" else generator
    batch = drawer.generate_sequences(prompts, n=cfg.samples_per_prompt)
    if cfg.rank_by != "reward" or cfg.loss == "clip":
        batch = actor.compute_log_prob(batch)
    if cfg.rank_by == "likelihood":
        batch = own_likelihood(batch)
    else:
        batch = reward.compute_reward(batch)
    if cfg.rank_by == "penalised":
        batch = penalised(reference.compute_ref_log_prob(batch), price=cfg.kl_price)
    batch = best_of_group(batch) if cfg.keep == "best" else right_ones(batch, least=cfg.least)
    if cfg.dedupe:
        batch = different_ones(batch)
    if cfg.from_base:
        actor.copy_from(reference)
    terms = [(all_good(batch), ppo_clip(cfg.clip))] if cfg.loss == "clip" else [(batch, nll())]
    if cfg.kl_coef:
        terms.append((reference.compute_hidden(batch), distill("reference"), cfg.kl_coef))
    actor.update_actor(terms, mini_batches=cfg.mini_batches, epochs=cfg.epochs)
