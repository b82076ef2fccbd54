"""Puzzles over several attempts: a verifier scores each, and the model hears how far off it is.

    Attempts(verifier=rlhf_dist.rewards.reasoning_gym)

With that verifier rows come from a reasoning-gym generator (`data.train.generator=chain_sum`), whose answer column
holds the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_dist.environments.environment import Chat, Environment, Row


@dataclass(frozen=True, kw_only=True)
class Attempts(Environment):
    """Each attempt is rewarded with how much better than all before it is, so that an episode's sum is its best score,
    less the price of its attempts."""

    verifier: Callable[[str, str, str], float]
    """(prompt, response, answer) -> score in [0, 1], such as `rlhf_dist.rewards.reasoning_gym`."""
    attempts: int = 3
    """Most attempts at a puzzle."""
    attempt_tokens: int | None = None
    """Most tokens of an attempt; None: what is left."""
    attempt_price: float = 0.0
    """For every attempt after the first."""
    feedback: str = "That scores {score:.2f} of 1. Try again."
    """What the model hears of an attempt that is not right, with its `score`."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        best = 0.0
        for attempt in range(self.attempts):
            reply = await chat.generate(max_tokens=self.attempt_tokens)
            score = await chat.run(self.verifier, row.prompt, reply.text, row.answer)
            chat.reward(max(0.0, score - best) - (self.attempt_price if attempt else 0.0))
            best = max(best, score)
            if best >= 1:
                return
            chat.say(self.feedback.format(score=score))
