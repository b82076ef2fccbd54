"""Ranks without rows: every op of every worker, with no row at all and with one, on 2 and 4 ranks of every engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_dist.algorithms.outputs import Head
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, LanguageModelConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.dispatch import Mesh
from rlhf_dist.environments import Chat, Environment, Row
from rlhf_dist.prompt_template import Template
from rlhf_dist.reshard.groups import colocated_axes
from rlhf_dist.roles import Actor, Critic, Reference, Reward, RewardModel, ops_of
from rlhf_dist.wire import Call, OpResult, WorkerContext
from tests.engines.losses import ScoreLoss, TokenLoss, ValueLoss
from tests.engines.world import World
from tests.tiny import save_llama

pytestmark = pytest.mark.slow

ENGINES = {
    "2 ranks, fsdp and vllm": (2, {"name": "fsdp"}, {"engine": "vllm"}),
    "2 ranks, deepspeed and transformers": (2, {"name": "deepspeed", "zero_stage": 2}, {"engine": "transformers"}),
    "4 ranks, deepspeed and vllm, two copies": (4, {"name": "deepspeed"}, {"engine": "vllm", "tensor_parallel": 2}),
    "4 ranks, fsdp over tokens and layers, transformers": (
        4, {"name": "fsdp", "tensor_parallel": 2, "sequence_parallel": 2}, {"engine": "transformers"},
    ),
    "4 ranks, fsdp and transformers": (4, {"name": "fsdp", "packing": False}, {"engine": "transformers"}),
}  # fmt: skip
ROW = {
    "group_id": [100],
    "prompt": ["1+1="],
    "answer": ["2"],
    "response": ["2"],
    "prompt_ids": Column.ragged([[5, 14, 5, 18]], dtype=np.int32),
    "response_ids": Column.ragged([[6, 2]], dtype=np.int32),
    "response_mask": Column.ragged([[1, 1]], dtype=np.uint8),
    "advantages": Column.ragged([[0.5, -0.25]], dtype=np.float32),
    "returns": Column.ragged([[0.5, 0.25]], dtype=np.float32),
    "label": Column.dense([1], dtype=np.int8),
}


class OneTurn(Environment):
    """Says the prompt, and takes whatever comes."""

    async def episode(self, chat: Chat, row: Row) -> None:
        chat.say(row.prompt)
        await chat.generate(max_tokens=2)
        chat.reward(1.0)


SETTINGS: dict[str, dict[str, Any]] = {
    "generate_sequences": {"n": 2},
    "run_episodes": {"environment": OneTurn()},
    "encode": {"template": Template("{prompt}"), "decode": {}, "response": None},
    "compute_top_k": {"k": 2, "prefix": "top"},
    "compute_heads": {"names": ("quality",)},
}
Answer = tuple[str, dict[str, str], int]
"""Op, its columns with their types, its rows."""


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    worlds: dict[int, World] = {}
    yield worlds
    for world in worlds.values():
        world.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=128, kv_heads=4)


@pytest.mark.parametrize("case", ENGINES)
def test_every_op_works_on_ranks_without_rows(worlds: dict[int, World], folder: Path, case: str) -> None:
    ranks, engine, rollout = ENGINES[case]
    world = worlds.get(ranks) or worlds.setdefault(ranks, World(ranks))
    world.run(build_trainers, str(folder), engine, rollout)  # in parts: a call to a world is bounded
    world.run(build_actor)
    nothing, one = world.run(every_op, 0), world.run(every_op, 1)
    world.run(close)
    called = {op.split(".")[1] for op, _, _ in nothing[0]}
    refused = {"run_episodes"} if rollout.get("tensor_parallel", 1) > 1 else set()
    refused |= {"compute_attention"} if _no_split(engine) else set()
    for interface in (Actor, Critic, Reference, RewardModel, Reward):
        assert set(ops_of(interface)) - refused <= called, "an op that this test does not know"
    for answers in (nothing, one):
        for kinds in zip(*answers, strict=True):
            assert len({(op, tuple(columns.items())) for op, columns, _ in kinds}) == 1, f"ranks differ: {kinds}"
    assert all(rows == 0 for answer in nothing for _, _, rows in answer)
    for op, _, most in max(zip(*one, strict=True), key=len):
        assert most in (0, 1, 2), op
    for kinds in zip(*one, strict=True):
        assert {rows for _, _, rows in kinds} == {0, 2 if "generate" in kinds[0][0] else 1} or _no_split(engine)


def _no_split(engine: dict[str, Any]) -> bool:
    """Whether all ranks train on the same rows."""
    return bool(engine.get("tensor_parallel", 1) * engine.get("sequence_parallel", 1) == 4)


_config: LanguageModelConfig
_workers: dict[str, Any] = {}


def _context() -> WorkerContext:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    return WorkerContext(role="actor", rank=rank, world=world, device="cpu", seed=0, heads=(Head(name="quality"),))


def build_trainers(folder: str, engine: dict[str, Any], rollout: dict[str, Any]) -> None:
    """On a rank: all roles that do not generate."""
    global _config
    from workers.language_model import LanguageModelWorker
    from workers.value_model import ValueModelWorker

    _config = LanguageModelConfig(
        model=ModelConfig(path=folder),
        engine=EngineConfig(**engine),
        rollout=RolloutConfig(max_prompt_tokens=16, max_response_tokens=4, kv_cache_bytes=16 << 20, **rollout),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    shared: Any = (_config.model, _config.engine, _config.optimizer)
    _workers["critic"] = ValueModelWorker(_context(), *shared)
    _workers["reward_model"] = ValueModelWorker(_context(), *shared)
    _workers["reference"] = LanguageModelWorker(_context(), _config, trained=False, generates=False)


def build_actor() -> None:
    """On a rank: the actor, after all others as in a pool whose processes they share."""
    from workers.language_model import LanguageModelWorker

    _workers["actor"] = LanguageModelWorker(_context(), _config)


def close() -> None:
    _workers.pop("actor").close()
    _workers.clear()


def every_op(rows: int) -> list[Answer]:
    """On a rank: all ops in turn, with no row at all, or with one, which the last part has."""
    context, workers = _context(), _workers
    split = _config.engine.tensor_parallel * _config.engine.sequence_parallel
    axes = {"sp": _config.engine.sequence_parallel, "tp": _config.engine.tensor_parallel}
    meshes = {
        "train": Mesh({"dp": context.world // split, **axes}),
        "rollout": Mesh(colocated_axes(_config, (0,) * context.world)),
    }
    answers: list[Answer] = []
    workers["actor"].reshard(Batch({}, 0), _call(0))
    interfaces = {"actor": Actor, "critic": Critic, "reward_model": RewardModel, "reference": Reference}
    losses: dict[str, Any] = {"actor": TokenLoss(), "critic": ValueLoss(), "reward_model": ScoreLoss()}
    for role, interface in interfaces.items():
        for name, spec in ops_of(interface).items():
            if role not in losses and (spec.weights_written or spec.mesh == "rollout"):
                continue  # It is frozen, and does not generate here.
            if name == "run_episodes" and _config.rollout.tensor_parallel > 1:
                continue  # Refused before anything starts.
            if name == "compute_attention" and split > 1:
                continue  # As well.
            mesh = meshes[spec.mesh]
            last = spec.dispatch.part_of(mesh, context.rank) == spec.dispatch.parts(mesh) - 1
            batch = Batch.of(**ROW) if rows and last else Batch.of(**ROW).take([])
            settings = SETTINGS.get(name, {})
            if spec.weights_written:
                settings = {"loss": losses[role], "mini_batches": 1, "epochs": 1}
            result = getattr(workers[role], name)(batch, _call(batch.num_rows), **settings)
            assert isinstance(result, OpResult)
            kinds = {column: str(values.values.dtype) for column, values in result.columns.items()}
            answers.append((f"{role}.{name}", kinds, result.columns.num_rows))
    return answers


def _call(rows: int) -> Call:
    return Call(
        step=0, node="n", line="l", seed=0, num_rows=rows,
        row_index=np.arange(rows), mini_batch=np.zeros(rows, np.int64),
    )  # fmt: skip
