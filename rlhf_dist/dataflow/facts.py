"""What a graph asks of its roles, derived once: which learn, which generate, which need a training engine.

    actor       generate_sequences, compute_log_prob, update_actor     both engines, a sync from one to the other
    reference   compute_ref_log_prob                                   a training engine without an optimizer
    opponent    generate_sequences                                     a generation engine, which loads its weights

Nobody asks for a role's name or kind to know this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_dist.dataflow.graph import Dataflow, Node


@dataclass(frozen=True, kw_only=True)
class RoleFacts:
    """Of one role."""

    trained: bool = False
    """Some op of its own writes its training weights: it has an optimizer."""
    generates: bool = False
    """Some node reads its generation weights."""
    computes: bool = False
    """Some node uses its training engine, or the weights in it: forward passes, updates, copies to other roles."""

    @property
    def only_generates(self) -> bool:
        """It is frozen, and nothing but its responses is asked for: it needs a generation engine alone, no sync."""
        return self.generates and not self.trained and not self.computes

    @property
    def synced(self) -> bool:
        """It generates with weights that come from its training engine."""
        return self.generates and not self.only_generates


def facts_of(nodes: Iterable[Node], roles: Iterable[str]) -> Mapping[str, RoleFacts]:
    """Facts of every role in `roles`, in that order."""
    nodes = tuple(nodes)

    def facts(role: str) -> RoleFacts:
        train, rollout = f"{role}.train", f"{role}.rollout"
        return RoleFacts(
            trained=any(node.kind == "op" and train in node.weights_written for node in nodes),
            generates=any(rollout in node.weights_read for node in nodes),
            computes=any(_computes(node, role) for node in nodes),
        )

    return {role: facts(role) for role in roles}


def drawn_by(dataflow: Dataflow, node: Node) -> frozenset[str]:
    """Roles whose generation made rows that `node` has; none for rows of a file."""
    makers = _makers(dataflow, node)
    generating = [role for role, facts in dataflow.facts.items() if facts.generates]
    parted = {str(one.kwargs["name"]) for one in makers if one.op == "spoken_by"}
    return frozenset(role for role in generating if any(_draws(one, role, parted) for one in makers))


def nodes_on_own_rows(dataflow: Dataflow, role: str) -> frozenset[str]:
    """Nodes of `role` whose rows it drew itself in the same step, all of them: what it says of them must be what
    sampling said."""
    return frozenset(
        node.name
        for node in dataflow
        if node.role == role
        and drawn_by(dataflow, node) == {role}
        and not any(_of_another_policy(one) for one in _makers(dataflow, node))
    )


def speaker_of(dataflow: Dataflow, role: str) -> str | None:
    """Whose sampling temperature the log-probs of `role` are taken at; None for temperature 1.

    Its own where it generates. A frozen role is compared with a policy: of those that drew the rows it sees (of all
    that generate, where it sees rows of files) the first, one that learns before one that does not.
    """
    own = dataflow.facts[role]
    draws = any(_draws(node, role) for node in dataflow)  # one that lends its logits to another's draws nothing
    if draws or own.trained:
        return role if draws else None
    drew = {one for node in dataflow if node.role == role for one in drawn_by(dataflow, node)}
    speakers = [one for one in dataflow.generating if one in drew or not drew]
    return min(speakers, key=lambda one: not dataflow.facts[one].trained, default=None)


def _makers(dataflow: Dataflow, node: Node) -> list[Node]:
    """`node` and all that its rows come from."""
    found, seen = [node], set[str]()
    for one in found:
        # A node that keeps its rows has those of its first input, whatever columns it takes of others.
        names = {batch.rows for batch in (one.inputs[:1] if one.rows == "keep" else one.inputs)} - seen
        seen |= names
        found += [dataflow[name] for name in names]
    return found


def _computes(node: Node, role: str) -> bool:
    train, rollout = f"{role}.train", f"{role}.rollout"
    if node.kind == "reshard":
        return False  # it brings generation what was computed
    runs = node.kind == "op" and node.role == role and rollout not in node.weights_read
    return runs or train in node.weights_read or train in node.weights_written


def _of_another_policy(node: Node) -> bool:
    """Whether its rows are of earlier steps, or drawn otherwise than the role's settings say."""
    asked = node.rows == "expand" and any(node.kwargs.get(key) is not None for key in ("temperature", "mixture"))
    return asked or node.kind == "state" and node.rows == "new"


def _draws(node: Node, role: str, parted: Collection[str] = ()) -> bool:
    """Whether `role` draws rows of this node. parted: names whose rows are meant, of an episode in which several speak;
    none for all."""
    if node.rows != "expand" or f"{role}.rollout" not in node.weights_read:
        return False
    others = {name: node.kwargs["speakers"][name] for name in node.kwargs.get("rows_of", ())}
    return any(one == role for name, one in {node.role: node.role, **others}.items() if name in parted or not parted)
