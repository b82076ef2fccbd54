"""From every training engine to vLLM: in the same processes, and across two worlds that share nothing but a port."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engines.world import World
from tests.generation import rank, trainer
from tests.generation.test_engines import SAMPLING, SEEDS, SHORT
from tests.reshard import strict
from tests.tiny import save_llama

SOURCES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp-tp2": {"tensor_parallel": 2},
    "fsdp-sp2": {"sequence_parallel": 2},
    "fsdp-replicas": {"replicas": 2},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), hidden=128)


@pytest.fixture(scope="module")
def generating(folder: Path) -> Iterator[World]:
    """Two ranks that generate together: one copy of the model, tensor parallel."""
    world = World(2)
    world.run(_open_vllm, folder)
    yield world
    world.close()


def _open_vllm(folder: Path) -> None:
    rank.open_engine("vllm", folder, tensor_parallel=2)


def assert_follows(generating: World, training: World) -> None:
    """What is generated is drawn from the policy that is trained."""
    answers = generating.run(rank.generate, SHORT, SAMPLING, SEEDS)
    assert answers[0] == answers[1]
    assert max(training.run(trainer.trainer_difference, SHORT, answers[0], SAMPLING.n)) < 2e-4


@pytest.fixture(params=["gloo", "strict"])
def link(request: pytest.FixtureRequest, generating: World) -> Iterator[str]:
    """Links opened in the test: gloo's, or one that keeps NCCL's rules."""
    generating.run(strict.use, request.param == "strict")
    yield request.param
    generating.run(strict.use, False)


@pytest.mark.parametrize("name", SOURCES)
def test_a_colocated_sync_from_every_engine(generating: World, folder: Path, name: str, link: str) -> None:
    world = generating
    world.run(trainer.open_trainer, folder, SOURCES[name])
    assert world.run(trainer.colocate) == [None, None]
    for version in (0, 1):
        answers = world.run(trainer.run, version > 0)
        assert [answer["version"] for answer in answers] == [version] * 2
        assert [answer["bytes"] for answer in answers] == world.run(trainer.planned_bytes)
        assert_follows(world, world)
        world.run(trainer.step)
    old = world.run(rank.generate, SHORT, SAMPLING, SEEDS)[0]
    assert max(world.run(trainer.trainer_difference, SHORT, old, SAMPLING.n)) > 1e-3  # the step changed the policy


def test_adapters_travel_alone_and_generation_follows_them(generating: World, folder: Path, link: str) -> None:
    world = generating
    world.run(trainer.open_trainer, folder, {"lora": trainer.LORA})
    assert world.run(trainer.colocate) == [None, None]
    whole, [alone, _] = world.run(trainer.planned_bytes), world.run(trainer.adapter_bytes)
    for version in (0, 1, 2):
        moved = [answer["bytes"] for answer in world.run(trainer.run, version > 0)]
        # Each rank trains half of the adapters' rows and lacks the other half.
        assert moved == [(0 if version else whole[k]) + alone // 2 for k in range(2)]
        assert_follows(world, world)
        answers = world.run(rank.generate, SHORT, SAMPLING, SEEDS)[0]
        from_base = max(world.run(trainer.trainer_difference, SHORT, answers, SAMPLING.n, True))
        assert from_base > 1e-3 if version else from_base < 2e-4
        world.run(trainer.step)


@pytest.mark.parametrize("engine", [{}, {"lora": trainer.LORA}], ids=["whole", "adapters"])
@pytest.mark.parametrize("planned", [True, False], ids=["sync next", "no plan"])
def test_what_is_asleep_does_not_generate(
    generating: World, folder: Path, planned: bool, engine: dict[str, Any]
) -> None:
    """Weights that a sync overwrites before they are used are given up; all others are kept, adapters' bases too."""
    order = ("actor.generate", "actor.update", "actor.sync") if planned else ()
    generating.run(trainer.open_trainer, folder, engine)
    assert generating.run(trainer.colocate, "cpu", order) == [None, None]
    for found in generating.run(trainer.take_turns, SHORT, SEEDS):
        assert found["held"] == found["predicted"], "nothing but what the update needs"
        assert "needs an engine that is awake" in found["asleep"]
        assert found["dropped"] == (planned and not engine)
        assert isinstance(found["first"], list) and (found["first"] == found["again"]) == (not found["dropped"])
        sizes = found["sizes"]
        kept = 0 if found["dropped"] else sizes["actor.rollout weights"]
        assert found["moved"] == kept + sizes["actor parameters"] + sizes["actor optimizer"]
    if planned and not engine:
        assert_follows(generating, generating)


