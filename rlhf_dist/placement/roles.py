"""Which pool each role runs in.

    roles:                       ppo              grpo
      default: policy            actor, reference actor, reference
      Critic: values             critic           (none: the pool is not started)
    rollout: generation          actor.rollout    actor.rollout

A role is looked up by its name, then by its interface and that one's bases, then under `default`: so one
placement file serves every recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf_dist.config import PlacementConfig, PoolConfig, RewardConfig
from rlhf_dist.dataflow.facts import RoleFacts
from rlhf_dist.roles import KINDS, Function, LanguageModel
from rlhf_dist.typed import ConfigError, unknown

HOST_POOL = "host"
"""The CPU processes that run sources, host ops and rule rewards; always there, needs no slot."""
INTERFACES = tuple(kind.__name__ for kind in KINDS)
"""Kinds of role that a placement may name whether or not the recipe has one."""


def rollout_of(role: str) -> str:
    """The name of the workers that generate for `role` in a pool of their own; also of the weights they hold."""
    return f"{role}.rollout"


def rollout_pool(placement: PlacementConfig, role: str) -> str | None:
    """The pool that `placement.rollout` says for a role that generates; None where it says none."""
    said = placement.rollout
    return said.get(role) if isinstance(said, Mapping) else said


def only_generates(interface: type, facts: RoleFacts) -> bool:
    """Whether a role is a generation engine that loads its own weights, and nothing else.

    A worker of the user's own may do more than the graph shows.
    """
    return facts.only_generates and getattr(interface, "worker", None) == LanguageModel.worker


def on_host(interface: type, settings: Any) -> bool:
    """Whether a role is a function: it runs on the CPU processes and needs no slot."""
    rule = isinstance(settings, RewardConfig) and settings.function is not None
    return rule or Function in interface.__mro__


def pool_of_roles(
    placement: PlacementConfig,
    roles: Mapping[str, Any],
    interfaces: Mapping[str, type],
    facts: Mapping[str, RoleFacts],
) -> dict[str, str]:
    """Role -> pool, for a recipe's roles, their settings, interfaces and facts. Functions run on the host pool.

    Where `placement.rollout` is not the pool of a role that generates, `ROLE.rollout` is placed there too; a role
    that only generates is placed there whole.
    Raises ConfigError for a role or a pool that does not exist, a role without a pool, and a pool that
    nothing refers to.
    """
    _check_names(placement, roles, interfaces, facts)
    found: dict[str, str] = {}
    for role, settings in roles.items():
        kinds = (base.__name__ for base in interfaces[role].__mro__)
        pool = next((placement.roles[key] for key in (role, *kinds, "default") if key in placement.roles), "")
        rollout = rollout_pool(placement, role) if facts[role].generates else None
        if on_host(interfaces[role], settings):
            pool = HOST_POOL
        elif rollout is not None and only_generates(interfaces[role], facts[role]):
            pool = rollout
        if not pool:
            raise ConfigError(
                f"role {role!r} has no pool; set placement.roles.{role}=POOL or placement.roles.default=POOL "
                f"(pools: {', '.join(placement.pools) or 'none'})"
            )
        found[role] = pool
        if rollout not in (None, pool):
            found[rollout_of(role)] = str(rollout)
    for name in placement.pools:
        if name not in (*placement.roles.values(), *_rollout_pools(placement)):
            raise ConfigError(
                f"pool {name!r} has no role; place one with placement.roles.ROLE={name} "
                f"or leave it out with '~placement.pools.{name}'"
            )
    return found


def pool_size(placement: PlacementConfig, name: str) -> int:
    """Slots of pool `name`. Raises ConfigError for a share of nothing, or of less than a slot."""
    pool = placement.pools[name]
    if not pool.share:
        return pool.slots * max(pool.nodes, 1)
    key = f"placement.pools.{name}.share"
    if not 0 < pool.share <= 1:
        raise ConfigError(f"{key} must be above 0 and at most 1, got {pool.share:g}")
    if placement.slots < 1:
        raise ConfigError(f"{key} is a share of placement.slots, which is not set; set placement.slots=N")
    if pool.nodes:
        raise ConfigError(f"{key} and placement.pools.{name}.nodes exclude each other; remove one of them")
    shares = sum(one.share for one in placement.pools.values())
    if shares > 1 + 1e-9:
        raise ConfigError(f"placement.pools have shares of {shares:g} together, which must be at most 1")
    size = int(pool.share * placement.slots + 1e-9)
    if size < 1:
        raise ConfigError(f"{key} = {pool.share:g} of placement.slots = {placement.slots} is less than one slot")
    return size


def pool_slots(placement: PlacementConfig, name: str) -> int:
    """Slots of pool `name` as settings say them: on each of its nodes, where it has any."""
    return resolved(placement, name).slots


def resolved(placement: PlacementConfig, name: str) -> PoolConfig:
    """Pool `name` with its slots as a number, where they are a share."""
    pool = placement.pools[name]
    return replace(pool, slots=pool_size(placement, name), share=0.0) if pool.share else pool


def check_staleness(placement: PlacementConfig, placed: Mapping[str, str], facts: Mapping[str, RoleFacts]) -> None:
    """Raise ConfigError where generation is to run ahead without weights of its own, or settings contradict."""
    if placement.max_staleness < 0:
        raise ConfigError(f"placement.max_staleness must be at least 0, got {placement.max_staleness}")
    if placement.pieces < 1:
        raise ConfigError(f"placement.pieces must be at least 1, got {placement.pieces}")
    if placement.interrupt and not placement.max_staleness:
        raise ConfigError(
            "placement.interrupt needs generation that runs during updates; set placement.max_staleness=1 or "
            "placement.interrupt=false"
        )
    learning = [role for role, one in facts.items() if one.trained and one.generates]
    for role in learning if placement.max_staleness else ():
        if rollout_of(role) not in placed:
            raise ConfigError(
                f"placement.max_staleness = {placement.max_staleness} needs generation with weights of its own, but "
                f"{role!r} generates in its training pool {placed[role]!r}; set placement.rollout to another pool "
                f"(placement.pools.rollout.slots=1 placement.rollout=rollout), or placement.max_staleness=0"
            )


def _rollout_pools(placement: PlacementConfig) -> tuple[str, ...]:
    said = placement.rollout
    if said is None:
        return ()
    return tuple(said.values()) if isinstance(said, Mapping) else (said,)


def _check_names(
    placement: PlacementConfig,
    roles: Mapping[str, Any],
    interfaces: Mapping[str, type],
    facts: Mapping[str, RoleFacts],
) -> None:
    if HOST_POOL in placement.pools:
        raise ConfigError(f"placement.pools.{HOST_POOL} is taken by the CPU processes; call the pool something else")
    kinds = {base.__name__ for interface in interfaces.values() for base in interface.__mro__} | set(INTERFACES)
    for role, pool in placement.roles.items():
        if role != "default" and role not in roles and role not in kinds:
            raise ConfigError(f"placement.roles: {unknown(role, [*roles, *INTERFACES], 'role')}")
        if pool not in placement.pools:
            raise ConfigError(f"placement.roles.{role}: {unknown(pool, placement.pools, 'pool')}")
    for pool in _rollout_pools(placement):
        if pool not in placement.pools:
            raise ConfigError(f"placement.rollout: {unknown(pool, placement.pools, 'pool')}")
    for role in placement.rollout if isinstance(placement.rollout, Mapping) else ():
        if not (role in facts and facts[role].generates):
            generating = [name for name, one in facts.items() if one.generates]
            raise ConfigError(f"placement.rollout: {unknown(role, generating, 'role that generates')}")
