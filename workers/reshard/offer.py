"""What the two ends of a weight sync say of themselves, and the layouts that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_dist.reshard.encoding import layout_from_json, layout_to_json
from rlhf_dist.reshard.layout import Box, Layout, LayoutError, ParameterLayout
from workers.engines.added.lora import Adapter
from workers.engines.generation.interface import GenerationEngine, Untraceable
from workers.engines.training.interface import TrainingEngine

Wanted = dict[str, list[Box]]
"""Per parameter the boxes that one generation rank wants."""


@dataclass(frozen=True)
class Offer:
    """What the training ranks hold; the same on all of them."""

    weights: Layout
    """In the rollout dtype: values are cast before they travel."""
    adapters: Mapping[str, Adapter]
    """Weight -> the parameters that change it."""
    adapter_weights: Layout | None
    """Of those parameters, in the master dtype: they are small. None without adapters."""

    def to_json(self) -> dict[str, Any]:
        """As it goes over the network: numbers and texts, nothing that runs."""
        return {
            "weights": layout_to_json(self.weights),
            "adapters": {name: asdict(adapter) for name, adapter in self.adapters.items()},
            "adapter_weights": layout_to_json(self.adapter_weights) if self.adapter_weights is not None else None,
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Offer:
        """The reverse."""
        held = told["adapter_weights"]
        return cls(
            layout_from_json(told["weights"]),
            {name: Adapter(**fields) for name, fields in told["adapters"].items()},
            layout_from_json(held) if held is not None else None,
        )


def wanted_from_json(told: Any) -> Wanted | str | None:
    """What a rank said it wants: `Wanted` has become lists of lists on its way."""
    if not isinstance(told, dict):
        return None if told is None else str(told)
    return {name: [tuple((int(a), int(b)) for a, b in box) for box in boxes] for name, boxes in told.items()}


def offer_of(engine: TrainingEngine, dtype: str) -> Offer:
    """Collective over the engine's ranks."""
    adapters = engine.layout("adapters") if engine.adapters else None
    return Offer(engine.layout().as_dtype(dtype), dict(engine.adapters), adapters)


def wanted_by(rollout: GenerationEngine, weights: Layout) -> Wanted | str:
    """What this rank of the generation engine wants of the weights; or why it takes whole tensors only."""
    try:
        return rollout.trace({name: p.shape for name, p in weights.parameters.items()})
    except Untraceable as error:
        return str(error)


def pair_of(weights: Layout, wanted: Sequence[Wanted | str | None]) -> tuple[Layout, Layout]:
    """(source, target) over all ranks; wanted: by rank, None for one that generates nothing.

    Parameters that the generation model has no use for are in neither. Raises Untraceable where a rank says so, and
    LayoutError naming a parameter that some rank wants and no layout of which can be made.
    """
    for part in wanted:
        if isinstance(part, str):
            raise Untraceable(part)
    parts = {rank: part for rank, part in enumerate(wanted) if isinstance(part, dict)}
    used = {name for part in parts.values() for name, boxes in part.items() if boxes}
    if unknown := sorted(used - weights.parameters.keys()):
        raise LayoutError(f"both sides must name the same parameters; wanted but not sent: {', '.join(unknown[:5])}")
    source = Layout(weights.world, {name: p for name, p in weights.parameters.items() if name in used})
    target = {
        name: ParameterLayout.from_boxes(
            p.shape, p.dtype, [(rank, box) for rank, part in parts.items() for box in part.get(name, [])]
        )
        for name, p in source.parameters.items()
    }
    return source, Layout(weights.world, target)


def whole_on(layout: Layout, ranks: Sequence[int]) -> Layout:
    """Every parameter whole on each of these ranks."""
    return Layout(
        layout.world,
        {
            name: ParameterLayout.from_boxes(
                p.shape, p.dtype, [(rank, tuple((0, size) for size in p.shape)) for rank in ranks]
            )
            for name, p in layout.parameters.items()
        },
    )
