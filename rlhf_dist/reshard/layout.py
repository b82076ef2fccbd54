"""Which part of which parameter every rank holds: pure data, in numpy.

A `Layout` gives for each parameter its global shape, its dtype and *boxes*: hyper-rectangles [start, stop) in
the coordinates of the whole parameter, each on a rank. Parameters bear their names in a Hugging Face
checkpoint, and tied ones come once. Where a box lies in a process is that process's own affair: its shards are

    shards[name][k]    a tensor (any view) of the shape of the k-th box of its rank, in the layout's order

Sources of boxes, for a parameter [5, 4] on 2 ranks:

    from_mesh(mesh [0, 1], placements [0])       rank 0: rows 0-2       rank 1: rows 3-4     DTensor, FSDP2
    from_flat_ranges([(0, 0, 10), (1, 10, 20)])  rank 0: rows 0-1, then half of row 2        DeepSpeed ZeRO
                                                 rank 1: half of row 2, then rows 3-4

Boxes on different ranks are equal (copies) or disjoint, boxes of one rank are disjoint, and together they
cover the parameter: `Layout.check` says where not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Box = tuple[tuple[int, int], ...]
"""(start, stop) of each dim."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


class LayoutError(ValueError):
    """A layout, or a pair of them, that no routes can be made of."""


