"""Offline value learning on dialogues that a language model has imagined (Hong et al. 2023, arXiv 2311.05584).

    the imaginer plays both sides of a dialogue about the prompt; a reward says whether the goal was reached
    target   y_t = r_t + gamma V(s_{t+1})                      (mc: the discounted return)
    V        L = |tau - [y_t < V]| (y_t - V(s_t))^2            an expectile, tau > 1/2: what the better actions lead to
    pi       -min(exp((y_t - V(s_t)) / T), cap) log pi(a_t | s_t)

ILQL learns Q and V and tilts the sampler by Q - V; text goes where it is written, so r + gamma V of what follows is Q,
and the policy is tilted by its weights in imitation, as IQL does.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.roles import Actor, Critic, Opponent, Prompts, Reward
from rlhf_dist.transforms.columns import mean_of

PAPERS = {
    "imagined_dialogues": Paper(
        title="Goal-directed dialogue on imagined conversations",
        year=2023,
        arxiv="2311.05584",
        rows=(175,),
        status="outline",
        needs=("XLM", "ROLL", "TURN", "MIX", "CRIT"),
        assumed="V alone, and weighted imitation in place of ILQL's sampler; expectile 0.7, T 0.1, gamma 0.99",
    ),
    "mc_returns": Paper(
        title="LMRL-Gym: Monte-Carlo returns",
        year=2023,
        arxiv="2311.18232",
        rows=(176,),
        status="study",
        needs=("TURN", "ROLL", "CRIT", "MIX", "EVAL"),
        settings={"algorithm.target": "mc", "algorithm.expectile": 0.5},
        assumed="imagined dialogues in place of its data; T 0.1",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Imagined(Environment):
    """Both sides by one model; the agent's turns are what is learnt from."""

    rewards = False
    turns: int
    turn_tokens: int

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        human = chat.speaker("human")
        human.say(row.prompt)
        for turn in range(self.turns):
            reply = await chat.generate(max_tokens=self.turn_tokens)
            if turn < self.turns - 1:
                human.say(reply.text)
                chat.say((await human.generate(max_tokens=self.turn_tokens)).text)


@host_op(
    reads=("rewards", "values", "response_mask"),
    writes=("returns", "imitation"),
)
def targets(batch: Batch, *, gamma: float, target: Literal["td", "mc"], temperature: float, cap: float) -> HostResult:
    """returns: y_t at each counted token, the row's reward at its last. imitation: min(exp((y_t - V) / T), cap)."""
    offsets, mask = batch["response_mask"].offsets, batch["response_mask"].values > 0
    assert offsets is not None, "one number a token"
    returns = np.zeros(len(mask), np.float64)
    values = batch["values"].values.astype(np.float64)
    for row, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        at = begin + np.flatnonzero(mask[begin:end])
        follows = 0.0
        for place, token in enumerate(at[::-1]):
            reward = float(batch["rewards"].values[row]) if place == 0 else 0.0
            returns[token] = reward + gamma * follows
            follows = values[token] if target == "td" else returns[token]
    weight = np.minimum(np.exp(np.minimum((returns - values) / temperature, 50.0)), cap) * mask
    columns = {"returns": returns, "imitation": weight}
    return HostResult(
        columns=Batch({k: Column(v.astype(np.float32), offsets) for k, v in columns.items()}, batch.num_rows),
        metrics={"reward": mean_of(batch["rewards"].values), "imitation": mean_of(weight[mask])},
    )


@loss(reads=("returns",), outputs=("values",), average="tokens")
def expectile(model, rows, tau: float = 0.7):
    """|tau - [y < V]| (y - V)^2 at each token; half the squared error with tau = 1/2."""
    apart = rows["returns"] - model.values
    value = (tau - (apart.detach() < 0).to(apart.dtype)).abs() * apart**2
    return value, {"value_error": apart.detach() ** 2}


@loss(reads=("imitation",), average="tokens")
def weighted_imitation(model, rows):
    """-w_t log pi at each token."""
    return -rows["imitation"] * model.log_probs, {"nll": -model.log_probs.detach()}


@dataclass(frozen=True, kw_only=True)
class ImaginedDialogues:
    """Settings of learning from imagined dialogues."""

    samples_per_prompt: int = 4
    """Dialogues about each prompt."""
    turns: int = 4
    """Turns of the agent in a dialogue."""
    turn_tokens: int = 64
    """Most tokens of a turn."""
    target: Literal["td", "mc"] = "td"
    """What V is regressed on: a step ahead, or the return."""
    gamma: float = 0.99
    """Discount of a token."""
    expectile: float = 0.7
    """tau."""
    temperature: float = 0.1
    """T of the imitation's weights."""
    weight_cap: float = 20.0
    """Largest weight."""
    seconds: float = 120.0
    """Longest that a dialogue may take."""


@recipe
def imagined_dialogues(
    prompts: Prompts, actor: Actor, critic: Critic, imaginer: Opponent, reward: Reward, cfg: ImaginedDialogues
) -> None:
    """Imagine, value, imitate what is better than expected."""
    batch = imaginer.run_episodes(
        prompts,
        environment=Imagined(turns=cfg.turns, turn_tokens=cfg.turn_tokens),
        n=cfg.samples_per_prompt,
        limits=EpisodeLimits(turns=cfg.turns, seconds=cfg.seconds),
        speakers={"human": imaginer},
    )
    batch = critic.compute_values(reward.compute_reward(batch))
    batch = targets(batch, gamma=cfg.gamma, target=cfg.target, temperature=cfg.temperature, cap=cfg.weight_cap)
    critic.update_critic(batch, loss=expectile(cfg.expectile))
    actor.update_actor(batch, loss=weighted_imitation())
