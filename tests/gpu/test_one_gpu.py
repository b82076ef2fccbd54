"""Two processes on one GPU, and training and generation that take turns on it. Needs a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.world import World
from tests.generation import rank as generation_rank
from tests.generation import trainer
from tests.generation.test_engines import SAMPLING, SEEDS, SHORT
from tests.reshard import rank
from tests.tiny import save_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_round_trips_between_processes_of_one_gpu() -> None:
    world = World(4)
    try:
        assert world.run(rank.round_trips, 0, 60, "cuda") == [[], [], [], []]
    finally:
        world.close()


def test_turns_free_what_they_say(tmp_path: Path) -> None:
    world = World(1, "cuda")
    try:
        folder = save_llama(tmp_path, hidden=1024, layers=8)
        [found] = world.run(_turns, folder)
    finally:
        world.close()
    # The driver's bytes, in an update that leaves no room for anything else and in all phases together.
    assert found["device_bytes_update"] <= 1.1 * found["predicted_bytes_update"] + (64 << 20), found
    assert max(found[f"device_bytes_{use}"] for use in ("update", "sync", "generate")) <= 1.1 * found["budget"], found
    assert found["moved_bytes_per_s_update"] > 5e9, "pinned buffers, that are there already"


def _turns(folder: Path) -> dict[str, Any]:
    trainer.open_trainer(folder, {}, "cuda:0")
    generation_rank.open_engine("vllm", folder, device="cuda:0")
    trainer.colocate("cuda:0", ("actor.generate", "actor.update", "actor.sync"))
    memory = trainer._memory
    for _ in range(2):
        memory.report()
        trainer.step()
        trainer.run(True)
        memory.turn("actor.generate")
        assert not isinstance(generation_rank.generate(SHORT, SAMPLING, SEEDS), str)
    return {name: metric.value for name, metric in memory.report().items()} | {"budget": memory.ledger.budget}
