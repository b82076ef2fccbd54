"""Which of several failures of one node is raised: the one that came first by itself, not the first that arrived."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from controller.cluster.pool import Pool
from controller.cluster.watch import Waited
from controller.execution.failed_calls import FailedCall, WorkerLost, error_of, overdue
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.failure import Failure

POOL = Pool("main", (None, None, None), logs=("/logs/main-0.log", "/logs/main-1.log", "/logs/main-2.log"))


@dataclass
class Called:
    node: Node = field(
        default_factory=lambda: Node(name="actor.update_actor", role="actor", op="u", kind="op", line="mine.py:3")
    )
    step: int = 4
    callees: list[tuple[Pool, int]] = field(default_factory=lambda: [(POOL, rank) for rank in range(3)])
    started_s: float = field(default_factory=time.perf_counter)

    @property
    def waited(self) -> list[Waited]:
        return [Waited(pool, rank, self.started_s) for pool, rank in self.callees]


def peer(at_s: float) -> Failure:
    return Failure(lost=False, text="RuntimeError: Connection closed by peer", of_peer=True, at_s=at_s)


def test_an_error_of_its_own_goes_before_those_that_lost_a_peer() -> None:
    called = Called()
    own = Failure(lost=False, text="KeyError: 'nope'", at_s=9.0)
    error = error_of(
        [FailedCall(called, 0, peer(1.0)), FailedCall(called, 2, own), FailedCall(called, 1, peer(2.0))], None
    )
    assert not isinstance(error, WorkerLost)
    assert str(error).startswith("actor.update_actor (step 4, mine.py:3) failed on rank 2: KeyError: 'nope'; whole")


def test_of_errors_of_their_own_the_earliest_is_raised() -> None:
    called = Called()
    failed = [FailedCall(called, rank, Failure(lost=False, text=f"E{rank}", at_s=9.0 - rank)) for rank in range(3)]
    assert "failed on rank 2: E2" in str(error_of(failed, None))


def test_a_process_that_is_gone_goes_before_those_that_lost_it() -> None:
    called = Called()
    gone = Failure(lost=True, text="its process died or stopped answering (ActorDiedError)")
    error = error_of([FailedCall(called, 0, peer(1.0)), FailedCall(called, 1, gone)], None)
    assert isinstance(error, WorkerLost) and (error.node, error.step) == (called.node, 4)
    assert "failed on rank 1: its process died" in str(error) and str(error).endswith("see its log /logs/main-1.log")


def test_a_call_over_its_limit_names_who_has_not_replied() -> None:
    error = overdue(Called(), 30.0, None)
    assert "did not finish within ray.call_timeout_s=30 s; no reply of rank 0, 1, 2; see /logs/main-0.log" in str(error)
    hurried = overdue(Called(), 12.345, None, shortened=True)
    assert "did not finish within the 12.3 s that were left; no reply" in str(hurried)


def test_the_first_process_of_a_pool_is_as_well_known_as_in_the_pool() -> None:
    """A source lives there, and who starts for long is looked at by node and pid."""
    pool = Pool("host", (None, None), node_ids=("a", "b"), pids=(11, 12), logs=("x", "y"), leads=((0,), (1,)))
    assert pool.first == Pool("host", (None,), node_ids=("a",), pids=(11,), logs=("x",))