@dataclass(frozen=True, eq=False)
class ParameterLayout:
    """The boxes of one parameter."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: float32, bfloat16, ..."""
    rank: Ints
    """[n] holder of each box."""
    start: Ints
    """[n, dims] first element."""
    stop: Ints
    """[n, dims] one past the last element; never empty."""

    @classmethod
    def from_boxes(cls, shape: Sequence[int], dtype: str, boxes: Iterable[tuple[int, Box]]) -> ParameterLayout:
        """Boxes as (rank, ((start, stop), ...)); empty ones are left out."""
        kept = [(rank, box) for rank, box in boxes if all(stop > start for start, stop in box)]
        corners = np.array([box for _, box in kept], np.int64).reshape(len(kept), len(shape), 2)
        rank = np.array([rank for rank, _ in kept], np.int64)
        return cls(tuple(shape), dtype, rank, corners[:, :, 0].copy(), corners[:, :, 1].copy())

    @classmethod
    def from_mesh(
        cls,
        shape: Sequence[int],
        dtype: str,
        mesh: npt.NDArray[np.integer],
        placements: Sequence[int | None],
        order: Sequence[int] | None = None,
    ) -> ParameterLayout:
        """Sharded over the axes of a device mesh, as DTensor cuts: ceil(n / size) each, the last ones less or none.

        mesh: ranks by coordinate. placements: per axis the dim it cuts, or None where it holds copies. order: in
        which order axes cut (matters where two cut one dim); None: left to right.
        """
        coordinates = np.indices(mesh.shape).reshape(mesh.ndim, -1)
        start = np.zeros((mesh.size, len(shape)), np.int64)
        length = np.tile(np.array(shape, np.int64), (mesh.size, 1))
        for axis in order if order is not None else range(mesh.ndim):
            dim = placements[axis]
            if dim is None:
                continue
            chunk = -(-length[:, dim] // mesh.shape[axis])
            first = np.minimum(coordinates[axis] * chunk, length[:, dim])
            start[:, dim] += first
            length[:, dim] = np.minimum(chunk, length[:, dim] - first)
        held = (length > 0).all(axis=1)
        ranks = mesh.reshape(-1).astype(np.int64)
        return cls(tuple(shape), dtype, ranks[held], start[held], (start + length)[held])

    @classmethod
    def from_flat_ranges(
        cls, shape: Sequence[int], dtype: str, ranges: Iterable[tuple[int, int, int]]
    ) -> ParameterLayout:
        """Ranges (rank, begin, end) of the flattened parameter; what lies beyond its end is padding and left out."""
        boxes = [(rank, box) for rank, begin, end in ranges for box in flat_range_boxes(shape, begin, end)]
        return cls.from_boxes(shape, dtype, boxes)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def volume(self) -> Ints:
        """[n] elements of each box."""
        return np.asarray((self.stop - self.start).prod(axis=1), np.int64)

    @cached_property
    def structure(self) -> bytes:
        """Equal for parameters that are cut alike: shape and boxes, not dtype."""
        digest = hashlib.blake2b(repr(self.shape).encode(), digest_size=16)
        for array in (self.rank, self.start, self.stop):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()

    @cached_property
    def distinct(self) -> tuple[Ints, Ints]:
        """(index of the first of each set of equal boxes [m], set of each box [n])."""
        corners = np.concatenate([self.start, self.stop], axis=1)
        if not corners.shape[1]:  # a scalar
            return np.zeros(min(len(corners), 1), np.int64), np.zeros(len(corners), np.int64)
        _, first, inverse = np.unique(corners, axis=0, return_index=True, return_inverse=True)
        return first.astype(np.int64), inverse.reshape(-1).astype(np.int64)

    def boxes_of(self, rank: int) -> list[Box]:
        """The boxes of one rank, in the order of its shards."""
        return [self.box(int(k)) for k in np.flatnonzero(self.rank == rank)]

    def box(self, k: int) -> Box:
        """Box k as ((start, stop), ...)."""
        return tuple(zip(self.start[k].tolist(), self.stop[k].tolist(), strict=True))

    def problem(self, world: int) -> str | None:
        """What is wrong with the boxes, or None."""
        for k in np.flatnonzero((self.rank < 0) | (self.rank >= world))[:1]:
            return f"box {show(self.box(k))} must be on a rank in 0..{world - 1}, got rank {self.rank[k]}"
        bad = (self.start < 0) | (self.stop > np.array(self.shape, np.int64)) | (self.stop <= self.start)
        for k in np.flatnonzero(bad.any(axis=1))[:1]:
            return f"box {show(self.box(k))} of rank {self.rank[k]} must lie inside the shape and hold something"
        first, inverse = self.distinct
        pair = np.stack([self.rank, inverse], axis=1)
        _, at, times = np.unique(pair, axis=0, return_index=True, return_counts=True)
        for k in at[times > 1][:1]:
            return f"rank {self.rank[k]} must hold box {show(self.box(int(k)))} once, got it {times.max()} times"
        if clash := self._overlap(first):
            a, b = clash
            return (
                f"boxes must be equal or disjoint, got {show(self.box(a))} on rank {self.rank[a]} and "
                f"{show(self.box(b))} on rank {self.rank[b]}"
            )
        covered, whole = int(self.volume[first].sum()), prod(self.shape)
        if covered != whole:
            held = ", ".join(show(self.box(int(k))) for k in first[:4]) + (", ..." if len(first) > 4 else "")
            return f"boxes must cover all {whole} elements, got {covered} in [{held}]"
        return None

    def _overlap(self, first: Ints) -> tuple[int, int] | None:
        # Sorted by their start in dim 0, only neighbours until the next start beyond a box's stop can meet it.
        if not self.shape or len(first) < 2:
            return None
        order = first[np.argsort(self.start[first, 0], kind="stable")]
        start, stop = self.start[order], self.stop[order]
        last = np.searchsorted(start[:, 0], stop[:, 0], side="left")
        for i in range(len(order) - 1):
            others = slice(i + 1, int(last[i]))
            meets = ((start[others] < stop[i]) & (stop[others] > start[i])).all(axis=1)
            if meets.any():
                return int(order[i]), int(order[i + 1 + int(np.argmax(meets))])
        return None


@dataclass(frozen=True, eq=False)
class Layout:
    """What `world` ranks hold of every parameter."""

    world: int
    parameters: Mapping[str, ParameterLayout]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def check(self) -> Layout:
        """Itself; raises LayoutError naming the first parameter and boxes that break a rule."""
        seen: dict[bytes, str | None] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype not in ITEM_BYTES:
                raise LayoutError(f"{name}: dtype must be one of {', '.join(ITEM_BYTES)}, got {parameter.dtype}")
            if parameter.structure not in seen:
                seen[parameter.structure] = parameter.problem(self.world)
            if problem := seen[parameter.structure]:
                raise LayoutError(f"{name} of shape {list(parameter.shape)}: {problem}")
        return self

    def as_dtype(self, dtype: str) -> Layout:
        """The same boxes in another dtype: what is sent is cast before it travels."""
        return Layout(self.world, {name: replace(p, dtype=dtype) for name, p in self.parameters.items()})

    def renumbered(self, rank_of: Sequence[int], world: int) -> Layout:
        """Rank r becomes rank_of[r] of a world of `world` ranks."""
        new = np.asarray(rank_of, np.int64)
        moved = {name: replace(p, rank=new[p.rank]) for name, p in self.parameters.items()}
        return Layout(world, moved)

    def bytes_per_rank(self) -> Ints:
        """[world] bytes held."""
        held = np.zeros(self.world, np.int64)
        for p in self.parameters.values():
            np.add.at(held, p.rank, p.volume * p.item_bytes)
        return held

    @cached_property
    def digest(self) -> str:
        """The same for equal layouts, in every process."""
        digest = hashlib.blake2b(str(self.world).encode(), digest_size=16)
        for name, p in self.parameters.items():
            digest.update(f"{name}\0{p.dtype}\0".encode() + p.structure)
        return digest.hexdigest()


def flat_range_boxes(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """[begin, end) of a flattened tensor as boxes, in flat order: contiguous one after the other in memory.

    At most 2 * dims - 1 of them: [part of a row][whole rows][part of a row], and so on inward. What reaches
    beyond the tensor is cut off.
    """
    begin, end = max(begin, 0), min(end, prod(shape))
    if begin >= end:
        return []
    if len(shape) <= 1:
        return [((begin, end),)] if shape else [()]
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner
    if first > last:  # inside one row
        return _rows(last, shape, begin - last * inner, end - last * inner)
    boxes = _rows(first - 1, shape, begin - (first - 1) * inner, inner) if begin % inner else []
    if first < last:
        boxes.append(((first, last), *((0, size) for size in shape[1:])))
    return boxes + (_rows(last, shape, 0, end - last * inner) if end % inner else [])


def _rows(row: int, shape: Sequence[int], begin: int, end: int) -> list[Box]:
    return [((row, row + 1), *box) for box in flat_range_boxes(shape[1:], begin, end)]


def show(box: Box) -> str:
    """A box as in numpy: [0:4, 2:8]."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
