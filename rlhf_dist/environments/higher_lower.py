"""A text game with a reward each turn: guess a number, be told higher or lower."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_dist.environments.environment import Chat, Environment, Row


@dataclass(frozen=True, kw_only=True)
class HigherLower(Environment):
    """The number is the row's answer, or drawn where the row has none. Halving the interval finds it in
    log2(most + 1) guesses."""

    most: int = 15
    """Largest number; the least is 0."""
    guesses: int = 4
    """Turns of an episode; without the number after them it has finished all the same."""
    turn_tokens: int = 4
    """Most tokens of a guess."""
    found_reward: float = 1.0
    closer_reward: float = 0.2
    """For a guess that rules numbers out: this times the share of those left that it rules out."""
    nonsense_reward: float = -0.2
    """For a turn without a number."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        wanted = int(row.answer) if row.answer.strip() else int(chat.rng.integers(self.most + 1))
        low, high = 0, self.most
        for _ in range(self.guesses):
            reply = await chat.generate(max_tokens=self.turn_tokens)
            number = re.search(r"\d+", reply.text)
            if number is None:
                chat.reward(self.nonsense_reward)
                chat.say("say a number: ")
                continue
            guess, before = int(number[0]), high - low + 1
            if guess == wanted:
                chat.reward(self.found_reward)
                return
            low, high = (max(low, guess + 1), high) if guess < wanted else (low, min(high, guess - 1))
            chat.reward(self.closer_reward * (1 - (high - low + 1) / before))
            chat.say("higher: " if guess < wanted else "lower: ")
