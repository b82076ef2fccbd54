"""Faults of whole nodes: two machines on one (tests/runs/machines.py), of which one is killed, or its cable is pulled.

    machine 0   Ray's head, the command, its rank     its injector notes the moment; who made the machines does the rest
    machine 1   a raylet, the other rank              killed, or cut off

The second launch has two new machines: Ray's raylet ends where its node was given up.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from tests.runs.machines import Machines

PLACED = ("placement.pools={main: {slots: 1, nodes: 2}}", "placement.host_processes=1", "ray.address=auto")
VICTIM = 1


def launch_on_machines(spec: Path, events: Path, output: Path, action: str, limit_s: float) -> tuple[int | None, str]:
    """A run over two machines; action: what happens to the second when its injector says so, `cut` or `power off`.
    limit_s: longest that it may take.

    Returns the run's exit code and what it printed.
    """
    folder = spec.with_suffix(".machines")
    folder.mkdir(exist_ok=True)
    with Machines(folder, cpus=(2, 1)) as machines:
        over = threading.Event()

        def act() -> None:
            while not over.wait(0.05):
                if events.is_file() and '"fault"' in events.read_text():
                    machines.cut(VICTIM) if action == "cut" else machines.power_off(VICTIM)
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
