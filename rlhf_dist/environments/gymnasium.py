"""Environments with Gymnasium's interface, played in words: what is seen is said, and a turn's text is the action.

    FromGymnasium(id="FrozenLake-v1", arguments={"is_slippery": False, "render_mode": "ansi"},
                  actions=("left", "down", "right", "up"))

Rewards fall on the turns that earned them. The state at the start is seeded by the episode, so that copies of a row
differ and the same run plays the same again; a row may fix it (`{"fields": {"seed": 7}}`). Needs the package gymnasium
(the extra `environments`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_dist.environments.environment import Chat, Environment, Row
from rlhf_dist.environments.search_tool import library


def shown(observation: Any, rendered: Any) -> str:
    """What is said of a state: its drawing where that is text, else the observation itself."""
    if isinstance(rendered, str):
        return re.sub(r"\x1b\[[0-9;]*m", "", rendered).strip("\n")  # colours are a terminal's
    if isinstance(observation, np.ndarray):
        return " ".join(f"{float(value):g}" for value in observation.ravel())
    return str(observation)


@dataclass(frozen=True, kw_only=True)
class FromGymnasium(Environment):
    """An environment of the library, or one that is registered where `module` is imported."""

    id: str
    """As `gymnasium.make` takes it; `module:id` imports a module first."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `gymnasium.make`."""
    actions: tuple[str, ...] = ()
    """Words for the actions 0, 1, ...; empty: the number itself."""
    instruction: str = "{state}\n"
    """The first message, with `state`, `actions` and the row's `prompt`."""
    show: Callable[[Any, Any], str] = shown
    """(observation, what it renders) -> text."""
    turn_tokens: int | None = 8
    """Most tokens of a turn; None: what is left."""
    steps: int = 8
    """Most turns; where the environment goes on after them, the episode has finished all the same."""
    nonsense_reward: float = 0.0
    """For a turn that is no action; nothing happens then, and the model is told."""

    def prepare(self) -> None:
        """See Environment."""
        library("gymnasium", "FromGymnasium").make(self.id, **self.arguments).close()

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        fields = row.fields if hasattr(row, "fields") else {}
        seed = int(fields.get("seed", chat.rng.integers(1 << 31)))
        game = await chat.run(lambda: library("gymnasium", "FromGymnasium").make(self.id, **self.arguments))
        try:
            observation, _ = await chat.run(lambda: game.reset(seed=seed))
            state = self.show(observation, await chat.run(_drawn, game))
            chat.say(self.instruction.format(state=state, actions=", ".join(self.actions), prompt=row.prompt))
            for _ in range(self.steps):
                reply = await chat.generate(max_tokens=self.turn_tokens)
                action = self._action(reply.text, game.action_space)
                if action is None:
                    chat.reward(self.nonsense_reward)
                    chat.say(f"no action; say one of {', '.join(self.actions) or game.action_space}\n")
                    continue
                observation, reward, ended, cut, _ = await chat.run(game.step, action)
                chat.reward(float(reward))
                if ended or cut:
                    return
                chat.say(f"{self.show(observation, await chat.run(_drawn, game))}\n")
        finally:
            game.close()

    def _action(self, text: str, space: Any) -> Any:
        """The action that a turn says last; None where it says none."""
        kind = type(space).__name__
        if kind == "Text":
            return text if space.contains(text) else None
        if kind != "Discrete":
            raise TypeError(
                f"FromGymnasium plays Discrete and Text actions, {self.id} has {kind}; wrap it in one of these"
            )
        words = [re.escape(word) for word in self.actions] or [r"-?\d+"]
        said = re.findall(rf"(?<![\w-])(?:{'|'.join(words)})(?!\w)", text)
        if not said:
            return None
        action = self.actions.index(said[-1]) + int(space.start) if self.actions else int(said[-1])
        return action if space.contains(action) else None


def _drawn(game: Any) -> Any:
    return game.render() if game.render_mode == "ansi" else None
