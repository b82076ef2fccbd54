"""Environments with the interface of `verifiers`, played through the endpoint that agents have.

    game = verifiers.load_environment("wordle")
    environment = OpenAIAgent(agent=FromVerifiers(game=game, max_tokens=64), tools=game.oai_tools or ())

Of such an environment two things are used, as verifiers 0.1.9 has them: `rollout`, which talks with the model through
an OpenAI client, and the `rubric`, which scores what came of it. So the rows are as token-exact as any agent's.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rlhf_dist.environments.endpoint import Endpoint
from rlhf_dist.environments.environment import Row
from rlhf_dist.environments.search_tool import library


@dataclass(frozen=True, kw_only=True)
class FromVerifiers:
    """An agent, for `OpenAIAgent`; its reward is the rubric's for this rollout."""

    game: Any
    """The environment, made where the recipe's file is read (one can be made in a main thread only, and takes SIGINT
    and SIGTERM over there). It travels by value, and each episode plays in a thread and an event loop of its own."""
    max_tokens: int | None = None
    """Most tokens of a turn; None: what is left."""
    task: str = "default"
    """What the environment is told that the row is of. Its `answer` is the row's, its `info` the row's field `info`."""

    def __call__(self, endpoint: Endpoint, row: Row) -> float:
        """The reward of one episode. Raises TypeError for another interface, RuntimeError where the game failed."""
        return asyncio.run(self._play(endpoint, row))

    async def _play(self, endpoint: Endpoint, row: Row) -> float:
        game, limit = self.game, {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        rollout, rubric = getattr(game, "rollout", None), getattr(game, "rubric", None)
        if rollout is None or rubric is None or not hasattr(rubric, "score_rollout"):
            raise TypeError(
                "FromVerifiers needs an environment with `rollout` and a `rubric` with `score_rollout`, as those of "
                f"verifiers 0.1.9 have; got a {type(game).__name__}"
            )
        messages = [*(getattr(game, "few_shot", None) or ()), {"role": "user", "content": row.prompt}]
        if instruction := getattr(game, "system_prompt", None):
            messages.insert(0, {"role": "system", "content": instruction})
        fields = row.fields if hasattr(row, "fields") else {}
        said = {
            **{"prompt": messages, "answer": row.answer if hasattr(row, "answer") else "", "example_id": 0},
            **{"task": self.task, "info": fields.get("info", {})},
        }
        openai = library("openai", "FromVerifiers")
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.token, max_retries=0) as client:
            state = await rollout(said, client, endpoint.model, limit)
        if (error := state.get("error")) is not None:  # the library keeps what a request or its own code failed with
            raise RuntimeError(f"the environment ended in {type(error).__name__}: {error.__cause__ or error}")
        await rubric.score_rollout(state, nullcontext())
        return float(state["reward"])
