"""Episodes of a piece are handed over when its last one is over, as the reply has them, while others are played."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_dist.config import LanguageModelConfig, ModelConfig, RolloutConfig
from rlhf_dist.environments import Chat, Environment, Row
from rlhf_dist.wire import Call, OpResult, Pieces, WorkerContext
from tests.episodes.conftest import PROMPT_TOKENS, RESPONSE_TOKENS, prompts
from workers.handing import Handing
from workers.rollout import RolloutWorker

TEXTS = ["1", "2", "3", "4", "5", "6"]
TAKEN = threading.Semaphore(0)


class Waits(Environment):
    """The tool of row 3 waits until two pieces have been taken; row 5 is lost."""

    async def episode(self, chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=int(row.prompt))
        if row.prompt == "3":
            assert await chat.run(lambda: TAKEN.acquire(timeout=60) and TAKEN.acquire(timeout=60))
        if row.prompt == "5":
            raise OSError("no tool")
        chat.reward(1.0)


@pytest.fixture(scope="module")
def config(model: Path) -> LanguageModelConfig:
    rollout = RolloutConfig(engine="transformers", max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=RESPONSE_TOKENS)
    return LanguageModelConfig(model=ModelConfig(path=str(model)), rollout=rollout)


def test_pieces_are_handed_over_as_the_reply_has_them(config: LanguageModelConfig, tmp_path: Path) -> None:
    handed: dict[int, OpResult] = {}

    def hand(call: Call, piece: int, result: OpResult) -> None:
        handed[piece] = result
        TAKEN.release()

    context = WorkerContext(role="actor", rank=0, world=1, device="cpu", seed=0, folder=str(tmp_path), hand=hand)
    worker = RolloutWorker(context, config, loads=True)
    of_row = np.array([0, 0, 1, 1, 2, 2])
    call = Call(num_rows=6, row_index=np.arange(6), step=0, node="actor.run_episodes", line="", seed=0)
    batch = prompts(TEXTS)
    played = replace(call, pieces=Pieces(ticket="x", of_row=of_row))
    result = worker.run_episodes(batch, played, environment=Waits(), n=2)
    assert list(handed) in ([0, 2, 1], [2, 0, 1]) and result.parent is not None, "the slow one last"
    for piece, part in handed.items():
        rows = np.flatnonzero(of_row[result.parent] == piece)
        assert part.parent is not None and part.parent.tolist() == result.parent[rows].tolist()
        assert part.tokens is not None and result.tokens is not None and (part.tokens == result.tokens[rows]).all()
        assert {
            name: column.rows() for name, column in part.columns.items() if column.text or column.offsets is None
        } == {
            name: column.take(rows).rows()
            for name, column in result.columns.items()
            if column.text or column.offsets is None
        }
        for name in ("prompt_ids", "response_ids", "rollout_log_probs"):
            mine, whole = part.columns[name], result.columns[name].take(rows)
            assert np.array_equal(mine.values, whole.values) and np.array_equal(mine.offsets, whole.offsets)
    handed.clear()
    worker.run_episodes(batch, replace(played, wanted=1), environment=Waits(), n=1, groups=1)
    assert not handed, "which groups are the first is known when all are over"


def test_who_asks_what_was_handed_over_waits_until_there_is_something_or_the_call_is_over() -> None:
    handing, reply = Handing(), object()
    assert handing.take("a", 0.01) == [], "not begun"
    handing.begin("a")
    threading.Timer(0.05, handing.give, ("a", 2, reply)).start()
    assert handing.take("a", 30.0) == [(2, reply)]
    threading.Timer(0.05, handing.end).start()
    assert handing.take("a", 30.0) == [] == handing.take("a", 30.0), "over"
    handing.begin("a")  # it was interrupted, and another call runs while its episodes go on
    handing.begin("b")
    handing.give("a", 1, reply)  # type: ignore[arg-type]
    assert handing.take("b", 0.01) == [], "it is none of b's"
    handing.begin("a")
    assert handing.take("a", 0.01) == [(1, reply)]
    began = time.monotonic()
    assert handing.take("a", 0.2) == [] and time.monotonic() - began >= 0.2, "it is under way: who asks waits"
    handing.forget()
    handing.give("a", 3, reply)  # type: ignore[arg-type]
    assert handing.take("a", 0.01) == [], "given up"
