"""Transfer protocols: which rows go to which rank, and which ranks answer. Pure functions over mesh axes.

Example: 8 ranks as dp=2, pp=2, tp=2 (the last axis varies fastest), 6 rows, protocol ROWS:

    rank        0  1  2  3  4  5  6  7
    dp          0  0  0  0  1  1  1  1
    pp          0  0  1  1  0  0  1  1
    tp          0  1  0  1  0  1  0  1
    rows        a  a  a  a  b  b  b  b      split over dp (balanced by tokens), repeated over the rest
    answers           x           x         tp = 0, pp = last

This is HybridFlow's 3D_PROTO (arXiv 2409.19256, table of section 4); on a mesh with dp only it is
DP_PROTO. Adding a protocol is adding a `TransferProtocol` value.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf_dist.batch import IntArray


@dataclass(frozen=True)
class Mesh:
    """Named axes over ranks 0..size-1, row-major: the last axis varies fastest."""

    axes: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return int(np.prod(list(self.axes.values()), dtype=np.int64))

    def coordinate(self, rank: int) -> dict[str, int]:
        """Rank -> its index on every axis."""
        at: dict[str, int] = {}
        for axis in reversed(list(self.axes)):
            rank, at[axis] = divmod(rank, self.axes[axis])
        return at


@dataclass(frozen=True, kw_only=True)
class TransferProtocol:
    """How rows are spread over a mesh and where results are read."""

    name: str
    split: tuple[str, ...] = ()
    """Axes that rows are split over; over all other axes they are repeated. Empty: everyone gets all rows."""
    answer: Mapping[str, int] | None = None
    """Ranks that answer: axis -> index (-1 for the last). Axes not named: every index. None: all ranks."""

    def parts(self, mesh: Mesh) -> int:
        """Into how many parts the rows are cut."""
        return int(np.prod([mesh.axes.get(axis, 1) for axis in self.split], dtype=np.int64))

    def part_of(self, mesh: Mesh, rank: int) -> int:
        """Which part `rank` gets."""
        at, part = mesh.coordinate(rank), 0
        for axis in self.split:
            if axis in mesh.axes:
                part = part * mesh.axes[axis] + at[axis]
        return part

    def answering(self, mesh: Mesh) -> list[int]:
        """Ranks whose result is read, in the order of their parts."""
        ranks = list(range(mesh.size))
        for axis, index in (self.answer or {}).items():
            if axis in mesh.axes:
                ranks = [rank for rank in ranks if mesh.coordinate(rank)[axis] == index % mesh.axes[axis]]
        return sorted(ranks, key=lambda rank: (self.part_of(mesh, rank), rank))


ROWS = TransferProtocol(name="ROWS", split=("dp",), answer={"tp": 0, "sp": 0, "pp": -1})
"""3D_PROTO and DP_PROTO: split over dp, repeat over the rest, answer from tp = 0, pp = last."""
ALL_MICRO_ROWS = TransferProtocol(name="ALL_MICRO_ROWS", split=("dp", "micro_dp"), answer={"tp": 0, "pp": -1})
"""3D_ALL_MICRO_DP: also split over the micro data-parallel groups of generation."""
ONE_TO_ALL = TransferProtocol(name="ONE_TO_ALL")
"""Everyone gets everything, everyone answers."""
PP_ONLY = TransferProtocol(name="PP_ONLY", answer={"tp": 0, "dp": 0})
"""3D_PP_ONLY: everyone gets everything, one rank of every pipeline stage answers."""


def balance(
    tokens: npt.ArrayLike,
    parts: int,
    *,
    groups: npt.ArrayLike | None = None,
    home: npt.ArrayLike | None = None,
    slack: float = 0.05,
) -> list[IntArray]:
    """Row indices of each part, parts of about equal token count, rows ascending within a part.

    tokens: [B] tokens of each row. groups: [B] ids; rows of one id stay together. home: [B] the part
    that already holds a row's data, -1 for none; rows stay home as long as no part then carries more
    than (1 + slack) of the mean (or one unit, when a unit is larger than that).

    Largest unit first to the least loaded part: at most 4/3 of the best possible maximum (Graham 1969), in
    O(B log B + B log parts). Few large units may leave a part far above the mean; then `karmarkar_karp` is asked
    too, and the better of both taken. Deterministic.
    """
    weight = np.asarray(tokens, dtype=np.int64)
    unit_of_row = np.arange(len(weight))
    if groups is not None:
        _, unit_of_row = np.unique(np.asarray(groups), return_inverse=True)
    count = int(unit_of_row.max()) + 1 if len(weight) else 0
    load = np.bincount(unit_of_row, weights=weight, minlength=count).astype(np.int64)
    part_of_unit = np.full(count, -1, dtype=np.int64)
    filled = np.zeros(parts, dtype=np.int64)
    if home is not None:
        home_of_unit = np.full(count, -1, dtype=np.int64)
        home_of_unit[unit_of_row[::-1]] = np.asarray(home, dtype=np.int64)[::-1]
        limit = (1 + slack) * load.sum() / parts
        _stay_home(part_of_unit, filled, load, home_of_unit, limit)
    left = np.flatnonzero(part_of_unit < 0)
    left = left[np.argsort(-load[left], kind="stable")]
    part_of_unit[left] = _largest_first(load[left], filled)
    if home is None and count and (worst := _largest_part(load, part_of_unit, parts)) > _EVEN * load.sum() / parts:
        differenced = karmarkar_karp(load, parts)
        if _largest_part(load, differenced, parts) < worst:
            part_of_unit = differenced
    part_of_row = part_of_unit[unit_of_row] if len(weight) else np.empty(0, dtype=np.int64)
    by_part = np.argsort(part_of_row, kind="stable").astype(np.int64)
    return np.split(by_part, np.searchsorted(part_of_row[by_part], np.arange(1, parts)))


def _stay_home(part_of_unit: IntArray, filled: IntArray, load: IntArray, home: IntArray, limit: float) -> None:
    """Put units in their home part, the largest first, while it carries at most `limit`; fills the first two."""
    placed = home >= 0
    filled[:] = np.bincount(home[placed], weights=load[placed], minlength=len(filled))
    fits = filled <= limit
    stays = placed & fits[home]
    part_of_unit[stays] = home[stays]
    for part in np.flatnonzero(~fits).tolist():
        filled[part] = 0
        at_home = np.flatnonzero(home == part)
        for unit in at_home[np.argsort(-load[at_home], kind="stable")].tolist():
            if filled[part] + load[unit] <= limit:
                part_of_unit[unit] = part
                filled[part] += load[unit]


_EVEN = 1.01
"""A largest part below this share of the mean is even enough not to look for a better cut."""


def karmarkar_karp(load: npt.ArrayLike, parts: int) -> IntArray:
    """[units] part of each unit by the largest differencing method (Karmarkar and Karp 1982), for `parts` parts.

    Every unit starts as a partition of its own: itself and parts - 1 empty sets. The two partitions with the
    largest spread (largest less smallest set) are merged, the largest set of one with the smallest of the other,
    until one is left. O(units * parts * log parts); better than largest-first where parts hold few units each.
    """
    weight = np.asarray(load, dtype=np.int64)
    sets: list[tuple[int, int] | int] = list(range(len(weight)))  # a unit, or two sets joined
    heap: list[tuple[int, int, IntArray, IntArray]] = []
    for unit, size in enumerate(weight.tolist()):
        sums = np.zeros(parts, np.int64)
        sums[-1] = size
        members = np.full(parts, -1, np.int64)
        members[-1] = unit
        heap.append((-size if parts > 1 else 0, unit, sums, members))
    heapq.heapify(heap)
    order = len(weight)
    while len(heap) > 1:
        _, _, sums, members = heapq.heappop(heap)
        _, _, other_sums, other_members = heapq.heappop(heap)
        joined = sums + other_sums[::-1]
        both = np.where(members < 0, other_members[::-1], members)
        for at in np.flatnonzero((members >= 0) & (other_members[::-1] >= 0)):
            sets.append((int(members[at]), int(other_members[::-1][at])))
            both[at] = len(sets) - 1
        ascending = np.argsort(joined, kind="stable")
        joined, both = joined[ascending], both[ascending]
        heapq.heappush(heap, (int(joined[0] - joined[-1]), order, joined, both))
        order += 1
    part_of_unit = np.zeros(len(weight), np.int64)
    for part, root in enumerate(heap[0][3].tolist() if heap else []):
        pending = [root] if root >= 0 else []
        while pending:
            entry = sets[pending.pop()]
            if isinstance(entry, tuple):
                pending += entry
            else:
                part_of_unit[entry] = part
    return part_of_unit


def _largest_first(load: IntArray, filled: IntArray) -> IntArray:
    """[units] part of each unit, units in descending order of load, each to the part with the least so far."""
    heap = [(int(tokens), part) for part, tokens in enumerate(filled)]
    heapq.heapify(heap)
    chosen = np.empty(len(load), np.int64)
    for unit, size in enumerate(load.tolist()):
        smallest, part = heapq.heappop(heap)
        chosen[unit] = part
        heapq.heappush(heap, (smallest + size, part))
    return chosen


def _largest_part(load: IntArray, part_of_unit: IntArray, parts: int) -> int:
    return int(np.bincount(part_of_unit, weights=load, minlength=parts).max())


def mini_batch_of_row(groups: IntArray, mini_batches: int, seed: Sequence[int]) -> IntArray:
    """[B] in 0..mini_batches-1: a random cut that keeps groups whole and depends on nothing but its arguments.

    Mini-batches hold equally many groups (up to one). A filter may leave fewer groups than mini-batches:
    then some mini-batches are empty, and the optimizer makes no step for them.
    """
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    if mini_batches == 1 or len(groups) == 0:
        return np.zeros(len(groups), dtype=np.int64)
    appearance = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    shuffled = np.random.default_rng(list(seed)).permutation(len(first))
    slot = shuffled[appearance[inverse]]
    return (slot * mini_batches // len(first)).astype(np.int64)
