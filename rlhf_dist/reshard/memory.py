"""Whose turn it is on a device that training and generation share: which tensors are there in each phase of a step.

    train ──> sync ──> generate ──> train          what a phase does not name has left before what is new comes

    train       parameters gradients optimizer activations
    sync        parameters weights buckets          optimizer to the host, generation weights awake; pieces move
    generate    weights cache                       parameters to the host, KV cache awake

The sequence is this table and nothing else: `moves` gives the difference of two phases, workers carry it out, and
`predicted_bytes` adds up the same sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

PhaseName = Literal["train", "sync", "generate"]
Kind = Literal["parameters", "gradients", "optimizer", "activations", "weights", "buckets", "cache"]

PHASES: Mapping[PhaseName, frozenset[Kind]] = {
    "train": frozenset({"parameters", "gradients", "optimizer", "activations"}),
    "sync": frozenset({"parameters", "weights", "buckets"}),
    "generate": frozenset({"weights", "cache"}),
}
"""Phase -> what is on the device in it."""

TRAINING: tuple[Kind, ...] = ("parameters", "optimizer")
"""What the training engine moves; its gradients exist only inside a step, activations only inside a pass."""
GENERATION: tuple[Kind, ...] = ("weights", "cache")
"""What the generation engine moves."""


@dataclass(frozen=True)
class Moves:
    """From one phase to the next: first everything in `leave`, then everything in `come`."""

    leave: tuple[Kind, ...]
    come: tuple[Kind, ...]


def moves(before: PhaseName | None, after: PhaseName) -> Moves:
    """What changes places; before None: everything is on the device."""
    there = PHASES[before] if before is not None else frozenset(get_args(Kind))
    movable = (*TRAINING, *GENERATION)
    return Moves(
        tuple(kind for kind in movable if kind in there - PHASES[after]),
        tuple(kind for kind in movable if kind in PHASES[after] - there),
    )


def predicted_bytes(sizes: Mapping[Kind, int]) -> dict[PhaseName, int]:
    """Most bytes on the device in each phase; a kind that `sizes` leaves out counts nothing.

    Between two phases no more is there than in the larger of them, since what leaves does so first.
    """
    return {phase: sum(sizes.get(kind, 0) for kind in kinds) for phase, kinds in PHASES.items()}
