"""Random pairs of layouts: what property tests and round trips draw from."""

from __future__ import annotations

import random
from math import prod

import numpy as np

from rlhf_dist.reshard.layout import Layout, ParameterLayout


def random_pair(rng: random.Random, world: int = 4) -> tuple[Layout, Layout]:
    """(source, target) of a few parameters; one world, or some ranks only send and the others only receive."""
    shapes = {f"p{i}": random_shape(rng) for i in range(rng.randint(1, 4))}
    dtype = rng.choice(["float32", "bfloat16"])
    ranks = list(range(world))
    if rng.random() < 0.3 and world > 1:
        cut = rng.randint(1, world - 1)
        senders, receivers = ranks[:cut], ranks[cut:]
    else:
        senders = receivers = ranks
    sides = []
    for side in (senders, receivers):
        kinds = {name: random_parameter(rng, shape, dtype, side) for name, shape in shapes.items()}
        sides.append(Layout(world, kinds))
    return sides[0], sides[1]


def random_shape(rng: random.Random) -> tuple[int, ...]:
    dims = rng.choice([0, 1, 1, 2, 2, 2, 3])
    return tuple(rng.choice([1, 2, 3, 5, 8, 13, 16]) for _ in range(dims))


def random_parameter(rng: random.Random, shape: tuple[int, ...], dtype: str, ranks: list[int]) -> ParameterLayout:
    """Sharded over a mesh of some of the ranks in some order, in flat ranges (with padding), or on one rank."""
    ranks = rng.sample(ranks, len(ranks))
    kind = rng.choice(["mesh", "mesh", "flat", "one"])
    if kind == "one" or not shape:
        return ParameterLayout.from_mesh(shape, dtype, np.array(ranks[: rng.randint(1, len(ranks))]), [None])
    if kind == "flat":
        part = -(-prod(shape) // len(ranks)) + rng.choice([0, 0, 1, 3])
        ranges = [(rank, i * part, (i + 1) * part) for i, rank in enumerate(ranks)]
        return ParameterLayout.from_flat_ranges(shape, dtype, ranges)
    first = rng.choice([n for n in range(1, len(ranks) + 1) if len(ranks) % n == 0])
    mesh = np.array(ranks).reshape(first, -1)
    placements = [rng.choice([None, *range(len(shape))]) for _ in range(2)]
    return ParameterLayout.from_mesh(shape, dtype, mesh, placements, rng.choice([(0, 1), (1, 0)]))
