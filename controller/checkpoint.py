"""Checkpoints: complete or invisible.

    checkpoints/step_40.partial/  actor/ critic/ ...       written by the workers, each rank its shards
                                  manifest.json            written last
    checkpoints/step_40/          renamed in one atomic step

A manifest holds what the controller knows: the step, the numbers of every State, the recipe. What a
source emits is a function of the step, so there is nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def save_checkpoint(
    root: Path,
    *,
    step: int,
    recipe: str,
    roles: Sequence[str],
    numbers: Mapping[str, Mapping[str, float]],
    save_role: SaveRole,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` steps done; older ones beyond `keep` are deleted (0 keeps all)."""
    final, partial = root / f"step_{step}", root / f"step_{step}.partial"
    for stale in (partial, final):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    for role in roles:
        (partial / role).mkdir()
        save_role(role, str((partial / role).resolve()))
    manifest = {"step": step, "recipe": recipe, "roles": list(roles), "numbers": numbers}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
    partial.rename(final)
    complete = list_checkpoints(root)
    for old in complete[: max(0, len(complete) - keep)] if keep else []:
        shutil.rmtree(old.folder)
    return final


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first. Raises ValueError for a manifest that cannot be read."""
    found = []
    for folder in root.glob("step_*"):
        manifest = folder / "manifest.json"
        if re.fullmatch(r"step_\d+", folder.name) and manifest.is_file():
            try:
                data = json.loads(manifest.read_text())
                found.append(
                    Checkpoint(folder, int(data["step"]), data["recipe"], tuple(data["roles"]), data["numbers"])
                )
            except (json.JSONDecodeError, KeyError, TypeError) as broken:
                raise ValueError(f"{manifest} is not a checkpoint's manifest ({broken!r}); remove its folder") from None
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def load_checkpoint(checkpoint: Checkpoint, *, recipe: str, roles: Sequence[str], load_role: SaveRole) -> None:
    """Have every role read its part. Raises ValueError if the checkpoint is of another recipe or lacks a role."""
    if checkpoint.recipe != recipe:
        raise ValueError(
            f"{checkpoint.folder} is a checkpoint of recipe {checkpoint.recipe!r}, this run's is {recipe!r}"
        )
    missing = [role for role in roles if role not in checkpoint.roles]
    if missing:
        raise ValueError(f"{checkpoint.folder} has no {', '.join(missing)}; it has {', '.join(checkpoint.roles)}")
    for role in roles:
        load_role(role, str((checkpoint.folder / role).resolve()))
