"""One run of the chaos harness, with faults or without: `python -m benchmarks.chaos_run SPEC.json`.

    run() in the main thread                          Injector, in a thread of its own
      cluster, pools, steps  <── beat ── the target ──  is it at the operation that the fault waits for?
                             ── signal ──────────────>  SIGKILL, SIGSTOP, ... from outside

Nothing in the product knows of it: what a process is at comes from its heartbeat. What happened goes to a file,
each with its time.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

import controller.cluster.start
from controller.cluster.pool import BEATS
from controller.cluster.start import Cluster
from controller.commands.cli import main as cli
from controller.record.display import Display

MEMORY_GROUPS = Path("/sys/fs/cgroup")
"""Of the kernel: version 1 has a tree for each resource below it."""
POLL_S = 0.005
"""Between two looks at what the target is at: operations of a tiny model last some 50 ms."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to which process, and when."""

    kind: str
    """Of the table in benchmarks/chaos.py."""
    action: str
    """A signal (`SIGKILL`); `memory:BYTES`: no more than that from now on; `file:BYTES`: no longer file."""
    pool: str = "main"
    """Of the process; or `driver`, `raylet`, `gcs`, `agent`."""
    rank: int = 1
    op: str = ""
    """A pattern of the operation that it must be at; empty: at once."""
    step: int = 0
    """Not before this step."""
    says: str = ""
    """A pattern of what the run must say."""
    nodes: int = 1
    """More than one: each of two ranks has a machine of its own, a third is spare, and the action is one of
    chaos_machines.py."""
    alone: bool = False
    """In a run of its own, since the run ends by it."""
    settings: Sequence[str] = ()
    """Of the run that it hits, besides those of the mode."""
    corrupts: bool = False
    """Before the second launch the newest checkpoint is damaged."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A run of the harness."""

    arguments: list[str]
    """Of the command `rlhf-dist`."""
    events: str
    """File of what happened."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """One after the other."""


class Seen(Cluster):
    """A cluster that the injector can reach."""

    made: Seen | None = None

    def __enter__(self) -> Seen:
        Seen.made = self
        super().__enter__()
        return self


class Injector(threading.Thread):
    """Waits for the moments of faults, one after the other, and does them."""

    def __init__(self, faults: Sequence[Fault], events: Path) -> None:
        super().__init__(name="injector", daemon=True)
        self.faults, self.events = faults, events
        self.recovered = threading.Event()
        """The run has said so since the last fault."""

    def run(self) -> None:
        """Do them, and note when; the next one waits until the run has recovered from the last."""
        for fault in self.faults:
            while (pid := self._victim(fault)) is None:
                time.sleep(POLL_S)
            self.recovered.clear()
            note(self.events, "fault", pid=pid, node=node_of(fault), **asdict(fault))
            if fault.nodes == 1:  # else who reads the events acts
                self._act(fault, pid)
            self.recovered.wait()

    @staticmethod
    def _act(fault: Fault, pid: int) -> None:
        what, _, count = fault.action.partition(":")
        if what == "memory":
            limit_memory(pid, int(count))
        elif what == "file":
            psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (int(count), int(count)))
        else:
            os.kill(pid, signal.Signals[fault.action])

    def _victim(self, fault: Fault) -> int | None:
        """The process, once it is at what the fault waits for."""
        cluster = Seen.made
        named = fault.pool in ("driver", "raylet", "gcs", "agent")
        pool = cluster.pools.get("main" if named else fault.pool) if cluster is not None else None
        rank = 0 if named else fault.rank
        if pool is None or rank >= pool.size:
            return None
        if fault.op and not self._is_at(pool.processes[rank], fault):
            return None
        return named_process(fault.pool) if named else pool.pids[rank]

    @staticmethod
    def _is_at(process: Any, fault: Fault) -> bool:
        import ray

        with suppress(Exception):
            beat = ray.get(process.beat.options(concurrency_group=BEATS).remote(), timeout=5.0)
            return any(re.search(fault.op, one.op) and (one.step or 0) >= fault.step for one in beat.doing)
        return False


def named_process(name: str) -> int:
    """This process, or one of the cluster that it has started."""
    if name == "driver":
        return os.getpid()
    words = {"raylet": "/raylet/raylet", "gcs": "gcs_server", "agent": "agent"}[name]
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if words in " ".join(child.cmdline()[:4]):
                return int(child.pid)
    raise LookupError(f"this run has no process called {name}")


def node_of(fault: Fault) -> str:
    """Address of a node that a process of its pool is on, other than this one's; empty for faults of one process."""
    import ray

    if fault.nodes == 1 or Seen.made is None:
        return ""
    away = set(Seen.made.pools[fault.pool].node_ids) - {ray.get_runtime_context().get_node_id()}
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] in away)


def limit_memory(pid: int, count: int) -> None:
    """What the process takes from now on counts against `count` bytes: in a control group of its own, beyond which the
    kernel ends it. Where this user may not make one, it may have no more addresses than it has."""
    first = MEMORY_GROUPS / "memory"
    group = (first if first.is_dir() else MEMORY_GROUPS) / f"chaos-{pid}"
    try:
        group.mkdir()
        atexit.register(_removed, group)
        (group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(count))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        print(f"chaos: no control group of memory ({error}), so RLIMIT_AS")
        limit = psutil.Process(pid).memory_info().vms
        psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (limit, limit))


def _removed(group: Path) -> None:
    for _ in range(100):  # its process is ended with the cluster, and may be a moment late
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.05)


def note(events: Path, what: str, **more: Any) -> None:
    """Write down an event, on disk at once: this process may be killed next."""
    with events.open("a") as file:
        file.write(json.dumps({"event": what, "at": time.time(), **more}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def noting(say: Callable[[Any, str], None], events: Path, injector: Injector) -> Callable[[Any, str], None]:
    """What a run says of itself, with the time: a run that recovers does not end."""

    def say_and_note(display: Any, text: str) -> None:
        note(events, "note", text=text)
        if text.startswith("recovered"):
            injector.recovered.set()
        say(display, text)

    return say_and_note


def main(file: str) -> int:
    """Run a spec; returns the command's exit code."""
    spec = Spec(**json.loads(Path(file).read_text()))
    events = Path(spec.events)
    injector = Injector([Fault(**fault) for fault in spec.faults], events)
    Display.note = noting(Display.note, events, injector)  # type: ignore[method-assign]
    controller.cluster.start.Cluster = Seen  # type: ignore[misc]  # so that the injector reaches its processes
    injector.start()
    note(events, "begins")
    code = cli(spec.arguments)
    note(events, "ends", code=code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
