"""`rlhf-dist export`: a role's checkpoint as a folder that transformers and vLLM load, without a cluster.

It runs in a process of its own: what reads checkpoints belongs to the workers, whom the controller never imports.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from controller.lifecycle.checkpoint import Checkpoint, checked, find_checkpoints
from rlhf_dist.addresses import is_address, push
from rlhf_dist.durable_files import sync
from rlhf_dist.typed import ConfigError
from rlhf_dist.weights_files import stored_weights

EXPORTER = "workers.engines.files.export"
TIMEOUT_S = 3600.0
"""Longest an export may take."""


def export(checkpoint: str, out: str, role: str | None, dtype: str | None, adapter: bool) -> Path | str:
    """Write the model of `role` in `checkpoint` to the folder, or address, `out`; returns where it is.

    Raises ConfigError for a folder without a checkpoint, a role it does not have, a damaged file, or an `out` that
    is there already.
    """
    found = _find(Path(checkpoint))
    if role is None and len(found.roles) != 1:
        raise ConfigError(f"{found.folder} has {', '.join(found.roles)}; choose one with --role")
    chosen = role or found.roles[0]
    if chosen not in found.roles:
        raise ConfigError(f"{found.folder} has no role {chosen!r}; it has {', '.join(found.roles)}")
    if is_address(out):
        with tempfile.TemporaryDirectory(prefix="rlhf-dist-export-") as made:
            return push(_written(found, chosen, Path(made) / "model", dtype, adapter), out)
    target = Path(out)
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    return _written(found, chosen, target, dtype, adapter)


def _written(found: Checkpoint, chosen: str, target: Path, dtype: str | None, adapter: bool) -> Path:
    options = [*(["--dtype", dtype] if dtype else []), *(["--adapter"] if adapter else [])]
    command = [sys.executable, "-m", EXPORTER, str(found.folder / chosen), str(target), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(lines[-1].split(": ", 1)[-1] if lines else f"the export ended with code {done.returncode}")
    return target


class ExportIncomplete(Exception):
    """What a model's export should hold is not seen here."""


def check_exported(folder: Path, role: str) -> None:
    """Flush an exported model to the disk. Raises ExportIncomplete where a weight file is missing or cut here."""
    index = folder / "model.safetensors.index.json"
    try:
        json.loads((folder / "config.json").read_bytes())
        for name in set(json.loads(index.read_bytes())["weight_map"].values()):
            (folder / name).stat()
        stored_weights(folder)  # reads each header, which says how long its file is
        sync([*(path for path in folder.rglob("*")), folder])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOENT:
            raise
        raise ExportIncomplete(
            f"the exported model of {role} is not complete in {folder} ({error}); put output.root on a file system "
            f"that all nodes share, or export the last checkpoint with `rlhf-dist export`"
        ) from error


def _find(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a step's folder, or the newest of a run's; an older one is never taken unasked."""
    for root, name in ((path.parent, path.name), (path / "checkpoints", None), (path, None)):
        found = [one for one in find_checkpoints(root) if name is None or one.folder.name == name]
        if not found:
            continue
        newest = checked(found[-1], read=None)
        if isinstance(newest, Checkpoint):
            return newest
        raise ConfigError(
            f"the checkpoint is damaged: {newest.folder} ({newest.problem}); copy the files again, or give the folder "
            f"of an older one"
        )
    raise ConfigError(
        f"no complete checkpoint at {path}; give runs/NAME or runs/NAME/checkpoints/step_N (a run writes one with "
        f"output.checkpoint_every=N)"
    )
