"""The folder of a run: who writes there, what is there already, and where this run begins.

    runs/NAME   absent, empty, or a start that never finished a step    step 0
                a run, resume=auto, with a complete checkpoint          its step
                a run, resume=auto, without one                         kept as NAME.1; step 0
                a run, resume=overwrite                                 deleted; step 0
                a run, resume=never                                     refused
                a run that is under way                                 refused, naming its owner
                files of something else                                 refused

A run holds a lock on `.lock` while it lasts; the kernel lets it go with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from controller.lifecycle.checkpoint import check_checkpoint, list_checkpoints
from rlhf_dist.compose import Launch
from rlhf_dist.recipe_files import family_of
from rlhf_dist.typed import ConfigError

LOCK = ".lock"
RESULTS = ("metrics.jsonl", "checkpoints", "models", "summary.json")
"""What a run that finished a step has, one or more of them, not empty."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a run begins, and what happens to what is in its folder."""

    folder: Path
    first_step: int = 0
    keep_as: Path | None = None
    """Where an earlier run without a checkpoint is moved."""
    deletes: bool = False
    """An earlier run is deleted."""
    note: str = ""
    """For people; empty for a new folder."""


def find_beginning(launch: Launch) -> Beginning:
    """Where the run begins; changes nothing. Raises ConfigError where it must not."""
    folder, resume = Path(launch.run.output.root) / launch.run.name, launch.run.resume
    _check_writable(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return Beginning(folder=folder)
    if not is_run(folder):
        raise ConfigError(f"{folder} holds files that are not of a run; choose another name=... or output.root=...")
    owner = _owner(folder)
    if owner is not None:
        raise ConfigError(
            f"{folder} belongs to a run that is under way ({owner}); end it first, or choose another name"
        )
    if not any(_has_results(folder / name) for name in RESULTS):
        return Beginning(folder=folder, note="an earlier start never finished a step; its folder is used again")
    if resume == "never":
        raise ConfigError(
            f"{folder} holds an earlier run; set resume=auto to continue it, resume=overwrite to replace it, "
            f"or another name=..."
        )
    if resume == "overwrite":
        return Beginning(folder=folder, deletes=True, note="the earlier run in it is deleted")
    complete = list_checkpoints(folder / "checkpoints")
    if not complete:
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
        keep_as = folder.with_name(f"{folder.name}.{number}")
        note = f"the earlier run in it has no complete checkpoint to continue from and is kept as {keep_as}"
        return Beginning(folder=folder, keep_as=keep_as, note=note)
    models = {role: model for role in launch.learning_roles if (model := launch.used_roles[role].model) is not None}
    check_checkpoint(complete[-1], recipe=launch.recipe.name, roles=list(models), models=models)
    first, steps = complete[-1].step, launch.run.steps
    if first > steps or (first == steps and finished_steps(folder) == steps):
        raise ConfigError(
            f"{folder} has all its {first} steps already; set steps above {first} to continue (steps={steps})"
        )
    return Beginning(folder=folder, first_step=first, note=f"continues after {first} steps")


@contextmanager
def claim_folder(launch: Launch, note: Callable[[str], None]) -> Iterator[tuple[Path, int]]:
    """Make the run's folder and hold it; yields (folder, first step). Raises ConfigError as `find_beginning` does."""
    beginning = find_beginning(launch)
    folder = beginning.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); set output.root to a folder of yours"
        ) from error
    try:
        if beginning.keep_as is not None:
            folder.rename(beginning.keep_as)  # The lock moves along with it.
            lock.close()
            folder.mkdir(exist_ok=True)
            lock = _lock(folder)
        for entry in folder.iterdir() if beginning.deletes else ():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if beginning.note:
            note(f"{folder}: {beginning.note}")
        (folder / "config.yaml").write_text(f"# {_command(launch, folder)}\n{launch.yaml}", encoding="utf-8")
        yield folder, beginning.first_step
    finally:
        lock.close()


def _command(launch: Launch, folder: Path) -> str:
    """How to run these settings again."""
    ours = family_of(launch.recipe.file) is not None
    spec = launch.recipe.name if ours else f"{launch.recipe.file}:{launch.recipe.name}"
    return shlex.join(["rlhf-dist", "run", spec, "--config", str(folder / "config.yaml"), "name=ANOTHER"])


def _has_results(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def is_run(folder: Path) -> bool:
    """Whether a run made this folder: only such a one is used again, moved or deleted."""
    if (folder / LOCK).is_file():
        return True
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return all(f"\n{section}:\n" in text for section in ("data", "placement", "output"))


def finished_steps(folder: Path) -> int:
    """Steps of the run whose summary is in the folder; 0 where there is none."""
    try:
        return int(json.loads((folder / "summary.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _check_writable(folder: Path) -> None:
    """Raises ConfigError unless a file can be made in the folder, or in the nearest one above it that is there."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"output.root: {there} cannot be written ({reason}); set it to a folder of yours") from error


# --- the lock ----------------------------------------------------------------------------------------------------
def _lock(folder: Path) -> IO[str]:
    """Hold the folder until the returned file is closed."""
    file = (folder / LOCK).open("a+", encoding="utf-8")
    for left in (2, 1, 0):  # `rlhf-dist check` looks at the lock for a moment.
        if _locked(file, fcntl.LOCK_EX):
            break
        if not left:
            file.close()
            raise ConfigError(f"{folder} belongs to a run that is under way ({_owner(folder)}); choose another name")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def _owner(folder: Path) -> str | None:
    """Who holds the folder; None where nobody does."""
    path = folder / LOCK
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        return None if _locked(file, fcntl.LOCK_SH) else file.read() or "its owner is not known"


def _locked(file: IO[str], kind: int) -> bool:
    """Whether the lock was free; True too on file systems that have no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    return True
