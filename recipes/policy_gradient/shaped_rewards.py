"""Rewards measured against reference answers, then PPO: PAR (Fu et al. 2025, arXiv 2502.18770) and its relatives.

    par     r' = mean_m s(r(x, y) - r(x, y_m))              y_m: M answers of the reference policy
    lsc     r' = log s(r(x, y) - mean_m r(x, y_m))          a sum of these over properties is a logical and (2402.00742)
    crpg    r' = s(r(x, y) - r(x, y_0)), 0 for an answer that breaks a rule                CGPO's CRPG, 2409.20370
    length  r' = r - price * tokens                         A Long Way to Go, 2310.03716
    only_length     r' = 1 - |1 - tokens / longest|         the reward that is nothing but length, same paper
    omit_long       r' = r, and answers that the limit cut have no loss
    scaled          r' = r / standard deviation of all rewards so far

The bounded ones take away what a policy gains by going where a reward model was never right.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import follows, recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import mask_cut_responses

LONG = {"rows": (144,), "year": 2023, "arxiv": "2310.03716", "status": "study"}
LONG_NEEDS = ("SHAPE", "FILT", "ROLL", "CRIT", "RMT", "EVAL")
PAPERS = {
    "shaped_rewards": Paper(
        title="PAR: preference as reward",
        year=2025,
        arxiv="2502.18770",
        rows=(134,),
        needs=("RM", "SHAPE", "ROLL", "CRIT"),
        assumed="M 4",
    ),
    "lsc": Paper(
        title="Transforming and combining rewards (LSC)",
        year=2024,
        arxiv="2402.00742",
        rows=(135,),
        needs=("RM", "MRM", "SHAPE", "ROLL"),
        settings={"algorithm.shape": "lsc", "algorithm.properties": 2},
        assumed="the reference reward is the mean of the reference policy's answers; two properties",
    ),
    "crpg": Paper(
        title="CGPO's calibrated-regularised policy gradient",
        year=2024,
        arxiv="2409.20370",
        rows=(145,),
        status="outline",
        needs=("ROLL", "RM", "MRM", "JUDGE", "VER", "FILT", "SHAPE", "BRANCH", "ADV"),
        settings={"algorithm.shape": "crpg", "algorithm.references": 1, "algorithm.properties": 2},
        assumed="a rule says what is feasible, no judge; one task; PPO; no cap on the KL",
    ),
    "length_price": Paper(
        title="A Long Way to Go: a price on length",
        **LONG,
        needs=LONG_NEEDS,
        settings={"algorithm.shape": "length"},
        assumed="the price 0.01 of a token",
    ),
    "only_length": Paper(
        title="A Long Way to Go: nothing but length",
        **LONG,
        needs=LONG_NEEDS,
        settings={"algorithm.shape": "only_length"},
    ),
    "omit_long": Paper(
        title="A Long Way to Go: long answers omitted",
        **LONG,
        needs=LONG_NEEDS,
        settings={"algorithm.shape": "omit_long"},
        assumed="what is long is what the limit cut",
    ),
    "reward_scaling": Paper(
        title="A Long Way to Go: rewards scaled",
        **LONG,
        needs=LONG_NEEDS,
        settings={"algorithm.shape": "scaled"},
    ),
    "high_kl": Paper(
        title="A Long Way to Go: a high price of the KL",
        **LONG,
        needs=LONG_NEEDS,
        settings={"algorithm.shape": "none", "algorithm.kl_coef": 0.12},
        assumed="0.12 where the usual is 0.04",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Shaped(WithCritic):
    """Settings of PPO under a shaped reward."""

    shape: Literal["par", "lsc", "crpg", "length", "only_length", "omit_long", "scaled", "none"] = "par"
    """What becomes of the reward."""
    references: int = 4
    """M: answers of the reference policy to each prompt."""
    properties: Literal[1, 2] = 1
    """Rewards: `reward`, or `second` too, whose shaped values are added (of crpg: the rule; above 1/2 is feasible)."""
    token_price: float = 0.01
    """Of length."""
    longest: int = follows("actor.rollout.max_response_tokens")
    """Of only_length: the length at which the reward is 1."""


class Spread(State):
    """Mean square of all rewards so far, and their mean."""

    def initial(self, cfg: Shaped) -> dict[str, float]:
        return {"count": 0.0, "mean": 0.0, "square": 0.0}

    @state_op(reads=("rewards",), writes=("rewards",))
    def scale(self, values: dict[str, float], batch: Batch) -> tuple[dict[str, float], HostResult]:
        """Divide by the standard deviation, this batch's rewards included; by 1 while there is none."""
        rewards = batch["rewards"].values.astype(np.float64)
        count = values["count"] + len(rewards)
        mean = (values["count"] * values["mean"] + rewards.sum()) / max(count, 1)
        square = (values["count"] * values["square"] + (rewards**2).sum()) / max(count, 1)
        deviation = max(square - mean**2, 0.0) ** 0.5 or 1.0
        column = Column((rewards / deviation).astype(np.float32))
        metrics = {"reward_deviation": Mean(deviation)}
        return {"count": count, "mean": mean, "square": square}, HostResult(
            columns=Batch({"rewards": column}), metrics=metrics
        )


