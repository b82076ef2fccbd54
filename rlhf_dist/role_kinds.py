"""What a kind of role means, in one record each: its settings, its worker and what that is made of, its meshes.

    interface (roles.py) ──> base ──> RoleKind        LanguageModel   policy head, generation engine
                                                      ValueModel      value head
                                                      Reward          value head, or a function on CPU processes
                                                      Function        CPU processes

What differs between two roles of one kind (which learns, which generates) is a fact of the graph
(`dataflow/facts.py`). A kind of the user's own derives from a base, and may have ops, settings and a worker of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_dist.config import FunctionConfig, LanguageModelConfig, RewardConfig, RolloutConfig, ValueModelConfig
from rlhf_dist.dataflow.facts import nodes_on_own_rows, speaker_of
from rlhf_dist.dispatch import Mesh
from rlhf_dist.placement.roles import only_generates, rollout_of
from rlhf_dist.reshard.groups import colocated_axes, consecutive_axes
from rlhf_dist.roles import BASES, Function, LanguageModel, Reward, ValueModel, base_of
from rlhf_dist.typed import ConfigError
from rlhf_dist.worker import check_worker

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch

RoleConfig = LanguageModelConfig | ValueModelConfig | RewardConfig | FunctionConfig
Worker = tuple[str | type, dict[str, Any]]
"""What implements a role, `package.module:Class` or a class, and what it is constructed with beside its context."""
ROLLOUT_WORKER = "workers.rollout:RolloutWorker"
ENGINES = {
    "fsdp": "workers.engines.training.fsdp",
    "deepspeed": "workers.engines.training.deepspeed",
    "vllm": "workers.engines.generation.vllm",
    "transformers": "workers.engines.generation.transformers",
}
"""Engine -> the module it is in."""


@dataclass(frozen=True, kw_only=True)
class RoleKind:
    """What all roles of one base have in common."""

    base: type
    settings: type
    """What the settings of such a role are an instance of."""
    head: Literal["policy", "value"] | None
    """Of the model; None: there is none."""
    worker_of: Callable[[Launch, str], Worker]
    """(launch, role) -> the worker on the role's own pool."""


def kind_of(interface: type) -> RoleKind:
    """The record of a kind of role. Raises ConfigError for a class that is none, or lacks a piece."""
    base = base_of(interface)
    if base is None:
        raise ConfigError(
            f"role kind {interface.__name__} must derive from {', '.join(one.__name__ for one in BASES)} or a kind of "
            f"these (rlhf_dist.roles), so that it has settings and a worker"
        )
    found = _KINDS[base]
    settings: Any = getattr(interface, "settings", None)
    if not (isinstance(settings, type) and is_dataclass(settings) and issubclass(settings, found.settings)):
        raise ConfigError(
            f"{interface.__name__}.settings must be a dataclass that derives from {found.settings.__name__} "
            f"(rlhf_dist.config), got {getattr(settings, '__name__', settings)!r}"
        )
    worker = getattr(interface, "worker", "")
    if not worker:
        raise ConfigError(
            f"{interface.__name__}.worker has no value and needs one: the class whose methods are its ops, "
            f"called with (batch, call, **settings)"
        )
    if isinstance(worker, type):
        check_worker(worker, interface)
    return found


def worker_of(launch: Launch, name: str) -> Worker:
    """The worker of a group of processes: of a role, or of `ROLE.rollout` in a pool of its own."""
    role = name.split(".")[0]
    if name != role or only_generates(launch.recipe.roles[role], launch.dataflow.facts[role]):
        return _rollout_worker(launch, role, loads=name == role)
    return kind_of(launch.recipe.roles[role]).worker_of(launch, role)


def modules_of(launch: Launch, name: str) -> tuple[str, ...]:
    """What the processes of such a group will import, to be read ahead of its building: its worker's module and
    those of its engines. A class of the user's own travels with the call."""
    role = name.split(".")[0]
    config, (worker, _) = launch.roles[role], worker_of(launch, name)
    engines = []
    if name == role and not isinstance(config, FunctionConfig) and has_training_engine(launch, role):
        engines.append(config.engine.name)
    here = launch.placed[rollout_of(role)] == launch.placed[name] if rollout_of(role) in launch.placed else name == role
    generation = generation_of(launch, role)
    if generation is not None and here:
        engines.append(generation.engine)
    own = (worker.split(":")[0],) if isinstance(worker, str) else ()
    return (*own, *(ENGINES[engine] for engine in engines if engine in ENGINES))


