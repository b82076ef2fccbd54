"""What a step asks of the devices of each pool, in order: the phases that `device_ledger.py` decides by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.placement.roles import rollout_of


def phases_of(dataflow: Dataflow, placed: Mapping[str, str], pool: str, bases: Mapping[str, str]) -> tuple[str, ...]:
    """Phases of one step in `pool`, in the recipe's order; one after itself once.

    placed: role -> pool (`pool_of_roles`). bases: role without a model of its own -> whose model it uses.
    """
    found: list[str] = []
    for node in dataflow:
        for where, phase in _phases(node, placed, bases):
            if where == pool and (not found or found[-1] != phase):
                found.append(phase)
    return tuple(found)


def _phases(node: Node, placed: Mapping[str, str], bases: Mapping[str, str]) -> list[tuple[str, str]]:
    """(pool, phase) of one node."""
    role, rollout = node.role, rollout_of(node.role)
    if role not in placed or node.kind not in ("op", "reshard", "weights"):
        return []
    if node.kind == "weights":
        return _weight_phases(node, placed)
    if node.kind == "reshard":
        apart = [(placed[rollout], f"{rollout}.sync")] if rollout in placed else []
        return [(placed[role], f"{role}.sync"), *apart]
    if rollout in node.weights_read:
        roles = [state.removesuffix(".rollout") for state in node.weights_read if state.endswith(".rollout")]
        return [(placed.get(rollout, placed[role]), generation_phase(roles))]
    use = "update" if f"{role}.train" in node.weights_written else "forward"
    return [(placed[role], f"{bases.get(role, role)}.{use}")]


def _weight_phases(node: Node, placed: Mapping[str, str]) -> list[tuple[str, str]]:
    if node.op == "save_weights":
        return [(placed[node.role], f"{node.role}.{'update' if node.kwargs['optimizer'] else 'forward'}")]
    ways = [way_of(sender, node.role) for sender in node.senders]
    pools = [dict.fromkeys((placed[sender], placed[node.role])) for sender in node.senders]
    moved = [(pool, way) for way, both in zip(ways, pools, strict=True) for pool in both]
    return [*moved, (placed[node.role], f"{node.role}.write")]


def generation_phase(roles: Iterable[str]) -> str:
    """The phase in which the first of `roles` generates, from a mixture where there are others."""
    return f"{'+'.join(roles)}.generate"


def way_of(source: str, target: str) -> str:
    """The phase in which weights of one role go to another's."""
    return f"{target} from {source}.copy"
