"""An answer in steps, as an environment whose episodes are trees: grown whole, or searched.

    full    every step is followed by `expand` others, `depth` deep
    mcts    `simulations` of Monte-Carlo tree search, `expand` steps from where each ends

A step is `step_tokens` tokens, unless the response ends before. Every leaf is a row. Its value, by which the search
goes and which is its reward, is 1 where its text contains the answer, else 0; `judge` is the weight of what the model
itself says in words (0 to 10, divided by 10) in it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.environments.search import Step, self_judged, tree_search

QUESTION = "\nHow likely is it that this leads to the right answer, from 0 to 10? "


@dataclass(frozen=True, kw_only=True)
class Steps(Environment):
    """See the module's docstring."""

    leaves: int = 64
    search: Literal["full", "mcts"] = "full"
    expand: int = 2
    """Steps from each state."""
    depth: int = 3
    """Steps of a response."""
    step_tokens: int = 32
    simulations: int = 8
    """Of mcts."""
    explore: float = 1.0
    """Of mcts: UCT's constant."""
    judge: float = 0.0
    """Weight of the model's own judgement in a state's value."""
    question: str = QUESTION
    """What it is asked then."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        if self.search == "mcts":
            shape = {"simulations": self.simulations, "expand": self.expand, "depth": self.depth}
            await tree_search(chat, self.step, **shape, explore=self.explore)
        else:
            await self._grow(chat, self.depth)

    async def _grow(self, chat: Chat, left: int) -> None:
        branches = await chat.branch(self.step, n=self.expand)
        going = [branch for branch in branches if branch.returned is not None and not branch.returned.done]
        for branch in branches:
            if branch.returned is not None and (left == 1 or branch not in going):
                branch.chat.reward(branch.returned.value)
        if left > 1:
            await asyncio.gather(*(self._grow(branch.chat, left - 1) for branch in going))

    async def step(self, branch: Chat) -> Step:
        """One step, and what the state behind it is worth."""
        reply = await branch.generate(max_tokens=self.step_tokens)
        value = float(branch.row.answer in branch.messages[-1]["content"])
        if self.judge and not reply.finished:
            said = await self_judged(branch, self.question, max_tokens=4)
            value = (1 - self.judge) * value + self.judge * min(max(said / 10, 0.0), 1.0)
        return Step(value=value, done=reply.finished)


def limits_of(environment: Steps, seconds: float) -> EpisodeLimits:
    """Limits that let its trees grow: a turn a step, and one for a judgement."""
    return EpisodeLimits(turns=environment.depth + 1, seconds=seconds, branches=1024)