def meshes_of(launch: Launch, name: str, nodes: Sequence[int]) -> dict[str, Mesh]:
    """The meshes of what a group does: a pool that only trains need not have the size of one that generates.

    nodes: [world] machine of each rank.
    """
    role = name.split(".")[0]
    config, facts, size = launch.roles[role], launch.dataflow.facts[role], len(nodes)
    if name != role or only_generates(launch.recipe.roles[role], facts):
        assert isinstance(config, LanguageModelConfig), "only a language model generates"
        return {"rollout": Mesh(consecutive_axes(config, size))}
    sp, tp = config.engine.sequence_parallel, config.engine.tensor_parallel
    meshes = {"train": Mesh({"dp": size // (sp * tp), "sp": sp, "tp": tp})}
    if facts.generates and rollout_of(role) not in launch.placed:
        assert isinstance(config, LanguageModelConfig), "only a language model generates"
        meshes["rollout"] = Mesh(colocated_axes(config, nodes))
    return meshes


def generation_of(launch: Launch, role: str) -> RolloutConfig | None:
    """How a role generates; None for one that does not in this recipe."""
    config = launch.roles[role]
    if role not in launch.dataflow.generating or not isinstance(config, LanguageModelConfig):
        return None
    return config.rollout


def has_training_engine(launch: Launch, role: str) -> bool:
    """Whether processes hold the role's model for forward passes or updates."""
    facts = launch.dataflow.facts[role]
    return launch.roles[role].model is not None and not only_generates(launch.recipe.roles[role], facts)


def role_with_base(launch: Launch, role: str) -> str | None:
    """The role whose frozen base model is all that frozen `role` needs, in the same pool: one with adapters.

    None where the recipe has weights of `role` go anywhere, or change: then they are its own.
    """
    if any(node.kind == "weights" and role in (node.role, *node.senders) for node in launch.dataflow):
        return None
    facts, config = launch.dataflow.facts[role], launch.roles[role]
    if facts.trained or facts.generates or not isinstance(config, LanguageModelConfig):
        return None
    for name, other in launch.used_roles.items():
        if isinstance(other, LanguageModelConfig) and launch.dataflow.facts[name].trained:
            alike = other.model == config.model and other.engine.dtype == config.engine.dtype
            if other.engine.lora is not None and alike and launch.placed[name] == launch.placed[role]:
                return name
    return None


# --- what workers are made of ----------------------------------------------------------------------------
def _language_model(launch: Launch, role: str) -> Worker:
    config, facts = launch.roles[role], launch.dataflow.facts[role]
    assert isinstance(config, LanguageModelConfig), f"{role} is a language model"
    speaker = speaker_of(launch.dataflow, role)
    spoken = None if speaker is None else generation_of(launch, speaker)
    # What a recipe writes anew may be trained on what the weights before have drawn.
    on_policy = launch.run.placement.max_staleness == 0 and role not in launch.dataflow.written
    return _interface(launch, role).worker, {
        "config": config,
        "trained": facts.trained,
        "generates": facts.generates and rollout_of(role) not in launch.placed,
        "temperature": 1.0 if spoken is None else spoken.temperature,
        "on_policy": nodes_on_own_rows(launch.dataflow, role) if on_policy else frozenset(),
        "base_of": role_with_base(launch, role),
    }


def _rollout_worker(launch: Launch, role: str, loads: bool) -> Worker:
    placement, trained = launch.run.placement, launch.dataflow.facts[role].trained
    return ROLLOUT_WORKER, {
        "config": launch.roles[role],
        "max_staleness": placement.max_staleness if trained else None,
        "interrupts": placement.interrupt and trained,
        "loads": loads,
    }


def _value_model(launch: Launch, role: str) -> Worker:
    config: Any = launch.roles[role]
    trained = launch.dataflow.facts[role].trained
    made = {"model": config.model, "engine": config.engine, "optimizer": config.optimizer if trained else None}
    return _interface(launch, role).worker, made


def _reward(launch: Launch, role: str) -> Worker:
    config = launch.roles[role]
    assert isinstance(config, RewardConfig), f"{role} is a reward"
    if config.function is None:
        return _value_model(launch, role)
    return _interface(launch, role).rule_worker, _rule(config, launch.recipe.file)


def _rule(config: RewardConfig, recipe_file: Path) -> dict[str, Any]:
    from rlhf_dist.rewards.child import Limits
    from rlhf_dist.rewards.load import load_reward

    assert config.function is not None, "a rule is a function"
    return {
        "function": load_reward(config.function, recipe_file),
        "limits": Limits(
            timeout_s=config.timeout_s,
            memory_bytes=config.memory_bytes,
            concurrency=config.concurrency,
            environment=tuple(config.environment),
        ),
        "failed_reward": config.failed_reward,
    }


def _function(launch: Launch, role: str) -> Worker:
    return _interface(launch, role).worker, {"config": launch.roles[role]}


def _interface(launch: Launch, role: str) -> Any:
    return launch.recipe.roles[role]


_KINDS: Mapping[type, RoleKind] = {
    kind.base: kind
    for kind in (
        RoleKind(base=LanguageModel, settings=LanguageModelConfig, head="policy", worker_of=_language_model),
        RoleKind(base=ValueModel, settings=ValueModelConfig, head="value", worker_of=_value_model),
        RoleKind(base=Reward, settings=RewardConfig, head="value", worker_of=_reward),
        RoleKind(base=Function, settings=FunctionConfig, head=None, worker_of=_function),
    )
}
