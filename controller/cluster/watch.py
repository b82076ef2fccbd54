"""Watches the processes that calls wait for, and finds what was lost first when one fails.

    runner ── look(waited), once a second ──> a call has lasted ASK_AFTER_S?
                 │                              └─ every EVERY_S: beat ──> each process of it, none waited for
                 │   silent ones ── beat(about=pids) ──> a neighbour on their node; the controller sees its own node
                 └─> blame.decide ──> FirstCause, or None
    runner ── first_cause(waited), when a call has failed ──> the same, asked at once, until all have answered

Nothing is asked while calls are short. A round costs the controller one small actor call a rank (docs/adr/116).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.cluster.blame import MOST_NAMED, SILENT_S, FirstCause, Seen, decide
from controller.cluster.failure_text import shown
from controller.cluster.head import HeadWatch
from controller.cluster.pool import BEATS, Pool
from controller.cluster.replies import Replies
from controller.cluster.stacks import answered
from rlhf_dist.heartbeat import Beat
from rlhf_dist.process_state import Exits, ProcessState, parent_of

ASK_AFTER_S = 5.0
"""A call may last so long before anybody asks."""
EVERY_S = 5.0
"""Between two questions to one process."""
LATE_S = 3.0
"""A question is unanswered after so long: neighbours are asked."""
PAUSE_S = 0.1
"""Between two looks for answers, while a cause is looked for."""
DYING_S = 3.0
"""What Ray says ended is seen to have ended within so long, and what ended with it."""
WITNESSES = 2
"""Processes on each node that watch the others there."""


@dataclass(frozen=True)
class Waited:
    """A process that a call waits for."""

    pool: Pool
    rank: int
    since_s: float
    """`time.perf_counter` at the start of the call."""


@dataclass(eq=False)
class _Known:
    """A process that was asked."""

    pool: Pool
    rank: int
    ref: Any = None
    """Of the question that it has not answered."""
    asked_s: float = float("-inf")
    beat: Beat | None = None
    state: ProcessState | None = None
    stopped_from_s: float | None = None

    def silent_s(self, now: float) -> float:
        return now - self.asked_s if self.ref is not None and now - self.asked_s > LATE_S else 0.0


class Watch:
    """The processes of a cluster, as the controller watches them."""

    def __init__(
        self, replies: Replies, folder: Path | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """folder: for stacks; None: they are not kept."""
        self._replies, self._folder, self._clock = replies, folder, clock
        self._exits = Exits()
        self._pools: list[Pool] = []
        self._known: dict[tuple[str, int], _Known] = {}
        self._addresses: dict[str, str] = {}
        self._raylets: dict[str, int] = {}
        """Node id -> pid of Ray's process there; of this node only."""
        self._here = ""
        self._head: HeadWatch | None = None

    def add(self, pool: Pool) -> None:
        """Watch a pool's processes from now on, here and on the nodes they are on."""
        import ray

        self._pools.append(pool)
        self._here = self._here or str(ray.get_runtime_context().get_node_id())
        if not set(pool.node_ids) <= set(self._addresses):
            self._addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        if self._head is None:
            self._head = HeadWatch(self._exits)
        for node in dict.fromkeys(pool.node_ids):
            pids = [pid for pid, where in zip(pool.pids, pool.node_ids, strict=True) if where == node]
            if node == self._here:
                raylet = parent_of(pids[0])
                self._raylets[node] = raylet or 0
                self._exits.watch([*pids, *([raylet] if raylet else [])])
                continue
            everyone = [
                pid for one in self._pools for pid, at in zip(one.pids, one.node_ids, strict=True) if at == node
            ]
            for process, _ in self._on_node(node)[:WITNESSES]:
                process.watch.options(concurrency_group=BEATS).remote(everyone)

    def remove(self, pool: str) -> None:
        """A pool's processes are being ended, or are gone."""
        for one in [one for one in self._pools if one.name == pool]:
            self._pools.remove(one)
            for key in zip(one.node_ids, one.pids, strict=True):
                self._known.pop(key, None)

    @property
    def head_lost(self) -> bool:
        """Whether Ray's head is known to be gone."""
        return self._head is not None and bool(self._head.lost)

    def close(self) -> None:
        """Watch nothing any more."""
        if self._head is not None:
            self._head.close()
        self._head = None
        self._pools.clear()
        self._known.clear()
        self._exits.forget()

    def look(self, waited: Sequence[Waited]) -> FirstCause | None:
        """What is lost among the processes that are waited for; returns at once, to be called again and again."""
        if self._head is not None and (said := self._head.lost):
            return FirstCause(kind="head", how=said, node=self._head.address, fatal=True)
        now = self._clock()
        late = [one for one in waited if now - one.since_s > ASK_AFTER_S]
        if not late:
            return None
        known = [self._known_of(one.pool, one.rank) for one in late]
        self._collect()
        for one in known:
            if one.ref is None and now - one.asked_s > EVERY_S:
                self._ask(one)
        silent = [one for one in known if one.silent_s(now)]
        if not silent:
            return None
        self._see(known, silent)
        return self._decided(known)

    def first_cause(self, waited: Sequence[Waited], *, died: bool) -> FirstCause | None:
        """What was lost first, once a call has failed because a process died, or said that it lost another; None: all
        of them answer. Takes SILENT_S at most, less where something is found. died: Ray says that one of them did."""
        if self._head is not None and (said := self._head.lost):
            return FirstCause(kind="head", how=said, node=self._head.address, fatal=True)
        known = [self._known_of(one.pool, one.rank) for one in waited]
        began = self._clock()
        for one in known:
            if one.ref is None:
                self._ask(one)
        found: FirstCause | None = None
        while (now := self._clock()) - began < SILENT_S + LATE_S:
            self._collect()
            self._see(known, [one for one in known if one.ref is not None])
            # What is found first need not have been first: what died before it may be seen a moment later.
            before, found = found, self._decided(known, stopped_s=0.0)
            if found is not None and (before is not None or found.kind != "died"):
                return found
            if not any(one.ref is not None for one in known) and not (died and now - began < DYING_S):
                return found
            time.sleep(10 * PAUSE_S if found is not None else PAUSE_S)
        return found

    def gone(self, pool: Pool, rank: int, how: str) -> FirstCause:
        """A process that Ray says is gone, where nobody has seen how; or its node, where Ray says so of that."""
        import ray

        with suppress(Exception):  # the head may be gone too
            there = next(one for one in ray.nodes() if one["NodeID"] == pool.node_ids[rank])
            if not there["Alive"] or not _is_reached(there["NodeManagerAddress"], there["NodeManagerPort"]):
                address = there["NodeManagerAddress"]
                return FirstCause(kind="node", node=address, how=f"node {address} is gone, or its network is cut")
        node = self._addresses.get(pool.node_ids[rank], pool.node_ids[rank])
        return FirstCause(kind="died", how=how, node=node, pool=pool.name, rank=rank, pid=pool.pids[rank])

    def pools_at(self, address: str) -> tuple[str, ...]:
        """Names of the pools that have a process on the node with this address."""
        nodes = {node for node, at in self._addresses.items() if at == address}
        return tuple(pool.name for pool in self._pools if nodes & set(pool.node_ids))

    def doing(self, waited: Sequence[Waited]) -> str:
        """What those were at when they answered last, as text for a message: who waits, and who does not."""
        known = [self._known_of(one.pool, one.rank) for one in waited]
        at = {one: one.beat.main for one in known if one.beat is not None}
        said = [
            f"{one.pool.name} {one.rank} {'waits in' if doing.waits else 'is at'} {doing.place or doing.op}"
            for one, doing in at.items()
            if doing is not None
        ]
        return f" ({', '.join(said[:MOST_NAMED])}{', ...' if len(said) > MOST_NAMED else ''})" if said else ""

    def write_stacks(self, waited: Sequence[Waited], name: str) -> str:
        """Ask who answers for the stacks of its threads; where they were written, as text for a message."""
        if self._folder is None:
            return ""
        asked = {}
        for one in waited:
            known = self._known_of(one.pool, one.rank)
            if known.ref is None:
                process = one.pool.processes[one.rank]
                asked[process.beat.options(concurrency_group=BEATS).remote((), True)] = f"{one.pool.name} {one.rank}"
        told, _ = answered(asked, self._replies, LATE_S)
        if not told:
            return ""
        path = self._folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(told))
        return f"; stacks of those that answer are in {shown(path.resolve())}"

    # --- questions -----------------------------------------------------------------------------------
    def _known_of(self, pool: Pool, rank: int) -> _Known:
        return self._known.setdefault((pool.node_ids[rank], pool.pids[rank]), _Known(pool, rank))

    def _ask(self, one: _Known) -> None:
        one.asked_s = self._clock()
        one.ref = one.pool.processes[one.rank].beat.options(concurrency_group=BEATS).remote()

    def _collect(self) -> None:
        asked = {one.ref: one for one in self._known.values() if one.ref is not None}
        ready = self._replies.ready(list(asked), 0.0) if asked else []
        answers: list[Any] = list(self._replies.get(ready, 60.0)) if ready else []
        for ref, answer in zip(ready, answers, strict=True):
            one = asked[ref]
            one.ref = None
            if isinstance(answer, Beat):  # an error is a process that died, which its own call says
                one.beat, one.state, one.stopped_from_s = answer, None, None  # what was seen of it is over
                for pid, state in answer.seen.items():
                    self._saw(self._node(one), pid, state)

    def _see(self, known: Sequence[_Known], silent: Sequence[_Known]) -> None:
        """Look at the processes of this machine, and have neighbours look at silent ones elsewhere."""
        for one in known:
            if self._node(one) == self._here and (state := self._exits.state(self._pid(one))) is not None:
                self._saw(self._here, self._pid(one), state)
        now = self._clock()
        for node in dict.fromkeys(self._node(one) for one in silent if self._node(one) != self._here):
            about = [self._pid(one) for one in known if self._node(one) == node]
            for _, witness in self._on_node(node)[:WITNESSES]:
                if witness.ref is None and now - witness.asked_s > LATE_S:
                    witness.asked_s = now
                    process = witness.pool.processes[witness.rank]
                    witness.ref = process.beat.options(concurrency_group=BEATS).remote(about)

    def _saw(self, node: str, pid: int, state: ProcessState) -> None:
        one = self._known.get((node, pid))
        if one is not None:
            one.state = state
            if not state.stopped:
                one.stopped_from_s = None
            elif one.stopped_from_s is None:
                one.stopped_from_s = self._clock()

    def _decided(self, known: Sequence[_Known], **limits: float) -> FirstCause | None:
        now = self._clock()
        everyone = {id(one): one for one in known}
        for node in {self._node(one) for one in known}:  # who else is on a node says whether it is the node
            everyone |= {id(one): one for _, one in self._on_node(node) if one.ref is not None or one.state is not None}
        seen = [
            Seen(
                pool=one.pool.name,
                rank=one.rank,
                pid=self._pid(one),
                node=self._addresses.get(self._node(one), self._node(one)),
                silent_s=one.silent_s(now),
                stopped_s=0.0 if one.stopped_from_s is None else now - one.stopped_from_s,
                beat=one.beat,
                state=one.state,
            )
            for one in everyone.values()
        ]
        raylets = {
            self._addresses.get(node, node): state
            for node, pid in self._raylets.items()
            if (state := self._exits.state(pid)) is not None
        }
        return decide(seen, raylets, **limits)

    def _on_node(self, node: str) -> list[tuple[Any, _Known]]:
        return [
            (pool.processes[rank], self._known_of(pool, rank))
            for pool in self._pools
            for rank, where in enumerate(pool.node_ids)
            if where == node
        ]

    @staticmethod
    def _node(one: _Known) -> str:
        return one.pool.node_ids[one.rank]

    @staticmethod
    def _pid(one: _Known) -> int:
        return one.pool.pids[one.rank]


def _is_reached(address: str, port: int) -> bool:
    """Whether Ray's process on a node takes a connection: Ray itself gives a node half a minute before it says."""
    try:
        with socket.create_connection((address, port), LATE_S):
            return True
    except OSError:
        return False
