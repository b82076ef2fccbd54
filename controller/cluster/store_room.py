"""Room for a cluster that is started here: Ray's object store in /dev/shm, its sockets and logs in a temporary folder.

Where /dev/shm has too little Ray puts the store on the disk of its temporary folder: everything works, slowly.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from controller.cluster.pool import ClusterError

SHARED_MEMORY = Path("/dev/shm")
SESSION_BYTES = 64 << 20
"""Least that logs and sockets of a session want."""
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.0")
"""Bytes of a path: a socket's may have 107 (unix(7))."""
ADVICE = "give more shared memory (docker run --shm-size=8g), or set a lower ray.object_store_bytes"


def temporary_folder() -> Path:
    """Where Ray keeps its sessions: RAY_TMPDIR, else TMPDIR, as Ray chooses; /tmp, where the latter's path is too long
    for sockets, which schedulers that make a TMPDIR for each job know nothing of. Raises ClusterError for a RAY_TMPDIR
    that is."""
    told, usual = (
        os.path.abspath(folder) if (folder := os.environ.get(name)) else None for name in ("RAY_TMPDIR", "TMPDIR")
    )
    if told is not None and len(os.fsencode(told)) > LONGEST_FOLDER:
        raise ClusterError(
            f"Ray's sockets lie below RAY_TMPDIR, and the system wants at most {LONGEST_FOLDER} bytes of its path, "
            f"got {len(os.fsencode(told))}: {told}; set it to a folder of yours with a short path"
        )
    if told is not None:
        return Path(told)
    return Path(usual) if usual and len(os.fsencode(usual)) <= LONGEST_FOLDER else Path("/tmp")


def remark_on_room(store_bytes: int, temporary: Path, shared: Path = SHARED_MEMORY) -> str:
    """What to know of an object store's place; empty where all is well. Raises ClusterError where there is none."""
    try:
        temporary.mkdir(parents=True, exist_ok=True)  # as Ray would
        with tempfile.TemporaryFile(dir=temporary):
            pass
    except OSError as error:
        raise ClusterError(
            f"Ray keeps its session in {temporary}, which cannot be written ({error.strerror}); set RAY_TMPDIR to a "
            f"folder of yours with a short path"
        ) from error
    here, there = (shutil.disk_usage(place).free if place.is_dir() else 0 for place in (shared, temporary))
    on_disk = here < store_bytes
    if there < SESSION_BYTES + (store_bytes if on_disk else 0):
        raise ClusterError(
            f"Ray's object store of {_mib(store_bytes)} and its session have no room: {shared} has {_mib(here)} free, "
            f"{temporary} {_mib(there)}; {ADVICE}, or set RAY_TMPDIR to a larger disk"
        )
    return f"its object store lies on disk, which is slow: {shared} has {_mib(here)} free; {ADVICE}" if on_disk else ""


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
