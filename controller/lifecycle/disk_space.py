"""Room for a run's files: what is known before the start is said then; one that fills up later ends the run in a line.

A checkpoint holds float32 weights and two moments of every trained parameter, 12 bytes each; a new one is complete
before an old one goes, so `output.keep_checkpoints` + 1 lie there at one time.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.lifecycle.checkpoint import find_checkpoints, list_checkpoints
from rlhf_dist.compose import Launch
from rlhf_dist.typed import ConfigError
from rlhf_dist.weights_files import stored_weights

TRAINED_BYTES, WRITTEN_BYTES = 12, 4
"""A parameter: with its two moments; of a role that only takes weights of others."""
FOLDERS = ("checkpoints", "models", "logs", "rollouts", "tensorboard", "nonfinite")
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "trace.json")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)


class RunFolderFailed(Exception):
    """The run's folder can no longer be written."""


def checkpoint_bytes(launch: Launch) -> dict[str, int]:
    """Role -> bytes of its part of a checkpoint, as far as its model's files say; adapters are not counted."""
    found = {}
    for role in launch.learning_roles:
        config = launch.used_roles[role]
        if config.model is None or config.engine.lora is not None:
            continue
        try:
            parameters = stored_weights(config.model.path).parameters
        except (OSError, ValueError):  # said by the checks of a launch
            parameters = None
        if parameters is not None:
            found[role] = parameters * (TRAINED_BYTES if role in launch.dataflow.trained else WRITTEN_BYTES)
    return found


def check_space(launch: Launch, folder: Path) -> str:
    """What to say of the room for checkpoints; nothing where there is enough. Raises ConfigError if not one fits."""
    output, parts = launch.run.output, checkpoint_bytes(launch)
    one = sum(parts.values())
    if output.checkpoint_every is None or not one:
        return ""
    free = shutil.disk_usage(_nearest(folder)).free
    written = launch.run.steps // output.checkpoint_every if output.checkpoint_every else 1
    kept = min(output.keep_checkpoints + 1, max(written, 1)) if output.keep_checkpoints else max(written, 1)
    there = len(find_checkpoints(folder / "checkpoints"))
    needed = one * max(kept - there, 1)
    said = f"{_nearest(folder)} has {_size(free)} free, and a checkpoint takes {_size(one)} ({_listed(parts)})"
    if free < one:
        raise ConfigError(
            f"output.root: {said}; free some, choose another output.root, or set output.checkpoint_every=null for none"
        )
    return f"{said}, {kept} of them at one time: it may fill up" if free < needed else ""


def check_kinds(folder: Path) -> None:
    """Raises ConfigError where a file is in the place of a folder of the run, or the other way about."""
    for names, is_other, is_a in ((FOLDERS, Path.is_file, "a file"), (FILES, Path.is_dir, "a folder")):
        for path in (folder / name for name in names):
            if is_other(path):
                wanted = "a folder" if is_a == "a file" else "a file"
                raise ConfigError(f"{path} is {is_a}, and the run writes {wanted} of that name; remove or rename it")


@contextmanager
def said_of_disk(folder: Path) -> Iterator[None]:
    """Errors of the disk end the run in a line that names the folder and what can be gone on from."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        good = list_checkpoints(folder / "checkpoints")
        left = f"its last checkpoint is {good[-1].folder.name}" if good else "it has no checkpoint"
        free = _size(shutil.disk_usage(folder).free)
        raise RunFolderFailed(
            f"{folder} can no longer be written ({error.strerror}; {free} free); {left}; "
            f"free some and go on with resume=auto"
        ) from error


def _nearest(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{role} {_size(size)}" for role, size in parts.items())


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
