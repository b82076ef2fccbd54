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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from controller.lifecycle.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    check_checkpoint,
    checked,
    find_checkpoints,
    set_aside,
)
from controller.lifecycle.checkpoint_store import CheckpointStore, store_of
from controller.lifecycle.decisive_settings import check_unchanged, decisive_settings
from controller.lifecycle.disk_space import check_kinds, check_space, said_of_disk
from controller.lifecycle.folder_lock import LOCK, FolderTaken, held, owner_of
from controller.lifecycle.manifest import Manifest
from rlhf_dist.addresses import is_address
from rlhf_dist.compose import Launch
from rlhf_dist.data.of_launch import epoch_source
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
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Where the rows of each source parameter go on, as a manifest has it; filled in when the folder is claimed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides what a step sees (decisive_settings.py), likewise; what is in files then is what the run reads."""
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


def find_beginning(launch: Launch, *, compare: bool = True, elsewhere: bool = False) -> Beginning:
    """Where the run begins, as sizes and small files say; changes nothing. Raises ConfigError where it must not.

    compare: with the settings that the checkpoint was made with. elsewhere: the run is for other machines than this
    one, whose disk says nothing then.
    """
    if is_address(launch.run.output.root):
        raise ConfigError(
            f"output.root={launch.run.output.root} must be a folder of this machine, which all nodes share; "
            f"output.store=URL copies checkpoints elsewhere while the run goes on"
        )
    folder = Path(launch.run.output.root) / launch.run.name
    _check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        if not is_run(folder):
            raise ConfigError(f"{folder} holds files that are not of a run; choose another name=... or output.root=...")
        state, owner = owner_of(folder)
        if state == "live":
            raise _taken(folder, owner)
    beginning = _beginning(launch, folder, read=SMALL_BYTES, compare=compare)
    if not beginning.deletes:  # else what is there goes, and makes room
        check_kinds(folder)
        tight = "" if elsewhere else check_space(launch, folder)
        note = "; ".join(filter(None, (beginning.note, tight)))
        beginning = replace(beginning, note=note)
    return beginning


def _beginning(launch: Launch, folder: Path, *, read: int | None, compare: bool = True) -> Beginning:
    """See find_beginning, of a folder that nobody else has. read: see `check_files`."""
    resume, store = launch.run.resume, store_of(launch.run.output, launch.run.name)
    copies = store.steps() if store else []
    there = {entry.name for entry in folder.iterdir()} - {LOCK} if folder.exists() else set()
    ran = any(_has_results(folder / name) for name in RESULTS)
    if not ran and not copies:
        note = "an earlier start never finished a step; its folder is used again" if there else ""
        return Beginning(folder=folder, note=note)
    if resume == "never":
        raise ConfigError(
            f"{folder if ran or store is None else store.place} holds an earlier run; set resume=auto to continue it, "
            f"resume=overwrite to replace it, or another name=..."
        )
    if resume == "overwrite":
        return Beginning(folder=folder, deletes=True, note="the earlier run in it is deleted")
    found = find_checkpoints(folder / "checkpoints")
    if not found and not copies and resume == "auto":
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
        keep_as = folder.with_name(f"{folder.name}.{number}")
        note = f"the earlier run in it has no complete checkpoint to continue from and is kept as {keep_as}"
        return Beginning(folder=folder, keep_as=keep_as, note=note)
    checkpoint, damaged = _newest_good(folder, found, (store, copies), resume, read)
    models = {role: model for role in launch.learning_roles if (model := launch.used_roles[role].model) is not None}
    check_checkpoint(checkpoint, recipe=launch.recipe.name, roles=list(models), models=models)
    was, allowed = checkpoint.manifest.settings, launch.run.resume_changes
    changed = check_unchanged(checkpoint.folder, was, decisive_settings(launch), allowed) if compare else []
    sources = sources_of(launch, checkpoint.manifest)
    first, steps = checkpoint.step, steps_from(launch, sources)
    if first > steps or (first == steps and finished_steps(folder) == steps):
        raise ConfigError(
            f"{folder} has all its {first} steps already; set steps above {first} to continue (steps={steps})"
        )
    note = f"continues after {first} steps"
    if damaged:
        note += f"; damaged and left out: {', '.join(map(str, damaged))}"
    if changed:
        note += f"; made with {', '.join(changed)}"
    return Beginning(folder=folder, checkpoint=checkpoint, sources=sources, note=note)


def sources_of(launch: Launch, before: Manifest | None) -> dict[str, dict[str, int]]:
    """Rows a step of each source, and the shift with which they go on at the row where `before` stopped.

    Eight rows a step until step 4, then sixteen: 4 * 8 + 0 rows were drawn, 4 * 16 - 32 is the next.
    """
    found = {}
    for name in launch.recipe.sources:
        rows, was = launch.source_rows(name), {} if before is None else before.sources.get(name, {})
        shift = 0 if before is None or not was else was["shift"] + before.step * (was["rows"] - rows)
        found[name] = {"rows": rows, "shift": shift}
    return found


def steps_from(launch: Launch, sources: Mapping[str, Mapping[str, int]]) -> int:
    """Steps of the run: those that were asked for or, with `data.epochs`, enough for the rows that are left."""
    if not launch.epoch_rows:
        return launch.run.steps
    counted = sources[epoch_source(launch)]
    return -(-(launch.run.data.epochs * launch.epoch_rows - counted["shift"]) // counted["rows"])


def _newest_good(
    folder: Path,
    found: list[Checkpoint | DamagedCheckpoint],
    copies: tuple[CheckpointStore | None, list[int]],
    resume: str,
    read: int | None,
) -> tuple[Checkpoint, list[DamagedCheckpoint]]:
    """The checkpoint to go on from, and newer ones that are damaged. Raises ConfigError where there is none.

    copies: a store, and the steps it has: taken where the folder has none, or a damaged one. read: see `check_files`;
    with None a copy is fetched, else only its manifest.
    """
    (store, stored), here = copies, {one.step: one for one in found}
    steps = sorted({*here, *stored}, reverse=True)
    if resume != "auto":
        wanted = int(resume.removeprefix("step_"))
        if wanted not in steps:
            there = ", ".join(f"step_{step}" for step in reversed(steps))
            raise ConfigError(f"resume={resume}: {folder} has {there or 'no checkpoint'}")
        steps = [wanted]
    damaged: list[DamagedCheckpoint] = []
    for step in steps:
        tries: list[Checkpoint | DamagedCheckpoint] = [checked(here[step], read=read)] if step in here else []
        if store and step in stored and not (tries and isinstance(tries[0], Checkpoint)):
            place = folder / "checkpoints" / f"step_{step}"
            tries.append(store.fetch(step, place) if read is None else store.read(step, place))
        if isinstance(tries[-1], Checkpoint):
            return tries[-1], damaged
        damaged += [one for one in tries if isinstance(one, DamagedCheckpoint)]
    raise ConfigError(
        f"{folder} has no good checkpoint to continue from: {', '.join(map(str, damaged))}; copy the files again, "
        f"choose another with resume=step_N, or set resume=overwrite to start anew"
    )


def _taken(folder: Path, owner: str) -> ConfigError:
    return ConfigError(f"{folder} belongs to a run that is under way ({owner}); end it first, or choose another name")


@contextmanager
def claim_folder(launch: Launch, note: Callable[[str], None]) -> Iterator[Beginning]:
    """Make the run's folder and hold it; yields where to begin. Raises ConfigError as `find_beginning` does, and
    RunFolderFailed where the disk is full."""
    folder = find_beginning(launch).folder
    with ExitStack() as holding:
        _hold(folder, holding, note)
        with said_of_disk(folder):
            beginning = _entered(launch, folder, holding, note)
        yield beginning


def _entered(launch: Launch, folder: Path, holding: ExitStack, note: Callable[[str], None]) -> Beginning:
    """Make of the folder, which is held, what the run begins with."""
    store = store_of(launch.run.output, launch.run.name)
    if store is not None:
        store.probe()
    beginning = _beginning(launch, folder, read=None)
    if beginning.keep_as is not None:
        folder.rename(beginning.keep_as)  # The lock moves along with it.
        holding.close()
        _hold(folder, holding, note)
    for entry in folder.iterdir() if beginning.deletes else ():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for text in (f"{folder}: {beginning.note}" if beginning.note else "", check_space(launch, folder)):
        if text:
            note(text)
    for stale in (folder / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    for moved in set_aside(folder / "checkpoints", beginning.first_step):
        note(f"{moved}: of later steps, which are done again; remove it when you do not need it")
    if store is not None and beginning.deletes:
        for step in store.steps():
            store.remove(step)
    elif store is not None:
        store.set_aside(beginning.first_step)
    write_durably(folder / "config.yaml", f"# {_command(launch, folder)}\n{launch.yaml}")
    sources = beginning.sources or sources_of(launch, None)
    return replace(beginning, sources=sources, settings=decisive_settings(launch))


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


def recipe_of(folder: Path) -> str:
    """The recipe of a run as its command named it. Raises ConfigError where its config.yaml does not say."""
    config = folder / "config.yaml"
    first = config.read_text(encoding="utf-8").splitlines()[:1] if config.is_file() else []
    words = shlex.split(first[0].removeprefix("#")) if first and first[0].startswith("# ") else []
    if words[:2] != ["rlhf-dist", "run"] or len(words) < 3:
        raise ConfigError(
            f"{config} does not begin with the command that made it (# rlhf-dist run RECIPE ...); add that line"
        )
    return words[2]


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
