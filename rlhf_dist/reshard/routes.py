"""Which piece of which parameter goes from which rank to which: pure data, made once and used every step.

    source boxes                       target boxes                      pieces = their intersections
    rank 0 |0000|                      rank 0 |000000..|                 [0:4, 0:4]  0 keeps, 0 -> 1
    rank 1 |1111|                      rank 1 |000000..|                 ...

Every element of every target box arrives exactly once: kept where its rank holds it already, else from a holder
on the same node, else from any. Of several holders equally near, the one that has sent least. Receivers that get
the same piece from the same sender form one multicast, a `Transfer` row with a group of receivers.

Parameters cut alike share one table (a Llama-70B has nine), so planning costs what its different structures do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from rlhf_dist.reshard.layout import Ints, Layout, LayoutError, ParameterLayout, show

LINKS = ("process", "node", "network")
"""Link classes, nearest first: within the own process, between processes of a node, between nodes."""

_SPLIT_ELEMENTS = 1 << 16
"""A larger piece with several equally near holders is cut among them."""


@dataclass(frozen=True, eq=False)
class Transfers:
    """Rows of one parameter: `sender[i]` gives elements [start[i], stop[i]) to the ranks of `group[i]`.

    A row whose group is the sender alone is a copy within its process.
    """

    start: Ints
    stop: Ints
    sender: Ints
    group: Ints
    """[n] index into `Routes.groups`."""

    @cached_property
    def volume(self) -> Ints:
        """[n] elements."""
        return np.asarray((self.stop - self.start).prod(axis=1), np.int64)


@dataclass(frozen=True, eq=False)
class Routes:
    """How `source` becomes `target`. Made by `make_routes`; the same in every process that makes it."""

    source: Layout
    target: Layout
    node: Ints
    """[world] node of each rank."""
    transfers: dict[str, Transfers]
    groups: list[tuple[int, ...]]
    """Receivers, ascending."""
    received: Ints = field(repr=False)
    """[world, 3] bytes that arrive at each rank, by link class (`LINKS`)."""
    sent: Ints = field(repr=False)
    """[world] bytes each rank gives to others, once per receiver."""

    @property
    def world(self) -> int:
        """Ranks of both sides together."""
        return self.target.world

    @property
    def moved(self) -> Ints:
        """[world] bytes each rank receives from other processes."""
        return np.asarray(self.received[:, 1:].sum(axis=1), np.int64)

    def rows_of(self, rank: int) -> Iterator[tuple[str, Transfers, Ints]]:
        """(parameter, its transfers, rows this rank sends or receives), in the order in which all ranks take them."""
        member = np.array([rank in group for group in self.groups], bool)
        mine: dict[int, Ints] = {}
        for name, rows in self.transfers.items():
            if id(rows) not in mine:
                mine[id(rows)] = np.flatnonzero((rows.sender == rank) | member[rows.group])
            if len(mine[id(rows)]):
                yield name, rows, mine[id(rows)]


def make_routes(source: Layout, target: Layout, node: Sequence[int] | None = None) -> Routes:
    """The routes; those already made for equal arguments are returned again.

    Ranks count over both sides: for separate worlds, `Layout.renumbered` puts the receivers behind the senders.
    node: [world] which machine each rank is on; None: all on one. Raises LayoutError naming parameter and boxes for
    layouts that are wrong or differ in names, shapes or dtypes.
    """
    nodes = tuple(node) if node is not None else (0,) * target.world
    key = (source.digest, target.digest, nodes)
    if key not in _plans:
        if len(_plans) >= _PLANS_KEPT:
            _plans.pop(next(iter(_plans)))
        _plans[key] = _make(source, target, np.array(nodes, np.int64))
    return _plans[key]


_PLANS_KEPT = 8
_plans: dict[tuple[str, str, tuple[int, ...]], Routes] = {}


def check_pair(source: Layout, target: Layout) -> None:
    """Raise LayoutError unless both layouts are sound and describe the same parameters."""
    source.check()
    target.check()
    if source.world != target.world:
        raise LayoutError(f"both layouts must count the same ranks, got {source.world} and {target.world}")
    for mine, other, what in ((source, target, "sent but not wanted"), (target, source, "wanted but not sent")):
        if names := mine.parameters.keys() - other.parameters.keys():
            few = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise LayoutError(f"both sides must name the same parameters; {what}: {few}")
    for name, s in source.parameters.items():
        t = target.parameters[name]
        if (s.shape, s.dtype) != (t.shape, t.dtype):
            at = f"boxes {show(s.box(0))} and {show(t.box(0))}"
            raise LayoutError(
                f"{name} must have one shape and dtype on both sides, got {list(s.shape)} {s.dtype} sent and "
                f"{list(t.shape)} {t.dtype} wanted ({at})"
            )


def lower_bound_bytes(source: Layout, target: Layout) -> Ints:
    """[world] bytes a rank must receive whatever the routes: its target boxes less what it holds of them."""
    bound = target.bytes_per_rank()
    held: dict[tuple[bytes, bytes], Ints] = {}
    for name, t in target.parameters.items():
        s = source.parameters[name]
        key = (s.structure, t.structure)
        if key not in held:
            held[key] = _held(s, t, target.world)
        bound -= held[key] * t.item_bytes
    return bound


def _held(s: ParameterLayout, t: ParameterLayout, world: int) -> Ints:
    """[world] elements of the target boxes that the rank holds in its source boxes."""
    order = np.argsort(s.rank, kind="stable")
    low = np.searchsorted(s.rank[order], t.rank, side="left")
    count = np.searchsorted(s.rank[order], t.rank, side="right") - low
    own_t = np.repeat(np.arange(len(t.rank)), count)
    own_s = order[np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())]
    size = np.minimum(s.stop[own_s], t.stop[own_t]) - np.maximum(s.start[own_s], t.start[own_t])
    held = np.zeros(world, np.int64)
    np.add.at(held, t.rank[own_t], np.maximum(size, 0).prod(axis=1))
    return held


@dataclass(frozen=True, eq=False)
class _Table:
    """The transfers of one structure, before a sender is chosen where several are as near."""

    start: Ints
    stop: Ints
    group: Ints
    fanout: Ints
    """[n] receivers other than the sender."""
    sender: Ints
    """[n] the only candidate, or -1."""
    choices: list[tuple[Ints, Ints]]
    """(rows, candidates), largest rows first."""
    receiver: Ints
    """Every (row, receiver) pair ..."""
    row: Ints


def _make(source: Layout, target: Layout, node: Ints) -> Routes:
    check_pair(source, target)
    if len(node) != target.world:
        raise LayoutError(f"node must name a machine for each of {target.world} ranks, got {len(node)}")
    groups: dict[tuple[int, ...], int] = {}
    tables: dict[tuple[bytes, bytes], _Table] = {}
    fixed: dict[tuple[bytes, bytes], tuple[Transfers, Ints, Ints]] = {}
    transfers: dict[str, Transfers] = {}
    received, sent = np.zeros((target.world, len(LINKS)), np.int64), np.zeros(target.world, np.int64)
    # Large parameters first, so that small ones even out what each sender gives.
    chosen = sorted(target.parameters, key=lambda name: -int(target.parameters[name].volume.sum()))
    for name in chosen:
        s, t = source.parameters[name], target.parameters[name]
        key = (s.structure, t.structure)
        if key not in tables:
            tables[key] = _table(s, t, node, groups)
        table = tables[key]
        if key not in fixed or table.choices:
            rows = Transfers(table.start, table.stop, _senders(table, sent), table.group)
            fixed[key] = (rows, *_traffic(table, rows, node, target.world))
        rows, came, went = fixed[key]
        transfers[name] = rows
        received += came * t.item_bytes
        sent += went * t.item_bytes
    ordered = {name: transfers[name] for name in target.parameters}
    return Routes(source, target, node, ordered, list(groups), received, sent)


def _table(s: ParameterLayout, t: ParameterLayout, node: Ints, groups: dict[tuple[int, ...], int]) -> _Table:
    """One row per (intersection, place the piece comes from); see `make_routes` for which place that is."""
    world, machines = len(node), int(node.max()) + 1
    first_s, set_s = s.distinct
    first_t, set_t = t.distinct
    holds = np.zeros((len(first_s), world), bool)
    holds[set_s, s.rank] = True
    near = np.zeros((len(first_s), machines), bool)
    near[set_s, node[s.rank]] = True
    a, b = _meeting(s.start[first_s], s.stop[first_s], t.start[first_t], t.stop[first_t])
    by_set = np.argsort(set_t, kind="stable")
    sizes = np.bincount(set_t, minlength=len(first_t))
    begins = np.cumsum(sizes) - sizes
    count = sizes[b]
    piece = np.repeat(np.arange(len(a)), count)
    receiver = t.rank[by_set[np.repeat(begins[b] - np.cumsum(count) + count, count) + np.arange(count.sum())]]
    # Place: -1 the receiver itself (told apart by rank below), a machine, or `machines` for anywhere.
    own = holds[a[piece], receiver]
    at = np.where(near[a[piece], node[receiver]], node[receiver], machines)
    place = np.where(own, machines + 1 + receiver, at)
    order = np.lexsort((receiver, place, piece))
    piece, receiver, place = piece[order], receiver[order], place[order]
    new = np.ones(len(piece), bool)
    new[1:] = (piece[1:] != piece[:-1]) | (place[1:] != place[:-1])
    begin = np.flatnonzero(new)
    rows = _Rows(groups)
    for lo, hi in zip(begin.tolist(), [*begin[1:].tolist(), len(piece)], strict=True):
        i = int(piece[lo])
        candidates = _candidates(holds[a[i]], int(place[lo]), node, machines)
        start = np.maximum(s.start[first_s[a[i]]], t.start[first_t[b[i]]])
        stop = np.minimum(s.stop[first_s[a[i]]], t.stop[first_t[b[i]]])
        rows.add(start, stop, tuple(receiver[lo:hi].tolist()), candidates)
    return rows.table(len(s.shape))


def _meeting(s_start: Ints, s_stop: Ints, t_start: Ints, t_stop: Ints) -> tuple[Ints, Ints]:
    """Pairs (source box, target box) that have elements in common."""
    found = []
    step = max(1, (1 << 22) // max(len(t_start), 1))
    for k in range(0, len(s_start), step):
        some = slice(k, k + step)
        meets = np.ones((len(s_start[some]), len(t_start)), bool)
        for dim in range(s_start.shape[1]):
            meets &= s_start[some, None, dim] < t_stop[None, :, dim]
            meets &= s_stop[some, None, dim] > t_start[None, :, dim]
        i, j = np.nonzero(meets)
        found.append((i + k, j))
    return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])


@lru_cache(maxsize=4096)
def _ranks(held: bytes) -> Ints:
    return np.flatnonzero(np.frombuffer(held, bool))


def _candidates(holds: npt.NDArray[np.bool_], place: int, node: Ints, machines: int) -> Ints:
    if place > machines:
        return np.array([place - machines - 1], np.int64)
    ranks = _ranks(holds.tobytes())
    return ranks if place == machines else ranks[node[ranks] == place]


class _Rows:
    """Collects the rows of a table; a large piece that several ranks could send is cut among them."""

    def __init__(self, groups: dict[tuple[int, ...], int]) -> None:
        self._groups = groups
        self._rows: list[tuple[Ints, Ints, int, tuple[int, ...], Ints]] = []

    def add(self, start: Ints, stop: Ints, receivers: tuple[int, ...], candidates: Ints) -> None:
        group = self._groups.setdefault(receivers, len(self._groups))
        length = int(stop[0] - start[0]) if len(start) else 1
        cuts = min(len(candidates), length)
        if cuts == 1 or int((stop - start).prod()) < _SPLIT_ELEMENTS:
            self._rows.append((start, stop, group, receivers, candidates))
            return
        edges = start[0] + np.arange(cuts + 1) * length // cuts
        for lo, hi in zip(edges[:-1], edges[1:], strict=True):
            one, two = start.copy(), stop.copy()
            one[0], two[0] = lo, hi
            self._rows.append((one, two, group, receivers, candidates))

    def table(self, dims: int) -> _Table:
        start = np.array([row[0] for row in self._rows], np.int64).reshape(len(self._rows), dims)
        stop = np.array([row[1] for row in self._rows], np.int64).reshape(len(self._rows), dims)
        sender = np.array([row[4][0] if len(row[4]) == 1 else -1 for row in self._rows], np.int64)
        size = (stop - start).prod(axis=1)
        sets: dict[bytes, list[int]] = {}
        for i in np.flatnonzero(sender < 0).tolist():
            sets.setdefault(self._rows[i][4].tobytes(), []).append(i)
        choices = []
        for members in sets.values():
            load = np.array([size[i] * len(self._rows[i][3]) for i in members])
            rows = np.array(members, np.int64)[np.argsort(-load, kind="stable")]
            choices.append((rows, self._rows[members[0]][4]))
        count = np.array([len(row[3]) for row in self._rows], np.int64)
        receiver = np.array([rank for row in self._rows for rank in row[3]], np.int64)
        row = np.repeat(np.arange(len(count)), count)
        group = np.array([row[2] for row in self._rows], np.int64)
        own = (count == 1) & (receiver[np.cumsum(count) - 1] == sender)
        return _Table(start, stop, group, np.where(own, 0, count), sender, choices, receiver, row)


def _senders(table: _Table, sent: Ints) -> Ints:
    """[n] senders; where there is a choice, the largest rows to those who have sent least, in turn."""
    sender = table.sender.copy()
    for rows, candidates in table.choices:
        idle_first = candidates[np.argsort(sent[candidates], kind="stable")]
        sender[rows] = idle_first[np.arange(len(rows)) % len(candidates)]
    return sender


def _traffic(table: _Table, rows: Transfers, node: Ints, world: int) -> tuple[Ints, Ints]:
    """Elements received [world, links] and sent [world]."""
    sender = rows.sender[table.row]
    link = np.where(sender == table.receiver, 0, np.where(node[sender] == node[table.receiver], 1, 2))
    volume = rows.volume[table.row]
    came = np.zeros((world, len(LINKS)), np.int64)
    np.add.at(came, (table.receiver, link), volume)
    went = np.zeros(world, np.int64)
    np.add.at(went, rows.sender, rows.volume * table.fanout)
    return came, went
