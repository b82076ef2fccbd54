"""PPO on a reward for every token that other models give: RTO (Zhong et al. 2024, arXiv 2404.18922) and step models.

    rto           r_t = b1 log pi_dpo/pi_ref(y_t) - b2 log pi/pi_ref(y_t) + b3 r 1[t = T]   pi_dpo: what DPO has trained
    clip          r_i = min(p_i - eta, 0)      p_i: what a process reward model says after step i (2410.15115)
    delta         r_i = p_i - p_{i+1}, the last step's p taken as 0, for r judges the whole:  the rewards from a step
                  on sum to its p.  And r at the end, in both
    seq2seq       r_t = b1 log p(y_t | (x, y), y_<t) + b3 r 1[t = T]    p: what seq2seq_reward has trained reads x
                  and y first, and finds likely what it would leave as it is (2409.00162)
    attention     r_t = b1 a_t r + b3 r 1[t = T],  a the reward model's attention at its last token, over the response
                  (ABC, 2402.00782; b1 = b, b3 = 1 - b)
    confident_kl  r_t = -b2 pi_ref(y_t) log pi/pi_ref(y_t) + r 1[t = T]      free to move where the reference doubts

A step is `step_tokens` tokens here, its end the step's last token: no column marks the steps of a text.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_from_log_probs
from recipes.policy_gradient._prompts import written_prompt
from rlhf_dist.algorithms.ragged import row_of_token
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.missing import is_missing
from rlhf_dist.roles import Actor, Critic, LanguageModel, Prompts, Reference, Reward, RewardModel

PAPERS = {
    "dense_rewards": Paper(
        title="RTO: DPO meets PPO",
        year=2024,
        arxiv="2404.18922",
        rows=(139,),
        needs=("PREF", "TOK", "XLM", "REF", "RM", "ROLL", "CRIT"),
        assumed="the weights 0.05, 0.05 and 1",
    ),
    "confident_kl": Paper(
        title="Ignore the KL penalty: less of it on critical tokens",
        year=2025,
        arxiv="2502.06533",
        rows=(36,),
        status="outline",
        needs=("ROLL", "REF", "TOK", "ADV"),
        settings={"algorithm.kind": "confident_kl"},
        assumed="the weight of a token's penalty is the reference's probability of the token; a critic",
    ),
    "seq2seq": Paper(
        title="Sequence-to-sequence reward modelling: RL on its likelihoods",
        year=2024,
        arxiv="2409.00162",
        rows=(110,),
        status="outline",
        needs=("RMT", "TOK", "ROLL", "CRIT"),
        settings={"algorithm.kind": "seq2seq", "algorithm.reward_coef": 0.0},
        assumed="the reward of a token is its log-likelihood, weight 0.1; no reward at the end",
    ),
    "attention": Paper(
        title="ABC: attention-based credit",
        year=2024,
        arxiv="2402.00782",
        rows=(138,),
        needs=("TOK", "HID", "RM", "ROLL", "CRIT"),
        settings={"algorithm.kind": "attention", "algorithm.dense_coef": 0.5, "algorithm.reward_coef": 0.5},
        assumed="b 0.5; the mean over the heads of the last layer, brought to 1 over the response",
    ),
    "clip": Paper(
        title="PRM rewards, clipped",
        year=2024,
        arxiv="2410.15115",
        rows=(136,),
        needs=("TOK", "SHAPE", "RM", "VER", "ROLL", "CRIT"),
        settings={"algorithm.kind": "clip"},
        assumed="eta 0.5; steps of 16 tokens; the weight 0.1 of the step rewards",
    ),
    "delta": Paper(
        title="PRM rewards as differences",
        year=2024,
        arxiv="2410.15115",
        rows=(136,),
        needs=("TOK", "SHAPE", "RM", "VER", "ROLL", "CRIT"),
        settings={"algorithm.kind": "delta"},
        assumed="steps of 16 tokens; the weight 0.1 of the step rewards",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Dense(WithCritic):
    """Settings of PPO on dense rewards."""

    kind: Literal["rto", "clip", "delta", "seq2seq", "attention", "confident_kl"] = "rto"
    """Where the dense reward is from: a model that DPO has trained, or a process reward model, one that writes
    better responses, or a reward model's attention; or the KL penalty alone, weighed by the reference's confidence."""
    dense_coef: float | None = None
    """Its weight; None: 0.05 of rto (b1), else 0.1."""
    reward_coef: float = 1.0
    """Weight of the reward at the end (b3)."""
    kl_coef: float = 0.05
    """Penalty on log pi - log pi_ref of each token (b2)."""
    eta: float = 0.5
    """Of clip: what a step must be worth to cost nothing."""
    step_tokens: int = 16
    """Of clip and delta: tokens of a step."""


@host_op(reads=("dpo_log_probs", "ref_log_probs", "rewards", "response_mask"), writes=("token_rewards", "rewards"))
def implicit_rewards(batch: Batch, *, coef: float, reward_coef: float) -> Batch:
    """coef log pi_dpo/pi_ref at every token that counts, and reward_coef times the reward."""
    mask = batch["response_mask"]
    gap = (batch["dpo_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0)
    rewards = Column((reward_coef * batch["rewards"].values).astype(np.float32))
    return Batch({"token_rewards": Column((coef * gap).astype(np.float32), mask.offsets), "rewards": rewards})


@host_op(reads=("rewritten_log_probs", "rewards", "response_mask"), writes=("token_rewards", "rewards"))
def kept_as_it_is(batch: Batch, *, coef: float, reward_coef: float) -> Batch:
    """coef times the rewriter's log-prob of every token that counts, and reward_coef times the reward."""
    mask = batch["response_mask"]
    said = batch["rewritten_log_probs"].values * (mask.values > 0)
    rewards = Column((reward_coef * batch["rewards"].values).astype(np.float32))
    return Batch({"token_rewards": Column((coef * said).astype(np.float32), mask.offsets), "rewards": rewards})


