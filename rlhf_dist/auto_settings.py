"""Settings that are left to the machine, put into a launch: every engine and pool is given numbers.

    dtype: auto, slots: 0, kv_cache_bytes: null, ... ──> settle(launch, machine) ──> values, and `choices` that say why

Once for the machine a launch is composed on (`compose.py`), and again where it turns out to run elsewhere: on a cluster
that is described (`check --cluster`) or joined. The settings that a run keeps still say `auto`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_dist.config import EngineConfig, FunctionConfig, LanguageModelConfig, RolloutConfig
from rlhf_dist.machine import Machine
from rlhf_dist.machine_settings import (
    Choice,
    Device,
    attention_on,
    bucket_on,
    device_of,
    dtype_on,
    emulated,
    gpu_share,
    kv_cache_on,
    slots_on,
)
from rlhf_dist.placement.roles import HOST_POOL, rollout_of
from rlhf_dist.role_kinds import has_training_engine
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch
    from rlhf_dist.role_kinds import RoleConfig


def settle(launch: Launch, machine: Machine) -> Launch:
    """The launch with a value for every setting that was left to the machine, and `choices` that say why.

    Settings that an earlier call chose are chosen anew. A launch whose placement cannot be is left as it is:
    `check_launch` says what is wrong with it.
    """
    try:
        placed = launch.placed
    except ConfigError:
        return launch
    chosen = dict(_slots(launch, placed, machine))
    for role in launch.roles:
        chosen |= dict(_of_role(launch, role, placed, machine))
    placement = launch.run.placement
    pools = {name: _with(pool, f"placement.pools.{name}", chosen) for name, pool in placement.pools.items()}
    settled = replace(
        launch,
        run=replace(launch.run, placement=replace(placement, pools=pools)),
        roles={role: _role_with(settings, role, chosen) for role, settings in launch.roles.items()},
        machine=machine,
        auto=frozenset(chosen),
    )
    heard = {key: choice for key, choice in chosen.items() if _matters(key, settled, placed)}
    return replace(settled, choices=_merged(heard | dict(_attention(settled, placed))))


def machine_lines(launch: Launch) -> list[str]:
    """The machine, what settings became on it, and what was set against it, for people."""
    if launch.machine is None:
        return []
    asked = ", as far as this machine knows: the run asks the cluster" if launch.run.ray.address is not None else ""
    lines = [f"machine   {launch.machine.line}{asked}"]
    lines += [f"{'' if number else 'auto':<10}{choice.line}" for number, choice in enumerate(launch.choices)]
    return lines + [f"slow      {text}" for text in slow_settings(launch)]


def slow_settings(launch: Launch) -> list[str]:
    """What was set by hand and the machine is slow with, and what to do."""
    if launch.machine is None:
        return []
    placed = launch.placed
    found: dict[str, list[str]] = {}
    for role in launch.used_roles:
        for key, section, pool in _sections(role, launch.roles[role], placed):
            if key not in launch.auto and _matters(key, launch, placed):
                why = emulated(launch.machine, _device(launch, pool, launch.machine), section.dtype)
                if why is not None:
                    found.setdefault(why, []).append(key)
    return [f"{', '.join(keys)}=bfloat16: {why}; leave model.dtype=auto" for why, keys in found.items()]


def _slots(launch: Launch, placed: Mapping[str, str], machine: Machine) -> Iterator[tuple[str, Choice]]:
    pools = launch.run.placement.pools
    started = [name for name in pools if _matters(f"placement.pools.{name}.slots", launch, placed)]
    left = {
        name
        for name, pool in pools.items()
        if not pool.share and _is_left(launch, f"placement.pools.{name}.slots", pool.slots or None)
    }
    for name in pools:
        if name not in left:
            continue
        device = device_of(pools[name], machine)
        alike = [one for one in started if device_of(pools[one], machine) == device]
        taken = sum(pools[one].slots * max(1, pools[one].nodes) for one in alike if one not in left)
        sharing = max(1, sum(one in left for one in alike))
        yield f"placement.pools.{name}.slots", slots_on(machine, device, sharing, taken, bool(pools[name].nodes))


def _of_role(launch: Launch, role: str, placed: Mapping[str, str], machine: Machine) -> Iterator[tuple[str, Choice]]:
    settings = launch.roles[role]
    for key, section, pool in _sections(role, settings, placed):
        if _is_left(launch, key, section.dtype):
            yield key, dtype_on(machine, _device(launch, pool, machine))
    if not isinstance(settings, LanguageModelConfig):
        return
    pool = placed.get(rollout_of(role), placed[role])
    device = _device(launch, pool, machine)
    beside = any(placed[name] == pool and has_training_engine(launch, name) for name in launch.used_roles)
    generators = [name for name in launch.dataflow.generating if placed.get(rollout_of(name), placed[name]) == pool]
    rollout = settings.rollout
    for name, value, choice in (
        ("kv_cache_bytes", rollout.kv_cache_bytes, kv_cache_on(device)),
        ("gpu_memory_share", rollout.gpu_memory_share, gpu_share(beside, max(1, len(generators)))),
        ("bucket_bytes", rollout.bucket_bytes, bucket_on(device)),
    ):
        if _is_left(launch, f"{role}.rollout.{name}", value):
            yield f"{role}.rollout.{name}", choice


def _attention(launch: Launch, placed: Mapping[str, str]) -> Iterator[tuple[str, Choice]]:
    assert launch.machine is not None, "of a launch that is settled"
    for role, settings in launch.used_roles.items():
        if has_training_engine(launch, role) and settings.engine.packing:
            device = _device(launch, placed[role], launch.machine)
            yield f"{role}.engine.attention", attention_on(device, settings.engine.dtype)


def _is_left(launch: Launch, key: str, value: Any) -> bool:
    """Whether a setting is left to the machine."""
    return key in launch.auto or value is None or value == "auto"


def _sections(
    role: str, settings: RoleConfig, placed: Mapping[str, str]
) -> Iterator[tuple[str, EngineConfig | RolloutConfig, str]]:
    """(key, section, pool) of every dtype of a role."""
    yield f"{role}.engine.dtype", settings.engine, placed[role]
    if isinstance(settings, LanguageModelConfig):
        yield f"{role}.rollout.dtype", settings.rollout, placed.get(rollout_of(role), placed[role])


def _device(launch: Launch, pool: str, machine: Machine) -> Device:
    return "cpu" if pool == HOST_POOL else device_of(launch.run.placement.pools[pool], machine)


def _matters(key: str, launch: Launch, placed: Mapping[str, str]) -> bool:
    """Whether what the launch starts reads the setting."""
    if key.startswith("placement.pools."):
        return any(at == key.split(".")[2] for name, at in placed.items() if name.split(".")[0] in launch.used_roles)
    role, section, name = key.split(".")
    settings = launch.roles[role]
    if role not in launch.used_roles or settings.model is None:
        return False
    if section != "rollout" or not isinstance(settings, LanguageModelConfig):
        return has_training_engine(launch, role)
    unread = set()
    if settings.rollout.engine != "vllm":
        unread |= {"kv_cache_bytes", "gpu_memory_share"}
    if settings.rollout.kv_cache_bytes:
        unread.add("gpu_memory_share")
    return role in launch.dataflow.generating and name not in unread


def _with(section: Any, prefix: str, chosen: Mapping[str, Choice]) -> Any:
    values = {name: chosen[f"{prefix}.{name}"].value for name in vars(section) if f"{prefix}.{name}" in chosen}
    return replace(section, **values)


def _role_with(settings: RoleConfig, role: str, chosen: Mapping[str, Choice]) -> RoleConfig:
    if isinstance(settings, FunctionConfig):
        return settings
    engine = _with(settings.engine, f"{role}.engine", chosen)
    if isinstance(settings, LanguageModelConfig):
        return replace(settings, engine=engine, rollout=_with(settings.rollout, f"{role}.rollout", chosen))
    return replace(settings, engine=engine)


def _merged(chosen: Mapping[str, Choice]) -> tuple[Choice, ...]:
    """Choices with one for all keys that became the same for the same reason."""
    keys: dict[tuple[str, Choice], list[str]] = {}
    for key, choice in chosen.items():
        keys.setdefault((key.rsplit(".", 1)[1], choice), []).append(key)
    return tuple(replace(choice, keys=tuple(alike)) for (_, choice), alike in keys.items())
