"""Checkpoints: complete or invisible.

    checkpoints/step_40.partial/  actor/ critic/ ...       written by the workers, each rank its shards
                                  manifest.json            written last
    checkpoints/step_40/          renamed in one atomic step

`begin_checkpoint` returns once every worker has copied its state; the files are written while the run goes on, and
`PendingCheckpoint.finish` makes them visible. A manifest holds what the controller knows: the step, the numbers of
every State, the recipe, and the size of each file. What a source emits is a function of the step: nothing else is
needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config import ModelConfig
from rlhf_dist.typed import ConfigError

SaveRole = Callable[[str, str], object]
"""(role, folder) -> anything: have the role's workers write or read their part."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    """Steps done."""
    recipe: str
    roles: tuple[str, ...]
    numbers: Mapping[str, Mapping[str, float]]
    files: Mapping[str, int]
    """Path inside the folder -> bytes."""


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint whose files are being written."""

    root: Path
    step: int
    recipe: str
    roles: tuple[str, ...]
    numbers: Mapping[str, Mapping[str, float]]
    keep: int

    @property
    def partial(self) -> Path:
        """Where the files are until all are there."""
        return self.root / f"step_{self.step}.partial"

    def finish(self) -> Path:
        """Make it visible, once every role has written; older ones beyond `keep` are deleted (0 keeps all)."""
        files = {
            str(file.relative_to(self.partial)): file.stat().st_size
            for file in sorted(self.partial.rglob("*"))
            if file.is_file()
        }
        manifest = {
            "step": self.step,
            "recipe": self.recipe,
            "roles": list(self.roles),
            "numbers": self.numbers,
            "files": files,
        }
        (self.partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
        final = self.root / f"step_{self.step}"
        self.partial.rename(final)
        complete = list_checkpoints(self.root)
        for old in complete[: max(0, len(complete) - self.keep)] if self.keep else []:
            shutil.rmtree(old.folder)
        return final


def begin_checkpoint(
    root: Path,
    *,
    step: int,
    recipe: str,
    roles: Sequence[str],
    numbers: Mapping[str, Mapping[str, float]],
    save_role: SaveRole,
    keep: int,
) -> PendingCheckpoint:
    """Have every role copy its state of `step` steps done and start to write it."""
    copied = json.loads(json.dumps(numbers))
    pending = PendingCheckpoint(root, step, recipe, tuple(roles), copied, keep)
    for stale in [*root.glob("step_*.partial"), root / f"step_{step}"]:
        shutil.rmtree(stale, ignore_errors=True)
    pending.partial.mkdir(parents=True)
    for role in roles:
        (pending.partial / role).mkdir()
        save_role(role, str((pending.partial / role).resolve()))
    return pending


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first. Raises ValueError for a manifest that cannot be read."""
    found = []
    for folder in root.glob("step_*"):
        manifest = folder / "manifest.json"
        if re.fullmatch(r"step_\d+", folder.name) and manifest.is_file():
            try:
                data = json.loads(manifest.read_text())
                roles, numbers, files = tuple(data["roles"]), data["numbers"], data["files"]
                found.append(Checkpoint(folder, int(data["step"]), data["recipe"], roles, numbers, files))
            except (json.JSONDecodeError, KeyError, TypeError) as broken:
                raise ValueError(f"{manifest} is not a checkpoint's manifest ({broken!r}); remove its folder") from None
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def check_files(checkpoint: Checkpoint) -> None:
    """Raises ConfigError if a file of the checkpoint is missing or has another size than was written."""
    for name, size in checkpoint.files.items():
        file = checkpoint.folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ConfigError(
                f"{file} {what}: the checkpoint is damaged; remove {checkpoint.folder} to go on from an older one, "
                f"or copy the file again"
            )


def check_checkpoint(
    checkpoint: Checkpoint, *, recipe: str, roles: Sequence[str], models: Mapping[str, ModelConfig]
) -> None:
    """Raises ConfigError if the checkpoint is incomplete, of another recipe or model, or lacks a role.

    It looks at names, sizes and the models' config.json, before anything starts; the workers that load it compare
    checksums and every shape. `models`: role -> its model.
    """
    check_files(checkpoint)
    if checkpoint.recipe != recipe:
        raise ConfigError(
            f"{checkpoint.folder} is a checkpoint of recipe {checkpoint.recipe!r}, this run's is {recipe!r}"
        )
    missing = [role for role in roles if role not in checkpoint.roles]
    if missing:
        raise ConfigError(f"{checkpoint.folder} has no {', '.join(missing)}; it has {', '.join(checkpoint.roles)}")
    for role in roles:
        saved, now = checkpoint.folder / role / "hf" / "config.json", Path(models[role].path) / "config.json"
        before, after = json.loads(saved.read_text()), json.loads(now.read_text())
        for key in _SHAPE_KEYS:
            if key in before and key in after and before[key] != after[key]:
                raise ConfigError(
                    f"{role}.model.path={models[role].path} has {key}={after[key]}, but the checkpoint in "
                    f"{checkpoint.folder} was written with {key}={before[key]}; resume with the same model"
                )


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
