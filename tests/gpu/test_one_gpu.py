"""What there is on a GPU only: NCCL between ranks that share it, DeepSpeed's, turns with vLLM, the doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.losses import TokenLoss
from tests.engines.test_exact import BATCHES, plain_training
from tests.engines.world import World
from tests.gpu import rank
from tests.gpu.devices import ON_GPU
from tests.gpu.test_devices import assert_close
from tests.tiny import save_llama

pytestmark = ON_GPU


@pytest.mark.parametrize("link", ["cuda nccl", "cuda through the host"])
def test_four_ranks_exchange_weights_over_nccl_and_through_the_host(link: str) -> None:
    """Ranks on one GPU go through host memory in earnest; there NCCL is made to do it."""
    from tests.reshard.rank import round_trips as through_the_host

    world = World(4, "cuda:0")
    try:
        trips = rank.round_trips if "nccl" in link else through_the_host
        assert world.run(trips, 0, 60, link) == [[], [], [], []]
        wanted = "ProcessGroupNCCL" if "nccl" in link else "ProcessGroupGloo"
        assert world.run(rank.backend_of, link) == [wanted] * 4
    finally:
        world.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_makes_the_steps_of_plain_training(folder: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    wanted, _ = plain_training(folder, TokenLoss(), BATCHES)
    world = World(1, "cuda:0")
    try:
        [found] = world.run(rank.train, folder, "cuda:0", BATCHES, {"name": "deepspeed", "zero_stage": stage})
    finally:
        world.close()
    assert_close(found, wanted, 1e-4)


def test_turns_with_vllm_take_the_bytes_they_say(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    world = World(1, "cuda:0")
    try:
        [found] = world.run(_turns, save_llama(tmp_path, hidden=1024, layers=8))
    finally:
        world.close()
    # The driver's bytes, in an update that leaves no room for anything else and in all phases together.
    assert found["device_bytes_update"] <= 1.1 * found["predicted_bytes_update"] + (64 << 20), found
    assert max(found[f"device_bytes_{use}"] for use in ("update", "sync", "generate")) <= 1.1 * found["budget"], found
    assert found["moved_bytes_per_s_update"] > 5e9, "pinned buffers, that are there already"


def _turns(folder: Path) -> dict[str, Any]:
    from tests.generation import rank as generation_rank
    from tests.generation import trainer
    from tests.generation.test_engines import SAMPLING, SEEDS, SHORT

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


def test_the_doctor_finds_nothing_that_fails(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "controller.commands.cli", "doctor", "--format", "json", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--limit", "240"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    told = json.loads(done.stdout)
    assert [check for check in told["checks"] if check["state"] == "failed"] == [], done.stderr[-2000:]
    states = {check["name"]: check["state"] for check in told["checks"]}
    assert states["nccl"] == "ok" and states["devices"] == "ok", states
