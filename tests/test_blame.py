"""Who is blamed when calls do not come back: every way a process can be lost, on values and on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from controller.cluster.blame import SILENT_S, STOPPED_S, Seen, decide
from rlhf_dist.heartbeat import Beat, Doing
from rlhf_dist.process_state import Exits, ProcessState, parent_of
from workers.heartbeat import Activity, place_of

WAITS = Beat(doing=(Doing(op="actor.update_actor", step=3, seconds=9.0, place="all_gather", waits=True),))
BUSY = Beat(doing=(Doing(op="actor.update_actor", step=3, seconds=9.0, place="mine.py:3 in loss", waits=False),))
RUNS, STOPPED = ProcessState(alive=True, letter="S"), ProcessState(alive=True, letter="T")


def killed(at: float, number: int = 9, **more: bool) -> ProcessState:
    return ProcessState(alive=False, ended_at=at, status=number, **more)


def rank(
    rank: int, state: ProcessState | None = RUNS, *, node: str = "a", silent_s: float = 0.0, stopped_s: float = 0.0
) -> Seen:
    beat = BUSY if silent_s else WAITS
    return Seen(
        pool="main",
        rank=rank,
        pid=100 + rank,
        node=node,
        silent_s=silent_s,
        stopped_s=stopped_s,
        beat=beat,
        state=state,
    )


def test_nobody_is_blamed_while_all_answer_or_are_seen_to_run() -> None:
    assert decide([rank(0), rank(1)], {"a": RUNS}) is None
    assert decide([rank(0), rank(1, silent_s=1e6)], {}) is None, "alive, and busy with the interpreter's lock held"
    assert decide([rank(0), rank(1, None, silent_s=SILENT_S - 1)], {}) is None
    assert decide([rank(0), rank(1, STOPPED, silent_s=9, stopped_s=STOPPED_S - 1)], {}) is None


def test_a_stopped_rank_is_blamed_and_not_the_one_that_waits_for_it() -> None:
    cause = decide([rank(0), rank(1, STOPPED, silent_s=9, stopped_s=STOPPED_S)], {"a": RUNS})
    assert cause is not None and (cause.kind, cause.pool, cause.rank, cause.pid) == ("stopped", "main", 1, 101)
    assert "pool main, rank 1, pid 101 on node a) is stopped (SIGSTOP" in cause.text
    assert cause.text.endswith("waiting for it: main 0 in all_gather")


def test_the_first_death_is_the_cause_of_the_others() -> None:
    cause = decide([rank(0, killed(20.0, 6)), rank(1, killed(10.0)), rank(2)], {"a": RUNS})
    assert cause is not None and (cause.kind, cause.rank) == ("died", 1)
    assert "was killed by signal 9 (SIGKILL)" in cause.text


def test_a_raylet_that_went_first_took_its_processes_with_it() -> None:
    dead = [rank(0, killed(11.0, 1 << 8)), rank(1, killed(12.0, 1 << 8))]
    cause = decide(dead, {"a": killed(10.0)})
    assert cause is not None and cause.kind == "node" and cause.fatal
    assert cause.text == "Ray's raylet on node a was killed by signal 9 (SIGKILL)"
    later = decide(dead, {"a": killed(30.0)})
    assert later is not None and (later.kind, later.rank) == ("died", 0)


def test_a_node_of_which_nobody_answers_is_blamed_as_a_whole() -> None:
    cut = [rank(1, None, node="b", silent_s=SILENT_S), rank(2, None, node="b", silent_s=SILENT_S)]
    cause = decide([rank(0), *cut], {})
    assert cause is not None and (cause.kind, cause.node) == ("node", "b")
    assert "does not answer: it is gone or its network is cut (its 2 processes: main 1, main 2)" in cause.text
    alone = decide([rank(0), cut[0], rank(2, None, node="b")], {})
    assert alone is not None and (alone.kind, alone.rank) == ("silent", 1), "a neighbour on the node answers"


def test_how_a_process_ended_is_said() -> None:
    assert killed(1.0, 11).text == "was killed by signal 11 (SIGSEGV)"
    assert "the kernel was out of memory" in killed(1.0, out_of_memory=True).text
    assert killed(1.0, 3 << 8).text == "ended with exit code 3"
    assert ProcessState(alive=False).text == "ended, how is not known"


@contextmanager
def grandchild(code: str) -> Iterator[int]:
    """A process that another one started and will wait for, as raylets do with workers."""
    shell = f'{sys.executable} -c "{code}" & echo $!; wait'
    parent = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None, "it is a pipe"
    pid = int(parent.stdout.readline())
    try:
        yield pid
    finally:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)
        parent.wait(10)


def until(what: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")
def test_the_end_of_a_process_that_is_not_ours_is_seen_with_its_signal() -> None:
    with grandchild("import time; time.sleep(60)") as pid:
        exits = Exits()
        exits.watch([pid])
        assert parent_of(pid) != os.getpid()
        os.kill(pid, signal.SIGSTOP)
        until(lambda: exits.state(pid).stopped)
        assert exits.state(pid).stopped
        before = time.time()
        os.kill(pid, signal.SIGKILL)
        until(lambda: exits.ended())
        (state,) = exits.ended().values()
    assert not state.alive and before <= state.ended_at <= time.time()
    major, minor = map(int, os.uname().release.split(".")[:2])
    if (major, minor) >= (6, 15):
        assert state.text == "was killed by signal 9 (SIGKILL)"
    assert exits.state(2**22 + 1) is None, "never seen"


@pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")
def test_the_kernel_s_kill_is_said_of_the_process_that_ended_by_it_and_of_none_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kills = [4]
    monkeypatch.setattr("rlhf_dist.process_state.oom_kills", lambda: kills[0])
    exits, out_of_memory = Exits(), []
    for more in (0, 1, 0):
        with grandchild("import time; time.sleep(60)") as pid:
            exits.watch([pid])
            kills[0] += more
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: pid in exits.ended())
            out_of_memory.append(exits.ended()[pid].out_of_memory)
    assert out_of_memory == [False, True, False]


def test_a_process_says_where_it_stands_while_it_hangs() -> None:
    activity, go, over = Activity(), threading.Event(), threading.Event()

    def hang() -> None:
        with activity.noted("actor.update_actor", 3), activity.noted("inside", None):
            go.set()
            over.wait()

    thread = threading.Thread(target=hang)
    thread.start()
    go.wait()
    beat = activity.beat([], stacks=True)
    over.set()
    thread.join()
    assert beat.main is not None and (beat.main.op, beat.main.step, beat.main.waits) == ("actor.update_actor", 3, False)
    assert beat.main.place.startswith(f"{Path(__file__).name}:") and beat.main.place.endswith(" in hang")
    assert "over.wait()" in beat.stacks
    assert activity.beat([], stacks=False) == Beat(doing=())


def test_a_collective_is_named_as_what_is_waited_for(tmp_path: Path) -> None:
    """The frames of a real one: a rank alone waits for its peer in a store's barrier until the time is over."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 2)
    seen: list[tuple[str, bool]] = []

    def join() -> None:
        with pytest.raises(RuntimeError):
            dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=dist.timedelta(seconds=2))

    thread = threading.Thread(target=join)
    thread.start()
    until(lambda: seen.append(place_of(sys._current_frames().get(thread.ident))) or seen[-1][1], 2.0)
    thread.join()
    assert ("init_process_group", True) in seen
