"""Every way in which an environment, a tool or a model goes wrong ends as an outcome: never a hang, a crash or a
zero."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.environments import (
    Chat,
    Environment,
    EpisodeLimits,
    InfrastructureError,
    JsonCalls,
    PolicyError,
    Row,
    ToolTimeout,
)
from tests.episodes.conftest import RESPONSE_TOKENS, Play
from workers.engines.generation.interface import NOTHING_DRAWN
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.loop import EpisodeLoop, EpisodesBlocked
from workers.episodes.rows import episode_columns, episode_metrics, log_lost

Body = Callable[[Chat, Row], Awaitable[None]]


class Of(Environment):
    """An environment of one function."""

    def __init__(self, body: Body) -> None:
        self.body = body

    async def episode(self, chat: Chat, row: Row) -> None:
        await self.body(chat, row)


async def good(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    chat.reward(1.0)


async def raises(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    await chat.run(int, "no number")


async def hangs(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    await chat.run(time.sleep, 60, seconds=0.1)


async def megabytes(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    chat.say(await chat.run(lambda: "x" * 5_000_000))


async def not_text(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    chat.say(await chat.run(lambda: b"\x00\xff"))  # type: ignore[arg-type]


async def exits(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    sys.exit(3)


async def tool_exits(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    await chat.run(sys.exit, 3)


async def forgets(chat: Chat, row: Row) -> None:
    chat.say("2+2=")


async def no_reward(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)


async def nan_reward(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    chat.reward(float("nan"))


async def early_reward(chat: Chat, row: Row) -> None:
    chat.reward(1.0)


async def cancels_itself(chat: Chat, row: Row) -> None:
    await chat.generate(max_tokens=4)
    raise asyncio.CancelledError


async def two_at_once(chat: Chat, row: Row) -> None:
    await asyncio.gather(chat.generate(max_tokens=4), chat.generate(max_tokens=4))


async def no_such_field(chat: Chat, row: Row) -> None:
    assert not hasattr(row, "hint")
    await chat.generate(max_tokens=len(row.hint))


async def says_too_much(chat: Chat, row: Row) -> None:
    chat.say("1" * 100)
    await chat.generate()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (raises, "ValueError: invalid literal for int"),
        (hangs, "ToolTimeout: sleep did not return within 0.1 s"),
        (megabytes, "at most 20000 characters (EpisodeLimits.message_characters), got 5000000"),
        (not_text, "chat.say() takes text, got bytes"),
        (exits, "the environment raised SystemExit(3)"),
        (tool_exits, "the function raised SystemExit(3)"),
        (forgets, "the episode ended before chat.generate() had drawn anything"),
        (no_reward, "finished without chat.reward()"),
        (nan_reward, "a reward must be a finite number, got nan"),
        (early_reward, "call chat.generate() first"),
        (two_at_once, "chat.generate() may be awaited once at a time"),
        (no_such_field, "the row has no 'hint'; it has prompt, answer, group_id; name others in the environment's"),
        (cancels_itself, "the environment cancelled itself"),
        (says_too_much, "the prompt must have at most 64 tokens (rollout.max_prompt_tokens), got 100"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_wrong_with_an_environment_costs_its_episode(play_all: Play, body: Body, says: str) -> None:
    async def some(chat: Chat, row: Row) -> None:
        await (body if row.prompt == "2+2=" else good)(chat, row)

    lost, kept = play_all(Of(some))
    assert lost.outcome == "environment_error" and says in lost.detail and not lost.trains
    assert kept.outcome == "finished" and kept.trains
    metrics = {name: metric.value for name, metric in episode_metrics([lost, kept]).items()}
    assert (metrics["episodes"], metrics["lost"], metrics["outcome_environment_error"]) == (2, 1, 1)


def test_a_lost_episode_is_in_the_log_with_its_row_turn_and_traceback(play_all: Play, tmp_path: Path) -> None:
    (lost,) = play_all(Of(raises), texts=("2+2=",))
    file = tmp_path / "episodes" / "lost.jsonl"
    log_lost([({"step": 3, "group_id": 17, "copy": 0}, lost)], file)
    (entry,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (entry["group_id"], entry["turn"], entry["outcome"]) == (17, 1, "environment_error")
    assert "test_outcomes.py" in entry["traceback"] and "invalid literal" in entry["traceback"]
    assert [said["who"] for said in entry["transcript"]] == ["prompt", "model"]


def test_a_model_that_never_stops_ends_at_its_tokens_or_turns(play_all: Play) -> None:
    async def forever(chat: Chat, row: Row) -> None:
        while True:
            await chat.generate(max_tokens=3)
            chat.say("go on")

    (by_turns,) = play_all(Of(forever), EpisodeLimits(turns=4), texts=("2+2=",))
    assert (by_turns.outcome, by_turns.chat.conversation.turns, by_turns.trains) == ("turns", 4, True)
    (by_tokens,) = play_all(Of(forever), EpisodeLimits(turns=99), texts=("2+2=",))
    assert by_tokens.outcome == "length" and by_tokens.trains and by_tokens.unrewarded
    columns = episode_columns([by_tokens, by_turns], rewards=True)
    assert columns["response_ids"].lengths.max() <= RESPONSE_TOKENS
    assert all(columns["turn"].row(row)[-1] >= 0 for row in range(2)), "nothing stands behind the last turn"


def test_what_catches_every_exception_cannot_go_on_behind_the_end(play_all: Play) -> None:
    async def catches(chat: Chat, row: Row) -> None:
        while True:
            try:
                await chat.generate(max_tokens=3)
                chat.say("more")
            except Exception:  # noqa: BLE001
                continue

    (episode,) = play_all(Of(catches), EpisodeLimits(turns=2), texts=("2+2=",))
    assert episode.outcome == "turns"

    async def swallows(chat: Chat, row: Row) -> None:
        try:
            await catches(chat, row)
        except BaseException:  # noqa: BLE001
            return

    (episode,) = play_all(Of(swallows), EpisodeLimits(turns=2), texts=("2+2=",))
    assert (episode.outcome, episode.chat.conversation.turns) == ("turns", 2)


def test_the_price_of_an_episode_that_did_not_finish(play_all: Play) -> None:
    class Priced(Of):
        unfinished_reward = -1.0

    async def wrong_call(chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=3)
        chat.reward(0.25)
        JsonCalls().calls("<tool_call>{")

    (episode,) = play_all(Priced(wrong_call), texts=("2+2=",))
    assert (episode.outcome, episode.detail) == ("policy_error", "<tool_call> is not closed")
    columns = episode_columns([episode], rewards=True)
    assert columns["rewards"].row(0) == -0.75 and columns["token_rewards"].row(0).tolist() == [0, 0, -0.75]
    assert not columns["finished"].row(0) and columns["outcome"].row(0) == "policy_error"


def test_a_deadline_ends_what_waits_what_hangs_and_what_does_not_listen(play_all: Play) -> None:
    async def waits(chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=3)
        while True:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                continue

    started = time.monotonic()
    (episode,) = play_all(Of(waits), EpisodeLimits(seconds=0.2), texts=("2+2=",))
    assert episode.outcome == "deadline" and not episode.trains and "EpisodeLimits.seconds" in episode.detail
    assert time.monotonic() - started < 10


def test_a_deadline_lets_go_of_what_is_being_drawn(play_all: Play, engine: TransformersEngine) -> None:
    step, engine.step = engine.step, lambda: (time.sleep(0.1), step())[1]  # type: ignore[method-assign]
    try:
        (episode,) = play_all(Of(good), EpisodeLimits(seconds=0.05), texts=("2+2=",))
    finally:
        del engine.step  # type: ignore[method-assign]
    assert episode.outcome == "deadline" and not engine._in_flight
    assert play_all(Of(good), texts=("2+2=",))[0].outcome == "finished"


def test_infrastructure_is_tried_again_and_draws_the_same(play_all: Play) -> None:
    tries: list[str] = []

    async def flaky(chat: Chat, row: Row) -> None:
        reply = await chat.generate(max_tokens=6)
        tries.append(reply.text)
        if len(tries) < 3:
            raise ConnectionResetError("the sandbox is gone")
        chat.reward(1.0)

    (episode,) = play_all(Of(flaky), EpisodeLimits(retries=2), texts=("2+2=",))
    assert (episode.outcome, episode.attempts, len(set(tries))) == ("finished", 3, 1)

    async def gone(chat: Chat, row: Row) -> None:
        raise InfrastructureError("no sandbox")

    (lost,) = play_all(Of(gone), EpisodeLimits(retries=1), texts=("2+2=",))
    assert (lost.outcome, lost.attempts, lost.trains) == ("infrastructure_error", 2, False)


def test_an_environment_may_go_on_behind_a_tool_that_hangs(play_all: Play) -> None:
    async def copes(chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=3)
        try:
            await chat.run(time.sleep, 60, seconds=0.05)
        except ToolTimeout as error:
            chat.say(str(error), role="tool")
        await chat.generate(max_tokens=3)
        chat.reward(1.0)
        chat.end()

    (episode,) = play_all(Of(copes), texts=("2+2=",))
    assert (episode.outcome, episode.chat.conversation.turns) == ("finished", 2)


def test_code_that_blocks_all_episodes_is_named(engine: TransformersEngine) -> None:
    async def blocks() -> None:
        time.sleep(1.5)

    with pytest.raises(
        EpisodesBlocked, match=r"(?s)has blocked the thread .* for 0.1 s; call what blocks with.*time.sleep"
    ):
        EpisodeLoop(engine, blocked_s=0.1).run([blocks], 1)


def test_an_engine_that_fails_ends_the_op(play_all: Play, engine: TransformersEngine) -> None:
    def fails() -> Any:
        raise MemoryError("the device is full")

    engine.step = fails  # type: ignore[method-assign]
    try:
        with pytest.raises(MemoryError, match="the device is full"):
            play_all(Of(good))
    finally:
        del engine.step  # type: ignore[method-assign]
    assert not engine._in_flight and NOTHING_DRAWN.interrupted
    assert play_all(Of(good))[0].outcome == "finished"


def test_the_parser_says_what_is_wrong_with_a_call() -> None:
    two = '<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call> and <tool_call>\n{"name": "b"}\n</tool_call>'
    assert [(call.name, call.arguments) for call in JsonCalls().calls(two)] == [("a", {"x": 1}), ("b", {})]
    assert JsonCalls().calls("no call") == []
    for text, says in (
        ("<tool_call>{]</tool_call>", "must be JSON"),
        ("<tool_call>[1]</tool_call>", "must be an object with a name"),
        ('<tool_call>{"name": "a", "arguments": "x"}</tool_call>', "arguments of a tool call must be an object"),
        ("</tool_call>", "closes nothing"),
        ("<tool_call><tool_call>", "stands within"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "must be JSON"),
        ('<tool_call>{"name": "rm"}</tool_call>', "there is no tool 'rm'; there is add"),
    ):
        with pytest.raises(PolicyError, match=says):
            JsonCalls(names=("add",)).calls(text)


def test_nothing_is_left_running(play_all: Play) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        play_all(Of(good))
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "each loop closes its pipes"
