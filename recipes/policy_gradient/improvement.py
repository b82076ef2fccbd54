"""PIT: implicit self-improvement (Wang et al. 2023, arXiv 2310.00898): the reward is by how much a response is better.

    a reward model of gaps, g(y | z): how much better y is than z, both answers to x
        g(w | l) > g(w | w), g(l | l) > g(l | w)            -log s of each of the four differences, of given pairs
    PPO on r(y) = g(y | z),  y ~ pi(. | x, z)                z first a rejected response, later a chosen one

Nobody writes what better means into a prompt: the gaps have it. Both learn here, in one step; the first `warmup` steps
are the reward model's alone, and from `harder_after` on the policy improves chosen responses.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.preference.srpo import revisions
from rlhf_dist.algorithms import loss, ppo_clip, value_clip
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Preferences, Reference, RewardModel, State, state_op
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "improvement": Paper(
        title="PIT: implicit self-improvement",
        year=2023,
        arxiv="2310.00898",
        rows=(71,),
        status="outline",
        needs=("RMT", "ROLL", "CRIT", "ALT", "REF"),
        assumed="four comparisons of equal weight; two stages of the curriculum, without the policy's own samples; "
        "steps; the wording; SFT before it is the recipe sft",
    )
}


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """Settings of PIT."""

    question: str = "{prompt}\n\nA response: {shown_ids}\n\nA better response:"
    """The prompt of {prompt} and {shown_ids}, the response that is to be improved."""
    warmup: int = 100
    """Steps in which the reward model alone learns."""
    harder_after: int = 1000
    """Steps after which chosen responses are improved, not rejected ones."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    value_clip: float = 0.2
    """A new value may move this far from the old one."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref in the reward."""


class Curriculum(State):
    """Which responses are to be improved."""

    def initial(self, cfg: Improvement) -> dict[str, Any]:
        return {"step": 0}

    @state_op(reads=("label",), rows="drop")
    def to_improve(
        self, values: dict[str, Any], batch: Batch, *, harder_after: int
    ) -> tuple[dict[str, Any], HostResult]:
        """The rejected response of each pair, and after so many steps the chosen one."""
        harder = values["step"] >= harder_after
        keep = np.flatnonzero(batch["label"].values == (1 if harder else -1))
        made = HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={"harder": Mean(float(harder))})
        return {"step": values["step"] + 1}, made


@loss(reads=("label", "shown_label"), outputs=("scores",), average="groups")
def gap_loss(model, rows):
    """The module's four comparisons, of the four rows of a pair that `revisions` makes."""
    label, shown = rows["label"], rows["shown_label"]

    def gap(said, under):
        return rows.sum_groups(model.scores * ((label == said) & (shown == under)))

    best, same_w, same_l, worst = gap(1, -1), gap(1, 1), gap(-1, -1), gap(-1, 1)
    value = -sum(log_sigmoid(one) for one in (best - same_w, best - same_l, same_w - worst, same_l - worst))
    return value, {"accuracy": (best > worst).to(value.dtype), "margin": (best - worst).detach()}


@recipe
def improvement(
    pairs: Preferences,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    reward: RewardModel,
    curriculum: Curriculum,
    cfg: Improvement,
) -> None:
    """A reward model of gaps, and PPO on them."""
    shown, asked = pairs.with_columns_of(pairs, shown_ids="response_ids"), Template(cfg.question)
    reward.update_reward_model(actor.encode(revisions(shown), template=asked), loss=gap_loss())
    given = curriculum.to_improve(shown, harder_after=cfg.harder_after)
    batch = actor.generate_sequences(given, template=asked, n=cfg.samples_per_prompt)
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(reward.compute_reward(batch)))
    batch = whiten(gae(critic.compute_values(batch), gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef))
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), after=cfg.warmup)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), after=cfg.warmup)
