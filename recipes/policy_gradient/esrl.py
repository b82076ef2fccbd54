"""ESRL: efficient sampling (Wang et al. 2023, arXiv 2308.02223): as many responses as a prompt needs.

    1. `probes` responses to each prompt; c, the mean of their rewards in [0, 1], is what the policy can do there
    2. round(most (1 - c)) more of them, at a high temperature where c is below `able`, else at a low one
    3. REINFORCE with the mean of the other rewards of the prompt as the baseline, on all

Responses are drawn without a graph for gradients and scored in a second pass, as everywhere here: the paper's two
stages.
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._advantages import response_advantage
from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reward

PAPERS = {
    "esrl": Paper(
        title="ESRL",
        year=2023,
        arxiv="2308.02223",
        rows=(37,),
        status="outline",
        needs=("ROLL", "ADV", "FILT", "SAMP"),
        assumed="the estimate is the mean reward of two probes, both counts and temperatures; rewards are in [0, 1]",
    )
}
MOST = 16
"""Further responses to a prompt, at most."""


@dataclass(frozen=True, kw_only=True)
class ESRL:
    """Settings of ESRL."""

    probes: int = 2
    """Responses from which it is said how many more are drawn."""
    most: int = 6
    """Further responses to a prompt that the policy cannot answer, at most 16."""
    able: float = 0.5
    """Mean reward from which on the low temperature is enough."""
    hot: float = 1.2
    """The high temperature."""
    cold: float = 0.8
    """The low one."""


@host_op(
    reads=(("group_id",), ("rewards", "group_id")),
    writes=("hot",),
    rows="derive",
    scope="groups",
    copies=MOST,
    missing=True,
)
def as_needed(prompts: Batch, probes: Batch, *, most: int, able: float) -> HostResult:
    """Copies of each prompt, round(most (1 - c)), and whether the policy is unable there. Missing rewards do not count;
    a prompt whose probes have none gets no more. Raises ValueError for most out of [0, 16]."""
    if not 0 <= most <= MOST:
        raise ValueError(f"as_needed draws at most {MOST} further responses to a prompt, got most={most}")
    scores: dict[int, list[float]] = {}
    for group, reward in zip(probes["group_id"].values.tolist(), probes["rewards"].values.tolist(), strict=True):
        scores.setdefault(group, []).extend([reward] if np.isfinite(reward) else [])
    parents, hot, known = list[int](), list[bool](), list[float]()
    for row, group in enumerate(prompts["group_id"].values.tolist()):
        if scores.get(group):
            able_here = float(np.clip(np.mean(scores[group]), 0, 1))
            copies = round(most * (1 - able_here))
            parents += [row] * copies
            hot += [able_here < able] * copies
            known.append(able_here)
    metrics = {"further": Mean(float(len(parents)), float(prompts.num_rows))} if prompts.num_rows else {}
    metrics |= {"capability": Mean(sum(known), float(len(known)))} if known else {}
    columns = Batch({"hot": Column(np.array(hot, np.uint8))}, len(parents))
    return HostResult(columns=columns, parent=np.array(parents, np.int64), metrics=metrics)


@recipe
def esrl(prompts: Prompts, actor: Actor, reward: Reward, cfg: ESRL) -> None:
    """REINFORCE on more responses where they are worth more."""
    probes = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.probes))
    unable, able = as_needed(prompts, probes, most=cfg.most, able=cfg.able).where("hot")
    more = actor.generate_sequences(unable, temperature=cfg.hot)
    more = more.concat(actor.generate_sequences(able, temperature=cfg.cold))
    batch = response_advantage(probes.concat(reward.compute_reward(more)), baseline="loo")
    actor.update_actor(batch, loss=policy_gradient(average="rows", row_divisor=1))
