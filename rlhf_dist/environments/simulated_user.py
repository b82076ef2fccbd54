"""A conversation with a user whom another language model plays.

    batch = actor.run_episodes(prompts, environment=SimulatedUser(), speakers={"user": simulator}, n=8)

The row's prompt is what the user wants, which the policy does not see: it hears what the user says of it. The user is a
frozen role of its own, with its own tokenizer and settings; its tokens are text to the policy and never train.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.environments.environment import Chat, Environment, Row


@dataclass(frozen=True, kw_only=True)
class SimulatedUser(Environment):
    """The user begins, and says the mark once it has what it wanted: 1 then, 0 where it never does."""

    instruction: str = (
        "You are talking to an assistant. What you want: {prompt}\n"
        "Say it in your own words, answer its questions, and say {mark} once you have it."
    )
    """What the user is told, with `prompt`, `answer` and `mark`."""
    mark: str = "DONE"
    """What a satisfied user says."""
    exchanges: int = 4
    """Turns of the assistant, at most."""
    turn_tokens: int | None = None
    """Most tokens of a turn of the assistant; None: what is left."""
    user_tokens: int | None = 64
    """Most tokens of a turn of the user; None: what is left."""
    user: str = "user"
    """Name of the user among the speakers."""
    done_reward: float = 1.0
    """For the turn that satisfied the user."""
    exchange_price: float = 0.0
    """For every turn of the assistant after the first."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        user = chat.speaker(self.user)
        user.say(self.instruction.format(prompt=row.prompt, answer=row.answer, mark=self.mark))
        for exchange in range(self.exchanges):
            said = await user.generate(max_tokens=self.user_tokens)
            if exchange and self.mark in said.text:
                chat.reward(self.done_reward)
                return
            chat.say(said.text)
            reply = await chat.generate(max_tokens=self.turn_tokens)
            chat.reward(-self.exchange_price if exchange else 0.0)
            user.say(reply.text)
        if self.mark in (await user.generate(max_tokens=self.user_tokens)).text:
            chat.reward(self.done_reward)
