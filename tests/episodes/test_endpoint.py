"""Agents written against the `openai` client play episodes, and their rows are token-exact."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

from rlhf_dist.environments import EpisodeLimits, Reply, Row
from rlhf_dist.environments.endpoint import _SERVERS, BadRequest, Endpoint, Session, served
from rlhf_dist.environments.openai_agent import OpenAIAgent
from rlhf_dist.testing import check_environment
from tests.episodes.conftest import Play


def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token, max_retries=0, timeout=120)


def ask(endpoint: Endpoint, messages: list[Any], **more: Any) -> Any:
    return client(endpoint).chat.completions.create(model=endpoint.model, messages=messages, **more)


def talks(endpoint: Endpoint, row: Row) -> float:
    """Two turns, the first asked for twice, the second as a stream."""
    messages: list[Any] = [{"role": "system", "content": "sum: "}, {"role": "user", "content": row.prompt}]
    reply = ask(endpoint, messages, max_tokens=5).choices[0]
    again = ask(endpoint, messages, max_tokens=5).choices[0]
    assert again.message.content == reply.message.content, "a client that tries again gets the same answer"
    messages += [
        reply.message.model_dump(exclude_none=True),
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    with ask(endpoint, messages, max_tokens=4, stream=True) as stream:
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    return float(len(said))


def test_an_agent_of_the_openai_client_is_an_environment() -> None:
    limits = EpisodeLimits(seconds=300)
    (one, other) = check_environment(OpenAIAgent(agent=talks), [{"prompt": "2+2="}], limits=limits)
    assert [piece["who"] for piece in one] == ["prompt", "model", "environment", "model"] and one != other
    assert one[0]["text"].endswith("sum: 2+2=") and one[3]["reward"] == len(one[3]["text"])


async def calls_a_tool(endpoint: Endpoint, row: Row) -> int:
    messages: list[Any] = [{"role": "user", "content": row.prompt}]
    async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.token, max_retries=0) as model:
        assert [one.id for one in (await model.models.list()).data] == [endpoint.model]
        reply = (await model.chat.completions.create(model="x", messages=messages, tools=TOOLS, max_tokens=4)).choices[
            0
        ]  # type: ignore[call-overload]
        (call,) = reply.message.tool_calls or ()
        assert (reply.finish_reason, call.function.name, json.loads(call.function.arguments)) == (
            "tool_calls",
            "f",
            {"x": 1},
        )
        messages += [reply.message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
        reply = (await model.chat.completions.create(model="x", messages=messages, tools=TOOLS, max_tokens=4)).choices[
            0
        ]  # type: ignore[call-overload]
    return 1


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


class Always:
    """Finds one call in every turn."""

    def calls(self, text: str) -> list[Any]:
        from rlhf_dist.environments import ToolCall

        return [ToolCall("f", {"x": 1})]


def test_tool_calls_go_to_the_agent_and_their_answers_come_back(play_all: Play) -> None:
    agent = OpenAIAgent(agent=calls_a_tool, tools=TOOLS, parser=Always())
    (episode,) = play_all(agent, EpisodeLimits(seconds=300), texts=("2+2=",))
    assert (episode.outcome, episode.detail) == ("finished", "")
    said = [(message["role"], message["content"]) for message in episode.chat.conversation.messages]
    assert (
        said[0] == ("user", "2+2=")
        and said[2] == ("tool", "7")
        and [role for role, _ in said][1::2] == ["assistant"] * 2
    )


def rewrites(endpoint: Endpoint, row: Row) -> float:
    ask(endpoint, [{"role": "user", "content": "a"}], max_tokens=3)
    return float(bool(ask(endpoint, [{"role": "user", "content": "b"}, {"role": "user", "content": "c"}])))


def heats(endpoint: Endpoint, row: Row) -> float:
    return float(bool(ask(endpoint, [{"role": "user", "content": "a"}], temperature=0.5)))


def no_token(endpoint: Endpoint, row: Row) -> float:
    return float(bool(ask(Endpoint(url=endpoint.url, token="x"), [{"role": "user", "content": "a"}])))


def picture(endpoint: Endpoint, row: Row) -> float:
    return float(bool(ask(endpoint, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}])))


def gives_no_number(endpoint: Endpoint, row: Row) -> Any:
    ask(endpoint, [{"role": "user", "content": "a"}], max_tokens=3)
    return "good"


@pytest.mark.parametrize(
    ("agent", "says"),
    [
        (rewrites, "messages must be the 2 of the conversation so far, as they were sent and answered"),
        (heats, "temperature=0.5 is not served"),
        (no_token, "no episode has this token"),
        (picture, "the content of a message is text, got list"),
        (gives_no_number, "an agent returns its reward, a number, got 'good'"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_cannot_be_recorded_is_refused(play_all: Play, agent: Any, says: str) -> None:
    (episode,) = play_all(OpenAIAgent(agent=agent), EpisodeLimits(seconds=300), texts=("2+2=",))
    assert episode.outcome == "environment_error" and says in episode.detail


def goes_on(endpoint: Endpoint, row: Row) -> float:
    messages: list[Any] = [{"role": "user", "content": "a"}]
    while True:
        reply = ask(endpoint, messages, max_tokens=2).choices[0].message
        messages += [reply, {"role": "user", "content": "b"}]


def test_an_agent_that_never_stops_ends_at_its_turns(play_all: Play) -> None:
    (episode,) = play_all(OpenAIAgent(agent=goes_on), EpisodeLimits(turns=3, seconds=300), texts=("2+2=",))
    assert (episode.outcome, episode.trains, episode.chat.conversation.turns) == ("turns", True, 3)


class Slow:
    """A chat whose turns take their time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.limits = seconds, EpisodeLimits(message_characters=5)
        self.said: list[str] = []
        self.drawn = 0

    def say(self, text: str, role: str = "user") -> None:
        self.said.append(text)

    async def generate(self, *, max_tokens: int | None = None) -> Reply:
        self.drawn += 1
        await asyncio.sleep(self.seconds)
        return Reply(text="r", raw="r", finished=True, tokens=1)


