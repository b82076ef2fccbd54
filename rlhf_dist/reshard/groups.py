"""Which ranks train together and which generate together: HybridFlow's 3D-HybridEngine (arXiv 2409.19256, section 5).

p-t-d trains (pipeline, tensor, data parallel), p_g-t_g generates; N = p*t*d ranks, and each training replica of
p*t ranks becomes d_g = p*t / (p_g*t_g) generation replicas (micro data parallel). Train 1-4-2, generate 1-2:

    rank (from 0)          0 1 2 3 | 4 5 6 7
    training shard         0 1 2 3 | 0 1 2 3      quarters of the model
    generation, vanilla    0 1 0 1 | 0 1 0 1      halves: ranks 1 and 2 hold nothing of what they need
    zero redundancy        0 0 1 1 | 0 0 1 1      the training shard lies inside the generation shard
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from rlhf_dist.config import LanguageModelConfig
from rlhf_dist.reshard.layout import Ints, Layout, LayoutError, ParameterLayout

Grouping = Literal["vanilla", "zero_redundancy"]
Groups = list[list[int]]


@dataclass(frozen=True)
class Parallel:
    """Sizes of the two phases."""

    p: int
    t: int
    d: int
    p_g: int = 1
    t_g: int = 1

    def __post_init__(self) -> None:
        if min(self.p, self.t, self.d, self.p_g, self.t_g) < 1 or self.p % self.p_g or self.t % self.t_g:
            raise LayoutError(
                f"p_g must divide p and t_g must divide t, all at least 1, got p-t-d {self.p}-{self.t}-{self.d} and "
                f"p_g-t_g {self.p_g}-{self.t_g}"
            )

    @property
    def world(self) -> int:
        """N, ranks."""
        return self.p * self.t * self.d

    @property
    def d_g(self) -> int:
        """Generation replicas inside one training replica."""
        return self.p * self.t // (self.p_g * self.t_g)


def training_grid(sizes: Parallel) -> Ints:
    """[d, p, t] ranks: tensor-parallel groups consecutive, pipeline stages next, data parallel at stride p*t."""
    return np.arange(sizes.world).reshape(sizes.d, sizes.p, sizes.t)


def generation_grid(sizes: Parallel, grouping: Grouping) -> Ints:
    """[d, d_g, p_g, t_g] ranks.

    vanilla: consecutive, as in training. zero_redundancy: generation tensor and pipeline ranks at strides t/t_g and
    p/p_g, so that training rank (pi, tau) generates as (pi // (p/p_g), tau // (t/t_g)).
    """
    s = sizes
    if grouping == "vanilla":
        return np.arange(s.world).reshape(s.d, s.d_g, s.p_g, s.t_g)
    cut = training_grid(s).reshape(s.d, s.p_g, s.p // s.p_g, s.t_g, s.t // s.t_g)
    return cut.transpose(0, 2, 4, 1, 3).reshape(s.d, s.d_g, s.p_g, s.t_g)


def groups_along(grid: Ints, axis: int) -> Groups:
    """The groups of ranks that differ in one axis of a grid, sorted."""
    size = grid.shape[axis]
    return sorted(np.moveaxis(grid, axis, -1).reshape(-1, size).tolist())


@dataclass(frozen=True)
class Cut:
    """How one parameter is divided."""

    shape: tuple[int, ...]
    dim: int | None
    """Dim that tensor parallelism cuts; None: copied."""
    stage: Fraction = Fraction(0)
    """Where in the pipeline it lies, in [0, 1): layer i of L is i/L."""


def parallel_layout(parameters: Mapping[str, Cut], grid: Ints, dtype: str) -> Layout:
    """The layout of p-t groups: `grid` is [..., p, t] ranks, copies over the leading axes."""
    *_, p, t = grid.shape
    copies = grid.reshape(-1, p, t)
    found = {}
    for name, cut in parameters.items():
        if cut.dim is not None and cut.shape[cut.dim] % t:
            raise LayoutError(f"{name} of shape {list(cut.shape)}: dim {cut.dim} must be a multiple of t = {t}")
        mesh = copies[:, int(cut.stage * p), :]
        found[name] = ParameterLayout.from_mesh(cut.shape, dtype, mesh, [None, cut.dim])
    return Layout(grid.size, found)


@dataclass(frozen=True)
class TransitionCost:
    """Per GPU, as fractions of the actor's size M (HybridFlow, Table 2)."""

    received: Fraction
    peak: Fraction
    redundant: Fraction


def transition_cost(sizes: Parallel, engine: Literal["DeepSpeed-Chat", "HybridFlow-V", "HybridFlow"]) -> TransitionCost:
    """Table 2: gathering everything over all ranks, over a model-parallel group, or what the shard lacks."""
    tp, gen = sizes.t * sizes.p, sizes.t_g * sizes.p_g
    if engine == "HybridFlow":
        return TransitionCost(Fraction(tp - gen, gen * tp), Fraction(1, gen), Fraction(0))
    held = Fraction(1, tp if engine == "HybridFlow-V" else sizes.world)
    return TransitionCost(1 - held, Fraction(1), held)


def rollout_axes(world: int, t_g: int, *, train_t: int = 1, ranks_per_node: int | None = None) -> dict[str, int]:
    """Mesh axes dp, tp, micro_dp (the last varies fastest) of colocated generation: what keeps most weights in place.

    Fully sharded training (train_t = 1) cuts every parameter over the ranks in order, so consecutive ranks take the
    same generation shard: 4 ranks, t_g = 2, copies {0, 2} and {1, 3}. A training tensor-parallel group of train_t
    consecutive ranks is a generation group or splits into several; where it is smaller than one, generation groups
    are consecutive ranks. Generation groups never leave a node of `ranks_per_node` ranks (None: all of them).
    """
    node = ranks_per_node or world
    if world % node or node % t_g or node % train_t or (t_g % train_t and train_t % t_g):
        raise LayoutError(
            f"a node's ranks must divide the world and be a multiple of both tensor-parallel sizes, one of which "
            f"divides the other, got world {world}, {node} a node, generation {t_g}, training {train_t}"
        )
    if train_t == 1:
        return {"dp": world // node, "tp": t_g, "micro_dp": node // t_g}
    if t_g <= train_t:
        return {"dp": world // train_t, "tp": t_g, "micro_dp": train_t // t_g}
    return {"dp": world // t_g, "tp": t_g, "micro_dp": 1}


def colocated_axes(config: LanguageModelConfig, nodes: Sequence[int]) -> dict[str, int]:
    """`rollout_axes` of a model that trains and generates on the same ranks; nodes: [world] machine of each rank."""
    world, t_g = len(nodes), config.rollout.tensor_parallel
    train_t = config.engine.tensor_parallel
    # Copies of the sharded parameters are like nodes: sharding starts anew in each.
    block = min(_block(nodes), world // config.engine.replicas)
    fits = not (world % block or block % t_g or block % train_t or (t_g % train_t and train_t % t_g))
    # Where ranks are spread unevenly, groups of consecutive ranks.
    return rollout_axes(world, t_g, train_t=train_t if fits else 1, ranks_per_node=block if fits else t_g)


def consecutive_axes(config: LanguageModelConfig, world: int) -> dict[str, int]:
    """`rollout_axes` of ranks that only generate: nothing is in place, so consecutive ranks share a copy."""
    t_g = config.rollout.tensor_parallel
    return {"dp": world // t_g, "tp": t_g, "micro_dp": 1}


def _block(nodes: Sequence[int]) -> int:
    """Consecutive ranks on one machine: the same number on each, or 1."""
    size = next((rank for rank, node in enumerate(nodes) if node != nodes[0]), len(nodes))
    even = len(nodes) % size == 0 and all(len(set(nodes[k : k + size])) == 1 for k in range(0, len(nodes), size))
    return size if even else 1


def rollout_grid(axes: Mapping[str, int]) -> Ints:
    """[copies, tp] ranks of `rollout_axes`."""
    dp, tp, micro = axes["dp"], axes["tp"], axes["micro_dp"]
    return np.arange(dp * tp * micro).reshape(dp, tp, micro).swapaxes(1, 2).reshape(dp * micro, tp)
