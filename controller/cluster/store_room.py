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
ADVICE = "give more shared memory (docker run --shm-size=8g), or set a lower ray.object_store_bytes"


def temporary_folder() -> Path:
    """Where Ray keeps a session."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"))


def remark_on_room(store_bytes: int, shared: Path = SHARED_MEMORY, temporary: Path | None = None) -> str:
    """What to know of an object store's place; empty where all is well. Raises ClusterError where there is none."""
    temporary = temporary or temporary_folder()
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