@host_op(
    reads=lambda settings: (
        (*("rewards", "group_id"), *(("second",) if settings["properties"] == 2 else ())),
        (*("rewards", "group_id"), *(("second",) if settings["properties"] == 2 else ())),
    ),
    writes=("rewards",),
    scope="groups",
)
def against_references(
    batch: Batch, theirs: Batch, *, shape: Literal["par", "lsc", "crpg"], properties: int
) -> HostResult:
    """The shaped reward of each response against those of the reference's answers to its prompt."""
    total = np.zeros(batch.num_rows)
    names = ("rewards", "second")[: 1 if shape == "crpg" else properties]
    for name in names:
        own, other = batch[name].values.astype(np.float64), theirs[name].values.astype(np.float64)
        for row, group in enumerate(batch["group_id"].values):
            total[row] += shaped(own[row], other[theirs["group_id"].values == group], shape)
    if shape == "crpg" and properties == 2:
        total = np.where(batch["second"].values > 0.5, total, 0.0)
    return HostResult(
        columns=Batch({"rewards": Column(total.astype(np.float32))}),
        metrics={"raw_reward": Mean(float(batch["rewards"].values.sum()), batch.num_rows)},
    )


def shaped(reward: float, references: np.ndarray[Any, Any], shape: str) -> float:
    """One reward against the references' rewards."""
    if shape == "lsc":
        return float(-np.logaddexp(0.0, references.mean() - reward))
    return float(np.mean(1 / (1 + np.exp(references - reward))))


@host_op(reads=("rewards", "response_mask"), writes=("rewards",))
def by_length(batch: Batch, *, shape: Literal["length", "only_length"], price: float, longest: int) -> Batch:
    """The reward less a price for each token, or a reward of the length alone."""
    tokens = batch["response_mask"].lengths.astype(np.float64)
    found = batch["rewards"].values - price * tokens if shape == "length" else 1 - np.abs(1 - tokens / longest)
    return Batch({"rewards": Column(found.astype(np.float32))})


@recipe
def shaped_rewards(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    reward: Reward,
    second: Reward,
    spread: Spread,
    cfg: Shaped,
) -> None:
    """PPO on a reward that is bounded, centred or charged."""

    def scored(batch: Batch) -> Batch:
        batch = reward.compute_reward(batch)
        return second.compute_reward(batch, out="second") if cfg.properties == 2 else batch

    batch = scored(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    if cfg.shape in ("par", "lsc", "crpg"):
        theirs = scored(reference.generate_sequences(prompts, n=cfg.references))
        batch = against_references(batch, theirs, shape=cfg.shape, properties=cfg.properties)
    elif cfg.shape in ("length", "only_length"):
        batch = by_length(batch, shape=cfg.shape, price=cfg.token_price, longest=cfg.longest)
    elif cfg.shape == "scaled":
        batch = spread.scale(batch)
    elif cfg.shape == "omit_long":
        batch = mask_cut_responses(batch)
    learn_with_critic(batch, actor, critic, reference, cfg)
