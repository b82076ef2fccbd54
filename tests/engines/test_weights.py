"""Weights that go from engine to engine: bit for bit between any two layouts, in one pool and between two; mixtures,
merges and half-steps as plain torch computes them. About 20 s on two quiet cores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.reshard.layout import LayoutError
from rlhf_dist.wire import Bridge, Call, WorkerContext
from tests.engines.losses import RowLoss, make_batch
from tests.engines.test_exact import plain_loss
from tests.engines.test_state import ENGINES, my_rows, same, weights_of
from tests.engines.world import World
from tests.tiny import save_llama

CALL = Call(step=0, node="a.copy_from", line="mine.py:1", seed=0, num_rows=0)
NONE: Any = None  # the rows of a node without any
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3, weight_decay=0.0, grad_clip=1e9)
TEMPERATURE = 0.7  # of plain_loss

_kept: dict[str, Any] = {}
"""Workers of this rank, between two calls."""


def new_role(role: str, folder: Path, trained: bool, seed: int = 0, peers: Any = None, **engine: Any) -> Any:
    from workers.build_engines import new_training_engine
    from workers.trained_role import TrainedRole

    context = WorkerContext(
        role=role,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device="cpu",
        seed=seed,
        sums_weights=not trained,
        peers=peers if peers is not None else {},
        sync_timeout_s=60.0,
    )
    model = ModelConfig(path=str(folder), init="random" if seed else "pretrained")
    optimizer = OPTIMIZER if trained else None
    return TrainedRole(
        context, new_training_engine(model, EngineConfig(**engine), optimizer, "policy", context), optimizer
    )


def log_probs(role: Any, settings: dict[str, Any]) -> np.ndarray:
    return np.asarray(role.engine.forward(my_rows(make_batch(), settings), ["log_probs"])["log_probs"].values)


def step(role: Any, settings: dict[str, Any], seed: int = 0) -> None:
    role.engine.step(my_rows(make_batch(seed), settings), RowLoss(), TEMPERATURE)


def flow(folder: Path, settings: dict[str, Any], target_settings: dict[str, Any], trained: bool) -> dict[str, Any]:
    peers: dict[str, Any] = {}
    peers["a"] = new_role("a", folder, True, peers=peers, **settings)
    target = peers["b"] = new_role("b", folder, trained, seed=3, peers=peers, **target_settings)
    if trained:
        step(target, target_settings)  # what is computed with is gathered somewhere, and Adam has moments
    target.connect_weights("a", "b", None, 2)
    found: dict[str, Any] = {"before": weights_of(target.engine)}
    for number in range(3):
        step(peers["a"], settings, number)
        target.mix_from(NONE, CALL, source="a", tau=0.25)
        found[f"a {number}"], found[f"mixed {number}"] = weights_of(peers["a"].engine), weights_of(target.engine)
    target.merge_from(NONE, CALL, sources=(("a", 2.0), ("b", -0.5)))
    found["merged"] = weights_of(target.engine)
    target.copy_from(NONE, CALL, source="a")
    found |= {"copied": weights_of(target.engine), "version": target.engine.version}
    # On the same rows, where the two engines give a rank the same.
    alike = settings.get("tensor_parallel", 1) == target_settings.get("tensor_parallel", 1)
    if alike:
        found["says"] = log_probs(target, target_settings), log_probs(peers["a"], settings)
    if trained:
        step(target, target_settings, 5)
        found["trained on"] = weights_of(target.engine)
    return found


@pytest.mark.parametrize(
    ("source", "target", "trained"),
    [
        ("fsdp", "deepspeed 2", True),
        ("fsdp", "deepspeed 1", False),
        ("deepspeed 3", "fsdp replicas", False),
        ("fsdp tensor pieces", "deepspeed 3", True),
    ],
)
def test_weights_go_between_any_two_layouts(
    world2: World, llama: Path, source: str, target: str, trained: bool
) -> None:
    for found in world2.run(flow, llama, ENGINES[source], ENGINES[target], trained):
        wanted = found["before"]
        for number in range(3):
            a = found[f"a {number}"]
            wanted = {name: np.float32(0.75) * w + np.float32(0.25) * a[name] for name, w in wanted.items()}
            same(found[f"mixed {number}"], wanted, 1e-6)
        same(found["merged"], {name: 2 * a[name] - 0.5 * w for name, w in wanted.items()}, 1e-6)
        same(found["copied"], a)
        assert found["version"] == int(trained), "what is written is no optimizer step"
        if "says" in found:
            np.testing.assert_allclose(*found["says"], atol=1e-5, err_msg="it computes with what was copied")
        if trained:
            moved = [not np.array_equal(w, a[name]) for name, w in found["trained on"].items()]
            assert all(moved), "and goes on from there"


# --- two pools --------------------------------------------------------------------------------------
def start(role: str, folder: Path, trained: bool, seed: int, settings: dict[str, Any]) -> tuple[str, int]:
    from workers.network import reserve_port

    _kept[role] = new_role(role, folder, trained, seed=seed, **settings)
    return "127.0.0.1", reserve_port("127.0.0.1")


def connect(role: str, bridge: Bridge) -> str | None:
    try:
        _kept[role].connect_weights("a", "b", bridge, 0)
    except LayoutError as error:
        return str(error)
    return None


def give(settings: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    for number in range(steps):
        step(_kept["a"], settings, number)
    _kept["a"].give_weights(NONE, CALL, target="b")
    return weights_of(_kept["a"].engine)


def take() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    result = _kept["b"].copy_from(NONE, CALL, source="a")
    return weights_of(_kept["b"].engine), {name: mean.value for name, mean in result.metrics.items()}


def bridge_of(worlds: tuple[World, World], at: tuple[str, int]) -> Bridge:
    return Bridge(
        address=at[0], port=at[1], senders=len(worlds[0]._pipes), receivers=len(worlds[1]._pipes), timeout_s=60
    )


def test_a_copy_between_two_pools_of_different_sizes_and_engines_is_bit_exact(
    world1: World, world2: World, llama: Path, tmp_path: Path
) -> None:
    fsdp, deepspeed = ENGINES["fsdp"], ENGINES["deepspeed 3"]
    with ThreadPoolExecutor(2) as threads:

        def both(*calls: Any) -> Any:
            futures = [threads.submit(world.run, *call) for world, call in zip((world2, world1), calls, strict=True)]
            return [future.result() for future in futures]

        (at, _), _ = both((start, "a", llama, True, 0, fsdp), (start, "b", llama, True, 4, deepspeed))
        bridge = bridge_of((world2, world1), at)
        assert both((connect, "a", bridge), (connect, "b", bridge)) == [[None, None], [None]]
        for steps in (1, 2):
            sent, taken = both((give, fsdp, steps), (take,))
            same(taken[0][0], sent[0])
            assert taken[0][1]["copy_bytes"] == sum(weight.nbytes for weight in sent[0].values()), "each arrives once"
        narrow = save_llama(tmp_path / "narrow", hidden=16)
        (at, _), _ = both((start, "a", llama, True, 0, fsdp), (start, "b", narrow, False, 0, {}))
        bridge = bridge_of((world2, world1), at)
        refused = both((connect, "a", bridge), (connect, "b", bridge))
        assert all("must have one shape and dtype" in str(text) for texts in refused for text in texts)


# --- half-steps ---------------------------------------------------------------------------------------
def half_steps(folder: Path, settings: dict[str, Any], rounds: int) -> tuple[dict[str, np.ndarray], int]:
    role = new_role("a", folder, True, **settings)
    for number in range(rounds):
        role.save_weights(NONE, CALL, name="anchor", optimizer=True)
        step(role, settings, 2 * number)
        role.restore_weights(NONE, CALL, name="anchor")
        step(role, settings, 2 * number + 1)
    return weights_of(role.engine), role.engine.version


def plain_half_steps(folder: Path, rounds: int) -> dict[str, np.ndarray]:
    """The same by plain torch: the half-step changes nothing but what is drawn from it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.0
    )
    for number in range(rounds):
        for at, back in ((2 * number, True), (2 * number + 1, False)):
            anchor = {name: w.clone() for name, w in model.state_dict().items()}
            moments = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state_dict()["state"].items()}
            optimizer.zero_grad()
            plain_loss(RowLoss(), model, make_batch(at)).backward()
            optimizer.step()
            if back:
                model.load_state_dict(anchor)
                optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed 3"])
def test_half_steps_are_those_of_plain_torch(world2: World, llama: Path, engine: str) -> None:
    for weights, version in world2.run(half_steps, llama, ENGINES[engine], 2):
        assert version == 2, "steps that were taken back do not count"
        same(weights, plain_half_steps(llama, 2), 1e-4)
