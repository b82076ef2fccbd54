"""What a recipe does with weights, recorded as nodes: see `rlhf_dist/weights.py` for what each op means.

reference.copy_from(actor)        reads actor.train                     writes reference.train
opponent.mix_from(actor, tau=t)   reads actor.train, opponent.train     writes opponent.train
actor.save_weights("anchor")      reads actor.train                     writes actor.anchor
actor.restore_weights("anchor")   reads actor.anchor                    writes actor.train
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_dist.dataflow.graph import GraphError, Node
from rlhf_dist.dataflow.op_settings import check_known, check_settings, defaults, output_names
from rlhf_dist.dataflow.state_value import StateValue, states_read
from rlhf_dist.weights import RESERVED_SETS, WeightOp, weight_ops_of


class Recorder(Protocol):
    """What of the tracer is needed here."""

    nodes: list[Node]

    def add(self, node: Node) -> Node:
        """Record a node."""
        ...

    def line(self) -> str:
        """The recipe's line that is being traced."""
        ...


@dataclass(frozen=True)
class WeightRole:
    """A role of the recipe, as weight ops see it."""

    name: str
    interface: type


def record_weights(
    recorder: Recorder, target: WeightRole, spec: WeightOp, given: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Record `target.spec(*given, **kwargs)`. Raises GraphError with the recipe's line for what cannot be meant."""
    line, where, method = recorder.line(), f"{target.name}.{spec.name}", getattr(target.interface, spec.name)
    if len(given) != 1:
        raise GraphError(f"{line}: {where} takes one positional argument and keyword settings, got {len(given)}")
    check_known(line, where, kwargs)
    check_settings(line, where, method, kwargs)
    settings = {**defaults(method), **kwargs}
    output_names(line, settings.pop("out", None), (), where)
    every, after = settings.pop("every", 1), settings.pop("after", 0)
    if not isinstance(every, int) or every < 1 or not isinstance(after, int) or after < 0:
        raise GraphError(f"{line}: {where} needs whole every >= 1 and after >= 0, got every={every!r}, after={after!r}")
    first = _first_step(every, after)
    own = f"{target.name}.train"
    if spec.name in ("copy_from", "mix_from"):
        source = _source(line, where, target, given[0])
        if source == target.name:
            raise GraphError(f"{line}: {where} is given {source!r} itself, which changes nothing; name another role")
        reads: tuple[str, ...] = (f"{source}.train",)
        settings["source"] = source
        if spec.name == "mix_from":
            _check_tau(line, where, settings["tau"])
            reads = (*reads, own)
    elif spec.name == "merge_from":
        settings["sources"] = _sources(line, where, target, given[0])
        reads = tuple(dict.fromkeys(f"{source}.train" for source, _ in settings["sources"]))
    else:
        settings["name"] = _set_name(line, where, given[0])
        reads = (own,)
        if spec.name == "restore_weights":
            _check_saved(line, where, settings["name"], first, _saved(recorder.nodes, target.name))
            reads = (f"{target.name}.{settings['name']}",)
    written = own if spec.writes == "its own" else f"{target.name}.{settings['name']}"
    recorder.add(
        Node(
            name=where,
            role=target.name,
            op=spec.name,
            kind="weights",
            weights_read=(*reads, *(f"{state}.state" for state in states_read(settings))),
            weights_written=(written,),
            kwargs=settings,
            spec=spec,
            line=line,
            every=every,
            after=after,
        )
    )


def check_sets(nodes: Iterable[Node]) -> None:
    """Raises GraphError for a set that is to hold the optimizer of a role without one."""
    nodes = tuple(nodes)
    trained = {node.role for node in nodes if node.kind == "op" and f"{node.role}.train" in node.weights_written}
    for node in nodes:
        if node.op == "save_weights" and node.kwargs.get("optimizer") and node.role not in trained:
            raise GraphError(
                f"{node.line}: {node.name}({node.kwargs['name']!r}, optimizer=True) saves an optimizer, but no update "
                f"trains {node.role!r}; leave optimizer= out"
            )


def _source(line: str, where: str, target: WeightRole, given: Any) -> str:
    """The name of a role whose weights fit `target`."""
    role = given.weight_role() if hasattr(type(given), "weight_role") else None
    if not isinstance(role, WeightRole):
        raise GraphError(f"{line}: {where} needs a role of this recipe, got {given!r}; give the parameter itself")
    kind = role.interface.__name__
    if not weight_ops_of(role.interface):
        raise GraphError(f"{line}: {where} cannot take weights of {role.name!r}: {kind} is no role with a model")
    mine, theirs = (one.interface.model_head for one in (target, role))  # type: ignore[attr-defined]
    if mine != theirs:
        raise GraphError(
            f"{line}: {where} cannot take weights of {role.name!r}: that is a {theirs} model ({kind}), and "
            f"{target.name!r} a {mine} model ({target.interface.__name__}); they differ in their head"
        )
    for one in (target, role):
        if own := getattr(one.interface, "heads", ()):
            raise GraphError(
                f"{line}: {where} would leave out {', '.join(head.name for head in own)}, {one.name!r}'s own heads: "
                "weights go between roles without such heads; a named set (save_weights) has them"
            )
    return role.name


def _sources(line: str, where: str, target: WeightRole, given: Any) -> tuple[tuple[str, Any], ...]:
    pairs = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
    if not pairs:
        raise GraphError(
            f"{line}: {where} needs at least one (role, factor), such as [(a, 0.5), (b, 0.5)]; got {given!r}"
        )
    found = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise GraphError(f"{line}: {where} takes pairs (role, factor), got {pair!r}")
        factor = pair[1].first if isinstance(pair[1], StateValue) else pair[1]
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise GraphError(f"{line}: {where} needs finite numbers as factors, got {pair[1]!r}")
        found.append((_source(line, where, target, pair[0]), pair[1]))
    return tuple(found)


def _check_tau(line: str, where: str, tau: Any) -> None:
    first = tau.first if isinstance(tau, StateValue) else tau
    if isinstance(first, bool) or not isinstance(first, int | float) or not 0 <= first <= 1:
        said = f"{tau}, which starts as {first!r}" if isinstance(tau, StateValue) else repr(tau)
        raise GraphError(
            f"{line}: {where} needs tau in [0, 1], the share that comes from the other role; got {said} "
            f"(merge_from takes any factors)"
        )


def _set_name(line: str, where: str, given: Any) -> str:
    if not isinstance(given, str) or not given.isidentifier() or given in RESERVED_SETS:
        raise GraphError(
            f"{line}: {where} needs a name for the set, a plain word other than {', '.join(RESERVED_SETS)}; "
            f"got {given!r}"
        )
    return given


def _saved(nodes: Iterable[Node], role: str) -> dict[str, int]:
    """Set -> the first step that saves it, for those saved so far."""
    found: dict[str, int] = {}
    for node in nodes:
        if node.op == "save_weights" and node.role == role:
            first = _first_step(node.every, node.after)
            found[node.kwargs["name"]] = min(first, found.get(node.kwargs["name"], first))
    return found


def _check_saved(line: str, where: str, name: str, first: int, saved: Mapping[str, int]) -> None:
    if name not in saved:
        near = difflib.get_close_matches(name, saved, n=1)
        there = f"saved by then: {', '.join(saved)}" if saved else "nothing is saved by then"
        raise GraphError(
            f"{line}: {where}({name!r}) restores a set that no line before it saves; {there}; "
            + (f"did you mean {near[0]!r}?" if near else "call save_weights first, in the recipe's order")
        )
    if saved[name] > first:
        raise GraphError(
            f"{line}: {where}({name!r}) runs at step {first}, and the set is saved at step {saved[name]} first; "
            f"give it after={saved[name]}"
        )


def _first_step(every: int, after: int) -> int:
    """The first step that a node with this cadence runs at."""
    return -(-after // every) * every
