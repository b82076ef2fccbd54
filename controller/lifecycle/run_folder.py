"""The folder of a run: who writes there, what is there already, and where this run begins.

    runs/NAME   absent, empty, or a start that never finished a step    step 0
                a run, resume=auto, with a complete checkpoint          the step of the newest good one
                a run, resume=auto, without one                         kept as NAME.1; step 0
                a run, resume=step_N                                    N, if that one is good
                a run, resume=overwrite                                 deleted; step 0
                a run, resume=never                                     refused
                a run that is under way (folder_lock.py)                refused, naming its owner
                files of something else                                 refused

Newer checkpoints than the one a run goes on from, damaged or not, are set aside under another name: they are of steps
that are done again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from controller.lifecycle.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    check_checkpoint,
    checked,
    find_checkpoints,
    set_aside,
)
from controller.lifecycle.folder_lock import LOCK, FolderTaken, held, owner_of
from rlhf_dist.compose import Launch
from rlhf_dist.durable_files import write_durably
from rlhf_dist.recipe_files import family_of
from rlhf_dist.typed import ConfigError

SMALL_BYTES = 1 << 20
"""Files of a checkpoint up to here are read by `check` too; shards only by the run that goes on from them."""
RESULTS = ("metrics.jsonl", "checkpoints", "models", "summary.json")
"""What a run that finished a step has, one or more of them, not empty."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a run begins, and what happens to what is in its folder."""

    folder: Path
    checkpoint: Checkpoint | None = None
    """What it goes on from; None: from the start."""
    keep_as: Path | None = None
    """Where an earlier run without a checkpoint is moved."""
    deletes: bool = False
    """An earlier run is deleted."""
    note: str = ""
    """For people; empty for a new folder."""

    @property
    def first_step(self) -> int:
        """Steps done before it."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def find_beginning(launch: Launch) -> Beginning:
    """Where the run begins, as sizes and small files say; changes nothing. Raises ConfigError where it must not."""
    folder = Path(launch.run.output.root) / launch.run.name
    _check_writable(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return Beginning(folder=folder)
    if not is_run(folder):
        raise ConfigError(f"{folder} holds files that are not of a run; choose another name=... or output.root=...")
    state, owner = owner_of(folder)
    if state == "live":
        raise _taken(folder, owner)
    return _beginning(launch, folder, read=SMALL_BYTES)


def _beginning(launch: Launch, folder: Path, *, read: int | None) -> Beginning:
    """See find_beginning, of a folder that nobody else has. read: see `check_files`."""
    resume = launch.run.resume
    if {entry.name for entry in folder.iterdir()} <= {LOCK}:
        return Beginning(folder=folder)
    if not any(_has_results(folder / name) for name in RESULTS):
        return Beginning(folder=folder, note="an earlier start never finished a step; its folder is used again")
    if resume == "never":
        raise ConfigError(
            f"{folder} holds an earlier run; set resume=auto to continue it, resume=overwrite to replace it, "
            f"or another name=..."
        )
    if resume == "overwrite":
        return Beginning(folder=folder, deletes=True, note="the earlier run in it is deleted")
    found = find_checkpoints(folder / "checkpoints")
    if not found and resume == "auto":
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
        keep_as = folder.with_name(f"{folder.name}.{number}")
        note = f"the earlier run in it has no complete checkpoint to continue from and is kept as {keep_as}"
        return Beginning(folder=folder, keep_as=keep_as, note=note)
    checkpoint, damaged = _newest_good(folder, found, resume, read)
    models = {role: model for role in launch.learning_roles if (model := launch.used_roles[role].model) is not None}
    check_checkpoint(checkpoint, recipe=launch.recipe.name, roles=list(models), models=models)
    first, steps = checkpoint.step, launch.run.steps
    if first > steps or (first == steps and finished_steps(folder) == steps):
        raise ConfigError(
            f"{folder} has all its {first} steps already; set steps above {first} to continue (steps={steps})"
        )
    note = f"continues after {first} steps"
    if damaged:
        note += f"; damaged and left out: {', '.join(map(str, damaged))}"
    return Beginning(folder=folder, checkpoint=checkpoint, note=note)


def _newest_good(
    folder: Path, found: list[Checkpoint | DamagedCheckpoint], resume: str, read: int | None
) -> tuple[Checkpoint, list[DamagedCheckpoint]]:
    """The checkpoint to go on from, and newer ones that are damaged. Raises ConfigError where there is none."""
    if resume != "auto":
        names = {one.folder.name: one for one in found}
        if resume not in names:
            raise ConfigError(f"resume={resume}: {folder} has {', '.join(names) or 'no checkpoint'}")
        found = [names[resume]]
    damaged: list[DamagedCheckpoint] = []
    for one in reversed(found):
        good = checked(one, read=read)
        if isinstance(good, Checkpoint):
            return good, damaged
        damaged.append(good)
    raise ConfigError(
        f"{folder} has no good checkpoint to continue from: {', '.join(map(str, damaged))}; copy the files again, "
        f"choose another with resume=step_N, or set resume=overwrite to start anew"
    )


def _taken(folder: Path, owner: str) -> ConfigError:
    return ConfigError(f"{folder} belongs to a run that is under way ({owner}); end it first, or choose another name")


@contextmanager
def claim_folder(launch: Launch, note: Callable[[str], None]) -> Iterator[Beginning]:
    """Make the run's folder and hold it; yields where to begin. Raises ConfigError as `find_beginning` does."""
    folder = find_beginning(launch).folder
    with ExitStack() as holding:
        _hold(folder, holding, note)
        beginning = _beginning(launch, folder, read=None)
        if beginning.keep_as is not None:
            folder.rename(beginning.keep_as)  # The lock moves along with it.
            holding.close()
            _hold(folder, holding, note)
        for entry in folder.iterdir() if beginning.deletes else ():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if beginning.note:
            note(f"{folder}: {beginning.note}")
        if beginning.checkpoint is not None:
            for moved in set_aside(folder / "checkpoints", beginning.first_step):
                note(f"{moved}: of later steps, which are done again; remove it when you do not need it")
        write_durably(folder / "config.yaml", f"# {_command(launch, folder)}\n{launch.yaml}")
        yield beginning


def _hold(folder: Path, holding: ExitStack, note: Callable[[str], None]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holding.enter_context(held(folder, note))
    except FolderTaken as taken:
        raise _taken(folder, str(taken)) from taken
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); set output.root to a folder of yours"
        ) from error


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
