"""What a driver has started ends with it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

DRIVER = """
import subprocess, sys, time
from controller.cluster.reaper import Reaper

reaper = Reaper()
with reaper.marking():
    # A process of its own session that has a child without the mark, as a raylet has workers.
    child = "import subprocess; p = subprocess.Popen(['sleep', '99'], env={}); print(p.pid, flush=True); p.wait()"
    started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True, text=True)
other = subprocess.Popen(["sleep", "98"], start_new_session=True)
print(started.pid, int(started.stdout.readline()), other.pid, flush=True)
time.sleep(99)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_killed_driver_leaves_nothing_that_it_marked() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None, "it is a pipe"
    marked, child, other = map(int, driver.stdout.readline().split())
    assert alive(marked) and alive(child) and alive(other)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 30
    while (alive(marked) or alive(child)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(marked) and not alive(child)
    assert alive(other), "what it did not mark is left alone"
    os.kill(other, signal.SIGKILL)
