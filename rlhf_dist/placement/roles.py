"""Which pool each role runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_dist.config import PlacementConfig, RewardConfig
from rlhf_dist.typed import ConfigError, unknown

HOST_POOL = "host"
"""The CPU processes that run sources, host ops and rule rewards; always there, needs no slot."""


def pool_of_roles(placement: PlacementConfig, roles: Mapping[str, Any]) -> dict[str, str]:
    """Role -> pool, for a recipe's roles and their settings. A reward that is a rule runs on the host pool.

    Raises ConfigError for a role or a pool that does not exist, a role without a pool, and an unused pool.
    """
    if HOST_POOL in placement.pools:
        raise ConfigError(f"placement.pools.{HOST_POOL} is taken by the CPU processes; call the pool something else")
    for role, pool in placement.roles.items():
        if role != "default" and role not in roles:
            raise ConfigError(f"placement.roles: {unknown(role, roles, 'role')}")
        if pool not in placement.pools:
            raise ConfigError(f"placement.roles.{role}: {unknown(pool, placement.pools, 'pool')}")
    found: dict[str, str] = {}
    for role, settings in roles.items():
        pool = placement.roles.get(role, placement.roles.get("default", ""))
        if isinstance(settings, RewardConfig) and settings.function is not None:
            pool = HOST_POOL
        if not pool:
            raise ConfigError(
                f"role {role!r} has no pool; set placement.roles.{role}=POOL or placement.roles.default=POOL "
                f"(pools: {', '.join(placement.pools) or 'none'})"
            )
        found[role] = pool
    for name in placement.pools:
        if name not in found.values():
            raise ConfigError(
                f"pool {name!r} has no role; place one with placement.roles.ROLE={name} "
                f"or leave it out with '~placement.pools.{name}'"
            )
    return found
