"""The layout that generation wants, put together from what each rank's engine says of itself."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.reshard.layout import Box, Layout, ParameterLayout
from workers.engines.generation import GenerationEngine, Untraceable

Wanted = dict[str, list[Box]] | str
"""Boxes by parameter, or why there are none."""


def traced(rollout: GenerationEngine, source: Layout) -> Wanted:
    """What this rank's engine wants of the source's parameters."""
    try:
        return rollout.trace({name: p.shape for name, p in source.parameters.items()})
    except Untraceable as error:
        return str(error)


def target_layout(source: Layout, parts: Sequence[Wanted]) -> Layout:
    """parts: of every rank of the source's world. Raises Untraceable where a rank said so."""
    told: list[dict[str, list[Box]]] = []
    for part in parts:
        if isinstance(part, str):
            raise Untraceable(part)
        told.append(part)
    return Layout(
        source.world,
        {
            name: ParameterLayout.from_boxes(
                p.shape, p.dtype, [(rank, box) for rank, part in enumerate(told) for box in part.get(name, [])]
            )
            for name, p in source.parameters.items()
        },
    )