async def post(endpoint: Endpoint, timeout_s: float) -> str:
    request, headers = {"messages": [{"role": "user", "content": "a"}]}, {"Authorization": f"Bearer {endpoint.token}"}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as client:
        async with client.post(f"{endpoint.url}/chat/completions", json=request) as answer:
            return str((await answer.json())["choices"][0]["message"]["content"])


def test_a_client_that_lost_patience_gets_the_turn_that_is_drawn() -> None:
    chat: Any = Slow(0.3)

    async def twice() -> str:
        async with served(chat) as endpoint:
            with pytest.raises(TimeoutError):
                await post(endpoint, 0.1)
            return await post(endpoint, 5.0)

    assert (asyncio.run(twice()), chat.said, chat.drawn) == ("r", ["a"], 1)


def test_a_turn_that_is_still_drawn_ends_with_its_episode() -> None:
    chat: Any = Slow(600.0)

    async def leaves() -> int:
        async with served(chat) as endpoint:
            with pytest.raises(TimeoutError):
                await post(endpoint, 0.1)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(leaves()) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"messages": [{"role": "user", "content": text} for text in ("a", "too long")]}, "at most 5 characters"),
        ({"max_tokens": 0}, "max_tokens must be a number >= 1, got 0"),
        ({"max_completion_tokens": "4"}, "max_completion_tokens must be a number >= 1, got '4'"),
    ],
)
def test_a_refusal_leaves_nothing_said(more: dict[str, Any], says: str) -> None:
    chat: Any = Slow()

    async def refused() -> None:
        session, good = Session(chat), {"messages": [{"role": "user", "content": "a"}]}
        with pytest.raises(BadRequest, match=says):
            await session.answered({**good, **more})
        assert chat.said == []
        await session.answered(good)

    asyncio.run(refused())
    assert chat.said == ["a"]


def test_the_last_episode_of_a_loop_leaves_no_server() -> None:
    async def episode(seconds: float) -> str:
        chat: Any = Slow()
        async with served(chat) as endpoint:
            await asyncio.sleep(seconds)
            return await post(endpoint, 5.0)

    async def all_of_them() -> list[str]:
        cancelled = asyncio.ensure_future(episode(600.0))
        found = await asyncio.gather(*(episode(0.02 * number) for number in range(4)))
        cancelled.cancel()
        await asyncio.wait({cancelled})
        assert not _SERVERS, "dropped while the loop is there"
        return [*found, await episode(0.0)]

    assert asyncio.run(all_of_them()) == ["r"] * 5 and not _SERVERS
