"""Checkpoints: complete or invisible.

    checkpoints/step_40.partial/  actor/ critic/ ...       written by the workers, each rank its shards
                                  states/buffer/ ...       values of states that are no numbers
                                  manifest.json            written last
    checkpoints/step_40/          renamed in one atomic step
    checkpoints/step_60.set_aside damaged, or of steps that a run did again

`begin_checkpoint` returns once every worker has copied its state; the files are written while the run goes on, and
`PendingCheckpoint.finish` makes them visible once this process sees what every rank says it wrote. Ranks have then read
back each other's shards (`workers/engines/files/checkpoint.py`), so here only small files are read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from controller.lifecycle.manifest import NAME, Damaged, Manifest, check_files, read_manifest
from rlhf_dist.config import ModelConfig
from rlhf_dist.durable_files import crc_of, sync, write_durably
from rlhf_dist.typed import ConfigError

SaveRole = Callable[[str, str], object]
"""(role, folder) -> anything: have the role's workers write or read their part."""


class CheckpointIncomplete(Exception):
    """What a rank says it wrote is not what this process sees."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is right."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps done."""
        return self.manifest.step

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose weights it has."""
        return self.manifest.roles

    @property
    def numbers(self) -> Mapping[str, Mapping[str, float]]:
        """Of every State."""
        return self.manifest.numbers


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A folder of a checkpoint that is not what was written."""

    folder: Path
    step: int
    problem: str

    def __str__(self) -> str:
        return f"{self.folder.name} ({self.problem})"


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint whose files are being written."""

    root: Path
    manifest: Manifest
    """Without its files."""
    ranks: Mapping[str, int]
    """Role -> ranks that write."""
    keep: int

    @property
    def step(self) -> int:
        """Steps done."""
        return self.manifest.step

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that write."""
        return self.manifest.roles

    @property
    def partial(self) -> Path:
        """Where the files are until all are there."""
        return self.root / f"step_{self.step}.partial"

    def finish(self, spared: Callable[[Path], bool] = lambda folder: False) -> Checkpoint:
        """Make it visible, once every role has written; older ones beyond `keep` are deleted (0 keeps all).

        spared: whether a folder is needed for something else, which will delete it. Raises CheckpointIncomplete if
        files of a rank are not seen here as it wrote them.
        """
        manifest = replace(self.manifest, files=self._seen())
        write_durably(self.partial / NAME, manifest.text())
        sync([*(path for path in self.partial.rglob("*") if path.is_dir()), self.partial])
        final = self.root / f"step_{self.step}"
        if final.exists():  # of a step that is done again
            _aside(final)
        self.partial.rename(final)
        sync([self.root])
        complete = list_checkpoints(self.root)
        for old in complete[: max(0, len(complete) - self.keep)] if self.keep else []:
            if not spared(old.folder):
                shutil.rmtree(old.folder)
        return Checkpoint(final, manifest)

    def _seen(self) -> dict[str, tuple[int, int]]:
        """Path -> bytes and CRC-32 of every file: a rank's shards by what it says, which is looked for, others read."""
        said: dict[str, tuple[int, int]] = {}
        for role, ranks in self.ranks.items():
            for rank in range(ranks):
                sums = self.partial / role / f"crc-{rank + 1:05d}.json"
                try:
                    listed = {
                        f"{role}/{name}": (size, crc) for name, (size, crc) in json.loads(sums.read_bytes()).items()
                    }
                    check_files(self.partial, listed, read=0)
                except (OSError, ValueError) as error:
                    raise CheckpointIncomplete(
                        f"the checkpoint after {self.step} steps is not complete: what rank {rank} of {role} wrote is "
                        f"not seen in {self.partial} ({error}); put output.root on a file system that all nodes share"
                    ) from error
                said |= listed
        there = (file for file in sorted(self.partial.rglob("*")) if file.is_file())
        others = {str(file.relative_to(self.partial)): file for file in there}
        for name in said:
            others.pop(name, None)
        sync(others.values())
        return {**said, **{name: (file.stat().st_size, crc_of(file)) for name, file in others.items()}}


