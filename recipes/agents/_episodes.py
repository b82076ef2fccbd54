"""Episodes that several recipes of this family play.

Constraints    attempts, each answered with the constraints that it does not meet                       CORGI
Strategist     the policy says what to do, a frozen model does it; a process reward each turn           EPO
Reflection     a frozen agent tries, the policy reflects on it, the agent tries again: R_2 - R_1        Retroformer
Guide          the policy says something, a frozen player acts on it: was it what was meant             G4C
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from rlhf_dist.environments import Chat, Environment, Row

CONSTRAINTS = (
    ("a number", r"\d"),
    ("a vowel", r"[aeiou]"),
    ("no space", r"^\S*$"),
    ("at most 20 letters", r"^.{0,20}$"),
)
"""(what is asked for, a regular expression that a text with it has)."""


def likeness(text: str, wanted: str) -> float:
    """How much of two texts is the same, in [0, 1]; 1 where they are equal."""
    return SequenceMatcher(None, text.strip().lower(), wanted.strip().lower(), autojunk=False).ratio()


def unmet(text: str, constraints: Sequence[tuple[str, str]]) -> list[str]:
    """Names of the constraints that a text does not meet."""
    return [name for name, pattern in constraints if re.search(pattern, text, re.DOTALL) is None]


@dataclass(frozen=True, kw_only=True)
class Constraints(Environment):
    """The score of an attempt is the share of the constraints that it meets; the first that meets all ends it."""

    constraints: tuple[tuple[str, str], ...] = CONSTRAINTS
    attempts: int = 3
    turn_tokens: int = 8
    """Most tokens of an attempt."""
    every_attempt: bool = True
    """Reward each attempt; False: the last alone."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        for attempt in range(self.attempts):
            reply = await chat.generate(max_tokens=self.turn_tokens)
            missing = unmet(reply.text, self.constraints)
            last = not missing or attempt == self.attempts - 1
            if last or self.every_attempt:
                chat.reward(1 - len(missing) / len(self.constraints))
            if last:
                return
            chat.say(f"missing: {', '.join(missing)}. again: ")


@dataclass(frozen=True, kw_only=True)
class Strategist(Environment):
    """The frozen actor sees the task, each strategy and its own actions; the policy sees the actions. The reward of a
    turn is how much closer the action comes to the answer than all before."""

    rounds: int = 3
    turn_tokens: int = 8
    """Most tokens of a strategy."""
    frozen_tokens: int | None = None
    """Most tokens of an action; None: what the frozen model has left."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        actor, best = chat.speaker("frozen"), 0.0
        actor.say(row.prompt)
        for _ in range(self.rounds):
            strategy = await chat.generate(max_tokens=self.turn_tokens)
            actor.say(f" strategy: {strategy.text} action: ")
            action = await actor.generate(max_tokens=self.frozen_tokens)
            score = likeness(action.text, row.answer)
            chat.reward(max(0.0, score - best))
            best = max(best, score)
            if best == 1:
                return
            chat.say(f" action: {action.text} strategy: ")


@dataclass(frozen=True, kw_only=True)
class Reflection(Environment):
    """One reflection; the frozen agent's two trials are conversations of their own, under two names."""

    turn_tokens: int = 16
    """Most tokens of the reflection."""
    frozen_tokens: int | None = None
    """Most tokens of a trial; None: what the frozen model has left."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        first, second = chat.speaker("frozen"), chat.speaker("again")
        first.say(row.prompt)
        trial = await first.generate(max_tokens=self.frozen_tokens)
        before = likeness(trial.text, row.answer)
        chat.say(f"{row.prompt}{trial.text} scores {before:.2f}. why: ")
        reflection = await chat.generate(max_tokens=self.turn_tokens)
        second.say(f"{reflection.text}\n{row.prompt}")
        trial = await second.generate(max_tokens=self.frozen_tokens)
        chat.reward(likeness(trial.text, row.answer) - before)


@dataclass(frozen=True, kw_only=True)
class Guide(Environment):
    """The row's answer is the action that the guide wants the player to take, and only the guide is told."""

    turn_tokens: int = 16
    """Most tokens of the guidance."""
    frozen_tokens: int | None = None
    """Most tokens of the player; None: what it has left."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        player = chat.speaker("frozen")
        chat.say(f"{row.prompt} (they should say: {row.answer}) say: ")
        guidance = await chat.generate(max_tokens=self.turn_tokens)
        player.say(f"{row.prompt} {guidance.text} ")
        action = await player.generate(max_tokens=self.frozen_tokens)
        chat.reward(likeness(action.text, row.answer))
