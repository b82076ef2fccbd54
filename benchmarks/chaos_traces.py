"""What a run of the chaos harness leaves: weights and rows to compare, and what it should not have left."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet

from controller.lifecycle.checkpoint import list_checkpoints

MARK = "RLHF_CHAOS"
"""Environment variable by which the processes of a run are found, whoever their parent is by then."""
ENDING_S = 20.0
"""Processes of a run may end so long after it."""


def left_behind(mark: str, own: Path) -> list[str]:
    """Processes, shared memory and temporary files of a run that is over; Ray's own logs are no such files."""
    deadline = time.monotonic() + ENDING_S
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    processes = [f"process {' '.join(one.cmdline()[:3])}" for one in marked(mark)]
    shared = list((own / "shm").iterdir()) if alone(own) else []
    files = [entry for entry in (own / "tmp").iterdir() if entry.name != "ray"]
    return processes + [f"file {entry.name}" for entry in (*shared, *files)]


def alone(own: Path) -> list[str]:
    """What gives a run a /dev/shm of its own; nothing where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return []
    mount = f'mount --bind {own / "shm"} /dev/shm && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


def marked(mark: str) -> list[psutil.Process]:
    """Processes of a run, whoever their parent is, with what they started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
                found |= {one.pid: one for one in process.children(recursive=True)}
    return list(found.values())


def end_marked(mark: str) -> None:
    """Kill what a run has left: the next fault must find an idle machine."""
    for process in marked(mark):
        with suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)
            process.kill()


def corrupt_newest(folder: Path) -> None:
    """Cut the largest file of the newest checkpoint in half."""
    newest = list_checkpoints(folder / "checkpoints")[-1].folder
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def weights(folder: Path) -> dict[str, bytes]:
    """The exported model's files."""
    return {file.name: file.read_bytes() for file in sorted((folder / "models/actor").glob("*.safetensors"))}


def rows(folder: Path, step: int) -> Counter[tuple[str, str]]:
    """(prompt, response) of a step's rows, from its dump."""
    found: Counter[tuple[str, str]] = Counter()
    for file in (folder / "rollouts").glob(f"step_{step:06d}.parquet"):
        table = pyarrow.parquet.read_table(file).to_pydict()
        found.update(zip(map(str, table["prompt"]), map(str, table["response"]), strict=True))
    return found
