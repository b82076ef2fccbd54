"""From an engine's name in the config to the engine. Imports only what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.wire import WorkerContext
from workers.engines.files.load import Head
from workers.engines.generation.interface import GenerationEngine
from workers.engines.training.interface import TrainingEngine
from workers.memory.arbiter import arbiter_of

if TYPE_CHECKING:
    from workers.engines.training.deepspeed import DeepSpeedEngine
    from workers.engines.training.fsdp import FsdpEngine


def new_training_engine(
    model: ModelConfig, engine: EngineConfig, optimizer: OptimizerConfig | None, head: Head, context: WorkerContext
) -> TrainingEngine:
    """The engine `engine.name` names; `optimizer` None for a frozen model. Raises ValueError for another name."""
    kind: type[FsdpEngine] | type[DeepSpeedEngine]
    if engine.name == "fsdp":
        from workers.engines.training.fsdp import FsdpEngine as kind
    elif engine.name == "deepspeed":
        from workers.engines.training.deepspeed import DeepSpeedEngine as kind
    else:
        raise ValueError(f"engine.name must be fsdp or deepspeed, got {engine.name!r}")
    context.phase(f"{engine.name} engine, reading {Path(model.path).name}")
    arbiter_of(context).make_room()
    device = torch.device(context.device)
    own: dict[str, Any] = {"heads": context.heads}
    if context.sums_weights and engine.name == "fsdp":
        own["masters"] = True
    built = kind(model=model, engine=engine, optimizer=optimizer, head=head, device=device, seed=context.seed, **own)
    built.teacher_folders = context.frozen_folders
    return built


def new_generation_engine(
    model_path: str, rollout: RolloutConfig, context: WorkerContext, copies: Sequence[Sequence[int]]
) -> GenerationEngine:
    """The engine `rollout.engine` names. copies: ranks of the process group that share a copy of the model, by
    tensor-parallel rank.

    Raises ValueError for another name.
    """
    context.phase(f"{rollout.engine} engine for generation")
    arbiter_of(context).make_room()
    device = torch.device(context.device)
    if rollout.engine == "vllm":
        from workers.engines.generation.vllm import VllmEngine

        return VllmEngine(
            model_path=model_path,
            rollout=rollout,
            rank=context.group_rank,
            world=context.group_world,
            device=device,
            copies=copies,
        )
    if rollout.engine == "transformers":
        from workers.engines.generation.transformers import TransformersEngine

        return TransformersEngine(
            model_path=model_path, rollout=rollout, rank=context.group_rank, world=context.group_world, device=device
        )
    raise ValueError(f"rollout.engine must be vllm or transformers, got {rollout.engine!r}")
