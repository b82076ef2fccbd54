"""An environment with the interface of verifiers 0.1.9 plays as an agent. The library itself is not installed here."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from rlhf_dist.environments import EpisodeLimits
from rlhf_dist.environments.openai_agent import OpenAIAgent
from rlhf_dist.environments.verifiers import FromVerifiers
from tests.episodes.conftest import Play


class Again:
    """Asks three times, as `verifiers.MultiTurnEnv` would; its own rubric."""

    system_prompt = "sum: "

    def __init__(self, temperature: float | None = None) -> None:
        self.rubric, self.more = self, {} if temperature is None else {"temperature": temperature}

    async def rollout(self, given: dict[str, Any], client: Any, model: str, sampling: dict[str, Any]) -> dict[str, Any]:
        messages, state = list(given["prompt"]), {"answer": given["answer"], "error": None, "said": []}
        for _ in range(3):
            try:
                reply = await client.chat.completions.create(model=model, messages=messages, **sampling, **self.more)
            except Exception as error:  # noqa: BLE001 - as the library does, which keeps it
                kept = KeyError("model")
                kept.__cause__ = error
                return {**state, "error": kept}
            state["said"].append(reply.choices[0].message.content)
            messages += [reply.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "again:"}]
        return state

    async def score_rollout(self, state: dict[str, Any], score_sem: AbstractAsyncContextManager[None]) -> None:
        async with score_sem:
            state["reward"] = sum(len(said) for said in state["said"]) + 100 * int(state["answer"])


def play(play_all: Play, game: Any) -> Any:
    agent = OpenAIAgent(agent=FromVerifiers(game=game, max_tokens=4))
    (episode,) = play_all(agent, EpisodeLimits(seconds=300), texts=("2+2=",))
    return episode


def test_it_talks_through_the_endpoint_and_its_rubric_rewards(play_all: Play) -> None:
    episode = play(play_all, Again())
    said = [(message["role"], message["content"]) for message in episode.chat.conversation.messages]
    assert said[:2] == [("system", "sum: "), ("user", "2+2=")] and said[3] == ("user", "again:")
    turns = [text for role, text in said if role == "assistant"]
    assert len(turns) == 3 and episode.total == sum(map(len, turns)) + 400, "the row's answer is 4"


def test_what_it_failed_with_is_said(play_all: Play) -> None:
    assert "ended in KeyError: Error code: 400 - temperature=0.5 is not" in play(play_all, Again(0.5)).detail
    detail = play(play_all, object()).detail
    assert "needs an environment with `rollout` and a `rubric`" in detail and detail.endswith("got a object")
