"""The loop of an environment with tools: the model calls, reads what they say, and answers in a turn without a call."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from rlhf_dist.environments.environment import Chat, Environment, Row
from rlhf_dist.environments.outcomes import PolicyError
from rlhf_dist.environments.tool_calls import JsonCalls, ToolCall, ToolParser


@dataclass(frozen=True, kw_only=True)
class ToolUse(Environment):
    """The last turn without a call is the answer, which is compared with the row's: 1 where they are the same."""

    parser: ToolParser = field(default_factory=JsonCalls)
    """How calls are written."""
    argument: str = "text"
    """The argument of a call that the tool is given."""
    turn_tokens: int | None = None
    """Most tokens of a turn; None: what is left."""
    call_reward: float = 0.0
    """For each call that the tool has answered."""
    forgiving: bool = True
    """Tell the model what is wrong with a call; False ends the episode as a policy error."""
    unfinished_reward: float = 0.0
    """See Environment."""

    @abstractmethod
    async def use(self, chat: Chat, argument: str) -> str:
        """What the tool says to a call's argument. Raises PolicyError for a call that cannot be."""

    def score(self, answer: str, row: Row) -> float:
        """What the answer is worth."""
        return float(answer.strip() == row.answer.strip())

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        while True:
            reply = await chat.generate(max_tokens=self.turn_tokens)
            try:
                answers = [await self.use(chat, self._argument(call)) for call in self.parser.calls(reply.text)]
            except PolicyError as error:
                if not self.forgiving:
                    raise
                chat.say(f"error: {error}", role="tool")
                continue
            if not answers:
                break
            chat.reward(self.call_reward * len(answers))
            chat.say("\n".join(answers), role="tool")
        chat.reward(self.score(reply.text, row))

    def _argument(self, call: ToolCall) -> str:
        found = call.arguments.get(self.argument)
        if not isinstance(found, str):
            raise PolicyError(f"a call needs the argument {self.argument!r}, a text")
        return found
