"""Ranks that share a copy of the model, as two threads: the second does with its engine what the first one does.

vLLM's ranks, with real collectives between them: `tests/generation/test_vllm_parallel.py`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_dist.config import ModelConfig, RolloutConfig
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.sampling import Sampling
from rlhf_dist.wire import Call
from tests.episodes.conftest import PROMPT_TOKENS, RESPONSE_TOKENS, prompts
from workers.engines.generation.interface import Request, Response
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.copies import Copy
from workers.episodes.leaves import Episode
from workers.episodes.run import run_episodes


class Rank(TransformersEngine):
    """An engine that writes down what it is asked, and hears of the other's by a queue in place of a broadcast."""

    def __init__(self, model: Path, rank: int, link: queue.SimpleQueue[Any]) -> None:
        limits = RolloutConfig(max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=RESPONSE_TOKENS)
        super().__init__(model_path=str(model), rollout=limits, rank=0, world=1, device=torch.device("cpu"))
        self.load(ModelConfig(path=str(model)), 0)
        self.place, self.link, self.asked = rank, link, list[Any]()

    @property
    def ranks_of_copy(self) -> tuple[int, int]:
        return self.place, 2

    def told(self, said: Any) -> Any:
        if self.place:
            return self.link.get(timeout=60)
        self.link.put(said)
        return said

    def add(self, request: Request) -> None:
        super().add(request)
        self.asked.append((request.name, request.token_ids.tolist(), request.seed))

    def step(self) -> list[tuple[str, Response]]:
        done = super().step()
        self.asked.append([(name, response.token_ids.tolist()) for name, response in done])
        return done

    def abort(self, name: str) -> Response:
        self.asked.append(name)
        return super().abort(name)


class TwoTurns(Environment):
    """A second turn that the row `2` does not wait for."""

    async def episode(self, chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=4)
        await asyncio.sleep(0.01 * len(row.prompt))
        chat.say("?")
        try:
            await asyncio.wait_for(chat.generate(max_tokens=20), 1e-4 if row.prompt == "2" else 60)
        except TimeoutError:
            pass
        chat.reward(1.0)


class TooLong(Environment):
    """What the engine refuses."""

    async def episode(self, chat: Chat, row: Row) -> None:
        chat.say("1" * (PROMPT_TOKENS + 1))
        await chat.generate()


class Unprepared(TwoTurns):
    """Fails before it begins."""

    def prepare(self) -> None:
        raise OSError("no index")


def play(model: Path, environment: Environment) -> tuple[list[Episode], Rank, Rank]:
    link: queue.SimpleQueue[Any] = queue.SimpleQueue()
    first, second = Rank(model, 0, link), Rank(model, 1, link)

    def follow() -> None:
        with Copy([second]) as copy:
            assert not copy.leads
            copy.follow()

    other = threading.Thread(target=follow, daemon=True)
    other.start()
    batch = prompts(["1+1=", "2", "33+4="])
    call = Call(num_rows=3, row_index=np.arange(3), step=0, node="n", line="", seed=0)
    sampling = Sampling(max_tokens=RESPONSE_TOKENS)
    try:
        with Copy([first, first]) as copy:
            engine, limits = copy.of(first), EpisodeLimits()
            played = run_episodes(engine, str(model), batch, call, environment, limits, sampling, PROMPT_TOKENS)
    finally:
        other.join(60)
        assert not other.is_alive(), "the other rank has heard that it is over"
        assert not first._in_flight and not second._in_flight
    return played, first, second


def test_the_other_rank_adds_aborts_and_steps_alike(model: Path) -> None:
    played, first, second = play(model, TwoTurns())
    assert [episode.outcome for episode in played] == ["finished"] * 3
    assert first.asked == second.asked and any(isinstance(one, str) for one in first.asked), "one was let go of"


def test_the_other_rank_hears_of_no_request_that_is_refused_and_of_an_end_before_the_start(model: Path) -> None:
    played, _, second = play(model, TooLong())
    assert {episode.outcome for episode in played} == {"environment_error"} and second.asked == []
    with pytest.raises(OSError, match="no index"):
        play(model, Unprepared())
