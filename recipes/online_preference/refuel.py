"""REBEL on the turns of a conversation with a simulated user: REFUEL (Gao et al. 2024, arXiv 2410.04612).

    h uniform, x_h from the policy and the user;   y, y' ~ pi_t(. | x_h), both played to the end
    L = ((1/eta) [log pi/pi_t(y | x_h) - log pi/pi_t(y' | x_h)] - [R(y) - R(y')])^2

As REBEL (`sample_pairs`), where the two responses are two ways to go on from one turn: only that turn has a loss, and
what is compared is the reward of all that follows. The beginning is computed once, since both are branches of it.
"""

from dataclasses import dataclass

import numpy as np

from recipes.online_preference._sample_pairs import sample_pair_loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward

PAPERS = {
    "refuel": Paper(
        title="REFUEL",
        year=2024,
        arxiv="2410.04612",
        rows=(25,),
        needs=("TURN", "PFX", "XLM", "ROLL", "RM"),
        assumed="eta 1; R is the reward of the whole conversation, whose part before the turn is the same for both",
    )
}


@dataclass(frozen=True, kw_only=True)
class FromOneTurn(Environment):
    """A conversation up to a turn that is drawn, and two ways to go on from there."""

    rewards = False
    leaves = 2
    turns: int
    turn_tokens: int
    user_tokens: int

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        chat.speaker("user").say(row.prompt)
        first = int(chat.rng.integers(self.turns))
        for turn in range(first):
            await self._exchange(chat, turn)

        async def on(branch: Chat) -> None:
            for turn in range(first, self.turns):
                await self._exchange(branch, turn)

        await chat.branch(on, n=2)

    async def _exchange(self, chat: Chat, turn: int) -> None:
        """The assistant's turn, then the user's, but behind the last."""
        reply = await chat.generate(max_tokens=self.turn_tokens)
        if turn < self.turns - 1:
            user = chat.speaker("user")
            user.say(reply.text)
            chat.say((await user.generate(max_tokens=self.user_tokens)).text)


@host_op(
    reads=("tree", "turn", "segment", "response_mask"),
    writes=("response_mask", "label"),
    scope="groups",
    rows="drop",
)
def two_ways(batch: Batch) -> HostResult:
    """Trees of two rows, labelled +1 and -1, of which the first turn that they do not share counts alone. A tree that
    has lost a row compares nothing: dropped and counted."""
    offsets, mask = batch["turn"].offsets, np.zeros_like(batch["response_mask"].values)
    assert offsets is not None, "one number a token"
    turns, segments, trees = batch["turn"].values, batch["segment"].values, batch["tree"].values
    label, lost = np.zeros(batch.num_rows, np.int8), 0
    for tree in np.unique(trees):
        rows = np.flatnonzero(trees == tree)
        if len(rows) != 2:
            lost += 1
            continue
        label[rows] = 1, -1
        spans = [slice(offsets[row], offsets[row + 1]) for row in rows]
        shared = list(set(segments[spans[0]].tolist()) & set(segments[spans[1]].tolist()))
        for span in spans:
            own = (turns[span] >= 0) & ~np.isin(segments[span], shared)
            mask[span] = turns[span] == turns[span][own].min()
    keep = np.flatnonzero(label)
    columns = {"label": Column(label[keep]), "response_mask": Column(mask, offsets).take(keep)}
    return HostResult(columns=Batch(columns, len(keep)), keep=keep, metrics={"trees_of_one": Mean(float(lost), 0)})


@dataclass(frozen=True, kw_only=True)
class REFUEL:
    """Settings of REFUEL."""

    turns: int = 5
    """Turns of the assistant in a conversation."""
    turn_tokens: int = 256
    """Most tokens of a turn of the assistant."""
    user_tokens: int = 128
    """Most tokens of a turn of the user."""
    eta: float = 1.0
    """Step size."""
    seconds: float = 300.0
    """Longest that an episode may take."""
    epochs: int = 1
    """Passes over the pairs."""


@recipe
def refuel(prompts: Prompts, actor: Actor, user: Opponent, reward: Reward, cfg: REFUEL) -> None:
    """Regression on two ways to go on from a turn."""
    environment = FromOneTurn(turns=cfg.turns, turn_tokens=cfg.turn_tokens, user_tokens=cfg.user_tokens)
    limits = EpisodeLimits(turns=cfg.turns, seconds=cfg.seconds)
    batch = actor.run_episodes(prompts, environment=environment, limits=limits, speakers={"user": user})
    batch = actor.compute_log_prob(two_ways(reward.compute_reward(batch)))
    actor.update_actor(batch, loss=sample_pair_loss("rebel", eta=cfg.eta), epochs=cfg.epochs)
