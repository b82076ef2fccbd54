"""Weights as values: what a recipe may do with the weights of a role that has a model.

    reference.copy_from(actor, every=100)              hard refresh
    opponent.mix_from(actor, tau=0.01)                 w <- (1 - tau) w + tau * other, an EMA
    soup.merge_from([(a, 0.5), (b, 0.5)])              averages; negative weights extrapolate
    actor.save_weights("anchor", optimizer=True)       a named set, in host memory
    actor.restore_weights("anchor")                    half-steps

Each is a node of the graph with effects on weight states: `ROLE.train`, what a role computes and trains with, and
`ROLE.NAME`, a set that was saved under that name. Order, drawing and checkpoints follow from these as from updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from rlhf_dist.dispatch import ONE_TO_ALL, TransferProtocol

F = TypeVar("F", bound=Callable[..., Any])
WeightEffect = Literal["others", "others and its own", "its own", "a set"]
"""Weights that an op reads."""
RESERVED_SETS = ("train", "rollout", "state")
"""Names of weight states that no set can have."""


@dataclass(frozen=True)
class WeightOp:
    """What one weight op touches."""

    name: str
    reads: WeightEffect
    writes: Literal["its own", "a set"]
    dispatch: TransferProtocol = ONE_TO_ALL
    mesh: str = "train"


def weight_op(*, reads: WeightEffect, writes: Literal["its own", "a set"]) -> Callable[[F], F]:
    """Declare a method of `Weights`."""

    def wrap(function: F) -> F:
        function.weight_op = WeightOp(function.__name__, reads, writes)  # type: ignore[attr-defined]
        return function

    return wrap


class Weights(Protocol):
    """Base of every kind of role that has a model. Every op takes `every=` and `after=`, as updates do."""

    model_head: ClassVar[Literal["policy", "value"]] = "policy"
    """Weights go between models of one head only."""

    @weight_op(reads="others", writes="its own")
    def copy_from(self, other: Weights) -> None:
        """This role's weights become those of `other`, bit for bit where both keep them in one dtype."""
        ...

    @weight_op(reads="others and its own", writes="its own")
    def mix_from(self, other: Weights, *, tau: float) -> None:
        """w <- (1 - tau) w + tau * other, in float32; tau in [0, 1], a state's number too."""
        ...

    @weight_op(reads="others and its own", writes="its own")
    def merge_from(self, sources: Sequence[tuple[Weights, float]]) -> None:
        """The weighted sum of the weights of some roles, this one among them or not, in float32. The factors need
        not add up to 1, and may be negative: [(a, 2.0), (b, -1.0)] goes on from b through a."""
        ...

    @weight_op(reads="its own", writes="a set")
    def save_weights(self, name: str, *, optimizer: bool = False) -> None:
        """Keep what the role trains, under a name, in host memory; with `optimizer` its moments and steps too."""
        ...

    @weight_op(reads="a set", writes="its own")
    def restore_weights(self, name: str) -> None:
        """Back to the set that was last saved under that name; with its moments and steps where it has them."""
        ...


def weight_ops_of(interface: type) -> dict[str, WeightOp]:
    """Weight ops of an interface; empty for a kind of role without a model."""
    found = {name: getattr(getattr(interface, name, None), "weight_op", None) for name in vars(Weights)}
    return {name: spec for name, spec in found.items() if isinstance(spec, WeightOp)}