# --- two worlds --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def training() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


def test_the_canary_tells_models_apart_whose_weights_are_the_same(
    training: World, folder: Path, tmp_path: Path
) -> None:
    """Every checksum matches: only what the model does with its weights is another."""
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.3}))
    training.run(trainer.open_trainer, folder, {})
    training.run(rank.open_engine, "transformers", other)
    assert training.run(trainer.colocate) == [None, None]
    for answer in training.run(trainer.run, False):
        assert answer["error"] == "CanaryDied" and "log-probs of the canary's tokens must be" in answer["says"]
    for refused in training.run(rank.generate, SHORT, SAMPLING, SEEDS):
        assert "StaleWeights" in refused and "canary" in refused


def both(training: World, generating: World, function: Any, *args: Any, late: int = -1) -> tuple[list[Any], list[Any]]:
    """The same call on both worlds at the same time; `late`: the generation rank that does not come."""
    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(training.run, function, *args)
        received = pool.submit(generating.run, function, *args, *(() if late < 0 else (late,)))
        return sent.result(), received.result()


def join(training: World, generating: World, timeout_s: float = 20.0, traces: bool = True) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both(training, generating, trainer.connect, port, 2, 2, timeout_s, traces)


def test_across_two_worlds(training: World, generating: World, folder: Path, link: str) -> None:
    """Last in this file: afterwards the engine that generates says that it cannot be traced."""
    receiving = generating
    training.run(strict.use, link == "strict")
    generating.run(trainer.trace_again)
    receiving.run(trainer.close_trainer)
    for settings in ({"tensor_parallel": 2}, {"lora": trainer.LORA}):
        training.run(trainer.open_trainer, folder, settings)
        join(training, receiving)
        for version in (0, 1):
            sent, received = both(training, receiving, trainer.run, version > 0)
            assert [answer["version"] for answer in sent + received] == [version] * 4
            assert [answer["bytes"] for answer in sent] == [0, 0] and all(a["bytes"] > 0 for a in received)
            assert_follows(receiving, training)
            training.run(trainer.step)

    # One generation rank comes too late: everybody hears of it in time, nothing half-updated is served, a retry works.
    join(training, receiving, 5.0)
    assert all("error" not in answer for answer in sum(both(training, receiving, trainer.run, False), []))
    training.run(trainer.step)
    sent, received = both(training, receiving, trainer.run, True, late=1)
    for answer in [*sent, received[0]]:
        assert answer["error"] == "SyncStopped" and "waiting for rank 3: not there within 5.0 s" in answer["says"]
    assert received[1]["error"] == "SyncStopped"
    for refused in receiving.run(rank.generate, SHORT, SAMPLING, SEEDS):
        assert "StaleWeights" in refused and "the last weight sync did not complete" in refused
    sent, received = both(training, receiving, trainer.run, True)
    assert [answer["version"] for answer in sent + received] == [3] * 4
    assert_follows(receiving, training)

    # A model that cannot be traced takes whole tensors.
    join(training, receiving, traces=False)
    training.run(trainer.step)
    sent, received = both(training, receiving, trainer.run, True)
    assert {answer["fallback"] for answer in sent + received} == {"this test wants whole tensors"}
    assert_follows(receiving, training)
