"""Episodes that new weights interrupt: they go on where they were, and every token says which weights drew it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from rlhf_dist.batch import Batch
from rlhf_dist.config import LanguageModelConfig, ModelConfig, RolloutConfig
from rlhf_dist.environments import Chat, Environment, Row
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.testing.tiny_model import save_llama
from rlhf_dist.wire import Call, OpResult, WorkerContext
from tests.episodes.conftest import PROMPT_TOKENS, RESPONSE_TOKENS, prompts
from workers.rollout import RolloutWorker


class TwoTurns(Environment):
    """A long turn and a short one; what the tool says is of the row."""

    async def episode(self, chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=12)
        chat.say(await chat.run(str.upper, " so?"))
        await chat.generate(max_tokens=4)
        chat.reward(1.0)


def interrupted_at(worker: RolloutWorker, step: int, batch: Batch, call: Call) -> OpResult:
    """What the worker answers when it is asked to stop after so many tokens."""
    engine, drawn = worker.engine, 0
    draw = engine.step

    def counted() -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == step:
            worker.interrupt()
        return draw()

    engine.step = counted  # type: ignore[method-assign]
    try:
        return worker.run_episodes(batch, call, environment=TwoTurns(), n=2)
    finally:
        del engine.step  # type: ignore[method-assign]


def log_probs(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[T - 1] of each token but the first."""
    with torch.no_grad():
        said = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].log_softmax(-1)
    found: NDArray[np.float32] = said.gather(1, torch.from_numpy(ids)[1:, None])[:, 0].numpy()
    return found


def test_episodes_go_on_with_new_weights_and_each_token_says_which_drew_it(model: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(engine="transformers", max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=RESPONSE_TOKENS)
    config = LanguageModelConfig(model=ModelConfig(path=str(model)), rollout=rollout)
    context = WorkerContext(role="actor", rank=0, world=1, device="cpu", seed=0, folder=str(tmp_path))
    worker = RolloutWorker(context, config, max_staleness=1, interrupts=True, loads=True)
    batch = prompts(["2+2=", "1+10="])
    call = Call(num_rows=2, row_index=np.arange(2), step=1, node="actor.run_episodes", line="", seed=0)
    folders = (model, save_llama(tmp_path / "new", hidden=64, seed=7))
    old, new = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]

    assert interrupted_at(worker, 5, batch, call).interrupted
    weights = dict(new.state_dict())
    sums = {name: full_checksum(tensor) for name, tensor in weights.items()}
    worker.engine.receive_weights(1, iter([list(weights.items())]), sums)
    worker.weights_step = 1
    result = worker.run_episodes(batch, call, environment=TwoTurns(), n=2)
    assert not result.interrupted and result.parent is not None and result.parent.tolist() == [0, 0, 1, 1]
    old_tokens: list[int] = []
    for row in range(4):
        columns = {name: column.row(row) for name, column in result.columns.items()}
        versions, drawn = columns["policy_version"], columns["response_mask"] == 1
        old_tokens.append(int((versions == 0).sum()))  # not all had begun at the first of the five
        assert (np.diff(versions) >= 0).all() and versions[-1] == 1 and old_tokens[-1] <= 5
        said = columns["turn"].tolist().index(-1)
        assert columns["turn"][:said].tolist() == [0] * said and said > old_tokens[-1], "it was one turn"
        ids = np.concatenate([columns["prompt_ids"], columns["response_ids"]]).astype(np.int64)
        by = [log_probs(one, ids)[-len(versions) :] for one in (old, new)]
        wanted = np.where(versions == 0, by[0], by[1])
        assert np.abs(wanted - columns["rollout_log_probs"])[drawn].max() < 1e-4
        assert np.abs(by[0] - by[1])[drawn].max() > 1e-2, "the weights differ"
    metrics = {name: one.value for name, one in result.metrics.items()}
    begun = sum(count > 0 for count in old_tokens)
    assert max(old_tokens) == 5 and metrics["continued"] == begun
    assert metrics["staleness"] == begun / 4, "a row is as old as its first token"

    later = Call(num_rows=2, row_index=np.arange(2), step=2, node="actor.run_episodes", line="", seed=0)
    assert interrupted_at(worker, 5, batch, later).interrupted
    worker.abandon()
    assert not [one for one in threading.enumerate() if one.name == "episodes"]
    again = worker.run_episodes(batch, later, environment=TwoTurns(), n=2)
    assert not again.interrupted and set(again.columns["policy_version"].values.tolist()) == {1}