def begin_checkpoint(
    root: Path,
    *,
    step: int,
    recipe: str,
    ranks: Mapping[str, int],
    numbers: Mapping[str, Mapping[str, float]],
    save_role: SaveRole,
    keep: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
    sources: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> PendingCheckpoint:
    """Have every role copy its state of `step` steps done and start to write it.

    ranks: role -> ranks that write. settings, sources: see `Manifest`.
    """
    manifest = Manifest(
        step=step,
        recipe=recipe,
        roles=tuple(ranks),
        numbers=json.loads(json.dumps(numbers)),  # a copy: the run goes on
        files={},
        settings=dict(settings),
        sources=dict(sources),
    )
    pending = PendingCheckpoint(root, manifest, ranks, keep)
    for stale in root.glob("step_*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    pending.partial.mkdir(parents=True)
    for role in manifest.roles:
        (pending.partial / role).mkdir()
        save_role(role, str((pending.partial / role).resolve()))
    return pending


def find_checkpoints(root: Path) -> list[Checkpoint | DamagedCheckpoint]:
    """Published checkpoints, oldest first, files not looked at."""
    found: list[Checkpoint | DamagedCheckpoint] = []
    for folder in root.glob("step_*"):
        if re.fullmatch(r"step_\d+", folder.name) and folder.is_dir():
            try:
                found.append(Checkpoint(folder, read_manifest(folder)))
            except Damaged as damage:
                found.append(DamagedCheckpoint(folder, int(folder.name[5:]), str(damage)))
    return sorted(found, key=lambda one: one.step)


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """Those with a right manifest, oldest first, files not looked at."""
    return [one for one in find_checkpoints(root) if isinstance(one, Checkpoint)]


def checked(found: Checkpoint | DamagedCheckpoint, *, read: int | None) -> Checkpoint | DamagedCheckpoint:
    """The checkpoint if its files are what was written, as `check_files` looks at them; else what is wrong with it."""
    if isinstance(found, DamagedCheckpoint):
        return found
    try:
        check_files(found.folder, found.manifest.files, read=read)
    except Damaged as damage:
        return DamagedCheckpoint(found.folder, found.step, str(damage))
    return found


def set_aside(root: Path, after: int) -> list[Path]:
    """Rename what was published for steps above `after`, so that no later run takes it for its own; the new names."""
    return [_aside(one.folder) for one in find_checkpoints(root) if one.step > after]


def _aside(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.set_aside{end}") for end in ("", *(f"_{n}" for n in range(2, 10**6))))
    target = next(name for name in names if not name.exists())
    return folder.rename(target)


def check_checkpoint(
    checkpoint: Checkpoint, *, recipe: str, roles: Sequence[str], models: Mapping[str, ModelConfig]
) -> None:
    """Raises ConfigError if the checkpoint is of another recipe or model, or lacks a role.

    It looks at names and the models' config.json, before anything starts; the workers that load it compare
    checksums and every shape. `models`: role -> its model.
    """
    if checkpoint.manifest.recipe != recipe:
        raise ConfigError(
            f"{checkpoint.folder} is a checkpoint of recipe {checkpoint.manifest.recipe!r}, this run's is {recipe!r}"
        )
    missing = [role for role in roles if role not in checkpoint.roles]
    if missing:
        raise ConfigError(f"{checkpoint.folder} has no {', '.join(missing)}; it has {', '.join(checkpoint.roles)}")
    for role in roles if checkpoint.folder.is_dir() else ():  # else a copy that is not fetched yet
        before = _read_config(checkpoint.folder / role / "hf" / "config.json")
        after = _read_config(Path(models[role].path).expanduser() / "config.json")
        for key in _SHAPE_KEYS:
            if key in before and key in after and before[key] != after[key]:
                raise ConfigError(
                    f"{role}.model.path={models[role].path} has {key}={after[key]}, but the checkpoint in "
                    f"{checkpoint.folder} was written with {key}={before[key]}; resume with the same model"
                )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object; copy it again")
    return content


_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
)
"""What makes two models of one folder name incompatible."""


def load_checkpoint(checkpoint: Checkpoint, *, roles: Sequence[str], load_role: SaveRole) -> None:
    """Have every role read its part of a checkpoint that `check_checkpoint` has seen."""
    for role in roles:
        load_role(role, str((checkpoint.folder / role).resolve()))