@host_op(reads=("attention", "rewards", "response_mask"), writes=("token_rewards", "rewards"), missing=True)
def attended(batch: Batch, *, coef: float, reward_coef: float) -> Batch:
    """coef times the reward, spread over the counted tokens as the attention is, and reward_coef times it at the end. A
    missing reward is missing at the end alone: no token of its row will count."""
    mask, rewards = batch["response_mask"], batch["rewards"].values
    share = batch["attention"].values * (mask.values > 0)
    row = row_of_token(mask.offsets)
    whole = np.bincount(row, share, batch.num_rows)
    spread = share / np.maximum(whole, 1e-30)[row] * np.where(is_missing(rewards), 0, rewards)[row]
    columns = {"token_rewards": Column((coef * spread).astype(np.float32), mask.offsets)}
    return Batch({**columns, "rewards": Column((reward_coef * rewards).astype(np.float32))}, batch.num_rows)


@host_op(reads=("old_log_probs", "ref_log_probs", "response_mask"), writes=("token_rewards",))
def confident_penalty(batch: Batch, *, coef: float) -> Batch:
    """-coef pi_ref(y_t) (log pi - log pi_ref) at every token that counts."""
    mask, known = batch["response_mask"], batch["ref_log_probs"].values
    penalty = -coef * np.exp(known) * (batch["old_log_probs"].values - known) * (mask.values > 0)
    return Batch({"token_rewards": Column(penalty.astype(np.float32), mask.offsets)})


@host_op(reads=("step_values", "rewards", "response_mask"), writes=("token_rewards", "rewards"))
def step_rewards(
    batch: Batch, *, kind: Literal["clip", "delta"], step_tokens: int, eta: float, coef: float, reward_coef: float
) -> Batch:
    """coef times the step's reward at its last token, and reward_coef times the reward of the response."""
    offsets = batch["response_mask"].offsets
    row = row_of_token(offsets)
    place = np.arange(len(row)) - offsets[row] + 1
    ends = np.flatnonzero((place % step_tokens == 0) | (place == np.diff(offsets)[row]))
    said = batch["step_values"].values[ends].astype(np.float64)
    if kind == "clip":
        found = np.minimum(said - eta, 0.0)
    else:
        last = np.append(row[ends][1:] != row[ends][:-1], True)[: len(said)]
        found = np.where(last, 0.0, said - np.where(np.roll(last, -1), 0.0, np.roll(said, -1)))
    token_rewards = np.zeros(len(row), np.float32)
    token_rewards[ends] = coef * found
    rewards = Column((reward_coef * batch["rewards"].values).astype(np.float32))
    return Batch({"token_rewards": Column(token_rewards, offsets), "rewards": rewards})


@recipe
def dense_rewards(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    dpo_model: LanguageModel,
    step_model: Critic,
    rewriter: LanguageModel,
    attentive: RewardModel,
    reward: Reward,
    cfg: Dense,
) -> None:
    """PPO on token rewards."""
    scorer = attentive if cfg.kind == "attention" else reward
    batch = scorer.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    coef = (0.05 if cfg.kind == "rto" else 0.1) if cfg.dense_coef is None else cfg.dense_coef
    if cfg.kind == "rto":
        batch = dpo_model.compute_log_prob(batch, out={"log_probs": "dpo_log_probs", "entropy": "dpo_entropy"})
        batch = implicit_rewards(batch, coef=coef, reward_coef=cfg.reward_coef)
    elif cfg.kind == "attention":
        batch = attended(attentive.compute_attention(batch), coef=coef, reward_coef=cfg.reward_coef)
    elif cfg.kind == "seq2seq":
        said = rewriter.compute_log_prob(written_prompt(batch, keep_prompt=True))
        batch = batch.join(said, on="row", rewritten_log_probs="log_probs")
        batch = kept_as_it_is(batch, coef=coef, reward_coef=cfg.reward_coef)
    elif cfg.kind == "confident_kl":
        batch = confident_penalty(batch, coef=cfg.kl_coef)
    else:
        batch = step_model.compute_values(batch, out="step_values")
        steps = {"kind": cfg.kind, "step_tokens": cfg.step_tokens, "eta": cfg.eta}
        batch = step_rewards(batch, **steps, coef=coef, reward_coef=cfg.reward_coef)
    kl_coef = 0.0 if cfg.kind == "confident_kl" else cfg.kl_coef
    learn_from_log_probs(batch, actor, critic, cfg, kl_coef=kl_coef, dense=True)
