"""Partitions of roles into pools, and ranges of their sizes.

box    for each pool of a partition the first and the last of the sizes it may have (indexes into `sizes`)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Partition = tuple[tuple[str, ...], ...]
Box = tuple[tuple[int, int], ...]


def partitions(units: Sequence[str]) -> Iterator[Partition]:
    """All set partitions of `units`: Bell(4) = 15 for PPO."""
    if not units:
        yield ()
        return
    first, *rest = units
    for smaller in partitions(rest):
        yield ((first,), *smaller)
        for index, block in enumerate(smaller):
            yield (*smaller[:index], (first, *block), *smaller[index + 1 :])


def pool_sizes(gpus: int, gpus_per_node: int, step: int = 1) -> tuple[int, ...]:
    """Sizes a pool may have: a number of GPUs that divides a node, or whole nodes; above `step` nodes in such steps."""
    small = [size for size in range(1, gpus_per_node) if gpus_per_node % size == 0]
    nodes = gpus // gpus_per_node
    whole = sorted({*range(1, min(step, nodes) + 1), *range(step, nodes + 1, step)})
    return tuple(size for size in [*small, *(gpus_per_node * n for n in whole)] if size <= gpus)


@dataclass(frozen=True)
class Boxes:
    """Ranges of sizes that add up to a cluster."""

    sizes: tuple[int, ...]
    """Sizes a pool may have, ascending."""
    gpus: int
    idle: bool
    """Whether GPUs may be left over."""

    def tightened(self, box: Box) -> Box | None:
        """The box without sizes that cannot add up to all GPUs; None if nothing is left."""
        sizes, ranges = self.sizes, [list(one) for one in box]
        if any(low >= len(sizes) or low > high for low, high in ranges):
            return None
        changed = True
        while changed:
            changed = False
            least, most = sum(sizes[low] for low, _ in ranges), sum(sizes[high] for _, high in ranges)
            if least > self.gpus or (most < self.gpus and not self.idle):
                return None
            for one in ranges:
                while sizes[one[1]] > self.gpus - (least - sizes[one[0]]):
                    one[1] -= 1
                    changed = True
                    if one[1] < one[0]:
                        return None
                while not self.idle and sizes[one[0]] < self.gpus - (most - sizes[one[1]]):
                    one[0] += 1
                    changed = True
                    if one[1] < one[0]:
                        return None
                if changed:
                    break
        return tuple((low, high) for low, high in ranges)

    def halves(self, box: Box) -> Iterator[Box]:
        """The box cut in two along its widest range, each half tightened; itself if it is a point."""
        widest = max(range(len(box)), key=lambda at: box[at][1] - box[at][0])
        low, high = box[widest]
        if low == high:
            yield box
            return
        middle = (low + high) // 2
        for half in ((low, middle), (middle + 1, high)):
            tight = self.tightened((*box[:widest], half, *box[widest + 1 :]))
            if tight is not None:
                yield tight
