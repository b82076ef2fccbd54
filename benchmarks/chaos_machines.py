"""Faults of whole nodes: machines on one (tests/runs/machines.py), of which one is killed, or its cable is pulled.

    machine 0   Ray's head, the command     its injector notes the moment and the node; who made them does the rest
    others      a raylet, a rank            killed, or cut off, one of them
    a third     a raylet                    a spare one, on which the run goes on by itself

Where there is none the run ends, and the second launch has new machines: Ray's raylet ends where its node was given up.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from tests.runs.machines import Machines

PLACED = ("placement.pools={main: {slots: 1, nodes: 2}}", "placement.host_processes=1", "ray.address=auto")


def launch_on_machines(
    spec: Path, events: Path, output: Path, *, nodes: int, action: str, limit_s: float
) -> tuple[int | None, str]:
    """A run over machines; action: what happens to one of them when its injector says so, `cut` or `power off`; empty:
    nothing. limit_s: longest that it may take.

    Returns the run's exit code and what it printed.
    """
    folder = spec.with_suffix(".machines")
    folder.mkdir(exist_ok=True)
    with Machines(folder, cpus=(2, *(1 for _ in range(nodes - 1)))) as machines:
        over = threading.Event()

        def act() -> None:
            while not over.wait(0.05):
                if (address := _victim(events)) is not None:
                    victim = next(k for k in range(nodes) if machines.address(k) == address)
                    machines.cut(victim) if action == "cut" else machines.power_off(victim)
                    return

        if action:
            threading.Thread(target=act, name="fault", daemon=True).start()
        try:
            done = machines.run(0, sys.executable, "-m", "benchmarks.chaos_run", str(spec), timeout_s=limit_s)
        finally:
            over.set()
    output.write_text(done.stdout + done.stderr)
    with events.open("a") as file:
        file.write(json.dumps({"event": "gone", "at": time.time()}) + "\n")
    return done.returncode, done.stdout + done.stderr


def _victim(events: Path) -> str | None:
    """Address of the node that the injector has chosen, once it has."""
    told = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    return next((event["node"] for event in told if event["event"] == "fault"), None)
