"""A game of one move each, made at the same time: two roles play it, and what it pays is a matrix.

    batch = actor.run_episodes(
        prompts, environment=MatrixGame(), speakers={"opponent": opponent}, rows_of=("opponent",)
    )

Its equilibrium is known, so that what two policies have learnt from each other can be measured (`exploitability`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_dist.environments.environment import Chat, Environment, Reply, Row

ROCK_PAPER_SCISSORS = ((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class MatrixGame(Environment):
    """Each side says one move; `payoffs[mine][theirs]` is the role's own, and minus that the other's."""

    payoffs: tuple[tuple[float, ...], ...] = ROCK_PAPER_SCISSORS
    moves: tuple[str, ...] = ("0", "1", "2")
    """What a side says for its first, second, ... move; two games' matrix is square."""
    nonsense_reward: float = -2.0
    """For a side that says no move; the other gets 0. Below all payoffs, so that every move is better."""
    turn_tokens: int = 1
    """Most tokens of a move."""
    other: str = "opponent"
    """Name of the other side among the speakers."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        other = chat.speaker(self.other)
        mine, theirs = await asyncio.gather(*(one.generate(max_tokens=self.turn_tokens) for one in (chat, other)))
        first, second = self._move(mine), self._move(theirs)
        if first is None or second is None:
            for side, move in ((chat, first), (other, second)):
                side.reward(self.nonsense_reward if move is None else 0.0)
            return
        chat.reward(self.payoffs[first][second])
        other.reward(-self.payoffs[first][second])

    def _move(self, reply: Reply) -> int | None:
        said = reply.text.strip()
        return self.moves.index(said) if said in self.moves else None


def exploitability(
    payoffs: Sequence[Sequence[float]], first: NDArray[np.float64], second: NDArray[np.float64]
) -> float:
    """What the best answers to both sides' mixtures of moves ([M] each, summing to 1) win together, 0 at an
    equilibrium: max_a (A q)_a - min_b (p A)_b."""
    matrix = np.asarray(payoffs, dtype=np.float64)
    return float((matrix @ second).max() - (first @ matrix).min())
