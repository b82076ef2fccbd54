"""RLFR: a flow over a policy's own states as a dense reward (Zhang et al. 2025, arXiv 2510.10201).

    flow      x_s = (1 - s) n + s h,  n ~ N(0, 1),  s ~ U(0, 1):   min |v(x_s, s) - (h - n)|^2
              h: last states at the tokens of experts' solutions, and of the policy's own right ones
    deviation d_t = mean over s of |v(x_s, s) - (h_t - n)|^2       how unlike these a token's state is
    A_t       group-relative advantage of the verifier's reward + b * (-(d_t - mean d) / std d), cut to +- its limit

A token whose state lies where good solutions go has a reward; the flow learns on, from what the policy gets right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Examples, Prompts, Reward, State, state_op
from rlhf_dist.small_networks import fit, layers, restored, tensor
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "rlfr": Paper(
        title="RLFR: flow rewards",
        year=2025,
        arxiv="2510.10201",
        rows=(143,),
        status="outline",
        needs=("HID", "TOK", "ROLL", "VER", "ADV", "CO", "MIX"),
        assumed="deviations are brought to mean 0 and deviation 1 over the batch; b 0.1, cut at 3; s 0.5 and 0.9; two "
        "hidden layers; the states of the last layer; the flow is not trained on experts alone first",
    )
}


@dataclass(frozen=True, kw_only=True)
class RLFR:
    """Settings of GRPO with flow rewards."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    flow_coef: float = 0.1
    """b."""
    limit: float = 3.0
    """Largest deviation from the mean that counts, in standard deviations."""
    moments: tuple[float, ...] = (0.5, 0.9)
    """s at which the deviation is measured."""
    width: int = 128
    """Units of the flow's hidden layers."""
    lr: float = 1e-3
    """Learning rate of the flow."""
    right: float = 0.5
    """A response with a reward above this is right, and the flow learns from it."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@host_op(reads=("rewards",), rows="drop")
def only_right(batch: Batch, *, right: float) -> HostResult:
    """The right responses."""
    keep = np.flatnonzero(batch["rewards"].values > right)
    return HostResult(columns=Batch({}, len(keep)), keep=keep)


class Flow(State):
    """The velocity field over states."""

    def initial(self, cfg: RLFR) -> dict[str, Any]:
        return {}

    @state_op(reads=("hidden", "response_mask"))
    def learn(
        self, values: dict[str, Any], batch: Batch, *, width: int, lr: float, rng: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Mean]]:
        """A step of flow matching on the states at counted tokens; none where there are none."""
        states = batch["hidden"].values[batch["response_mask"].values > 0]
        if not len(states):
            return values, {}
        noise, at = rng.standard_normal(states.shape), rng.uniform(size=(len(states), 1))
        build = lambda: velocity(states.shape[1], width)  # noqa: E731
        return fit(values, build, lambda network: deviation(network, states, noise, at).mean(), lr=lr)

    @state_op(reads=("hidden", "response_mask", "advantages"), writes=("advantages",))
    def reward(
        self,
        values: dict[str, Any],
        batch: Batch,
        *,
        width: int,
        moments: tuple[float, ...],
        coef: float,
        limit: float,
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], HostResult]:
        """Advantages and coef times how much less than others each token deviates."""
        hidden, mask = batch["hidden"].values, batch["response_mask"]
        network = restored(values, lambda: velocity(hidden.shape[1], width))
        found = np.zeros(len(hidden))
        for moment in moments:
            noise, at = rng.standard_normal(hidden.shape), np.full((len(hidden), 1), moment)
            found += deviation(network, hidden, noise, at).detach().numpy() / len(moments)
        counted = mask.values > 0
        bonus = np.where(counted, coef * standing(found, counted, limit), 0.0)
        column = Column((batch["advantages"].values + bonus).astype(np.float32), mask.offsets)
        metrics = {"deviation": Mean(float(found[counted].sum()), float(counted.sum()))} if counted.any() else {}
        return values, HostResult(columns=Batch({"advantages": column}, batch.num_rows), metrics=metrics)


def velocity(width: int, hidden: int) -> Any:
    """The field v: (x, s) -> a vector as wide as x."""
    return layers(width + 1, hidden, hidden, width)


def deviation(network: Any, states: Any, noise: Any, at: Any) -> Any:
    """[N] mean over the entries of |v(x_s, s) - (h - n)|^2."""
    import torch

    h, n, s = tensor(states), tensor(noise), tensor(at)
    wanted = h - n
    return ((network(torch.cat([(1 - s) * n + s * h, s], -1)) - wanted) ** 2).mean(-1)


def standing(deviations: Any, counted: Any, limit: float) -> np.ndarray[Any, Any]:
    """[N] -(d - mean) / std over what counts, cut to +- limit; 0 where all are equal."""
    if not counted.any() or deviations[counted].std() == 0:
        return np.zeros(len(deviations))
    z = (deviations - deviations[counted].mean()) / deviations[counted].std()
    return -np.clip(z, -limit, limit)


@recipe
def rlfr(prompts: Prompts, experts: Examples, actor: Actor, reward: Reward, flow: Flow, cfg: RLFR) -> None:
    """GRPO, and a reward for states like those of good solutions."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = actor.compute_hidden(batch)
    good = only_right(batch, right=cfg.right).concat(actor.compute_hidden(experts))
    flow.learn(good, width=cfg.width, lr=cfg.lr)
    of_flow = {"width": cfg.width, "moments": cfg.moments, "coef": cfg.flow_coef, "limit": cfg.limit}
    batch = flow.reward(grpo_advantage(batch), **of_flow)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
