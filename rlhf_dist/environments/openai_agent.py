"""Agents that are written against an OpenAI-compatible endpoint, run as an environment as they are.

    def agent(endpoint, row):
        client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token)
        messages = [{"role": "user", "content": row.prompt}]
        reply = client.chat.completions.create(model=endpoint.model, messages=messages).choices[0].message
        return float(row.answer in reply.content)                         # the reward

    batch = actor.run_episodes(prompts, environment=OpenAIAgent(agent=agent), n=8)

The endpoint is served on the loopback of the process that generates, with a token for each episode. What the agent
sends is matched with what was said and drawn so far; only new messages are said, and the model goes on from the tokens
that it had, so that rows are token-exact whatever the agent does with texts. An agent that rewrites what came before is
told so (400): its rows would not be those of one conversation.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.environments.endpoint import Endpoint, served
from rlhf_dist.environments.environment import Chat, Environment, Row
from rlhf_dist.environments.tool_calls import JsonCalls, ToolParser


@dataclass(frozen=True, kw_only=True)
class OpenAIAgent(Environment):
    """Its reward is what the agent returns."""

    agent: Callable[[Endpoint, Row], Any]
    """(endpoint, row) -> reward, a function or a coroutine function; it runs in a thread of its own."""
    seconds: float = 110.0
    """Longest that the agent may take."""
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of the tools that the agent offers with its requests."""
    parser: ToolParser | None = None
    """How the model writes calls, which the agent gets as `tool_calls`; None: JsonCalls, where there are tools."""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        parser = self.parser or (JsonCalls() if self.tools else None)
        async with served(chat, tools=self.tools, parser=parser) as endpoint:
            reward = await chat.run(self._run, endpoint, row, seconds=self.seconds)
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise TypeError(f"an agent returns its reward, a number, got {reward!r}")
        chat.reward(float(reward))

    def _run(self, endpoint: Endpoint, row: Row) -> Any:
        if inspect.iscoroutinefunction(self.agent):
            return asyncio.run(self.agent(endpoint, row))
        return self.agent(endpoint, row)
