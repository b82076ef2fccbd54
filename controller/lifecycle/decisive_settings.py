"""What decides what a step sees, as one flat mapping: recorded in every checkpoint, compared when a run goes on.

    seed, data.*, algorithm.*, placement.max_staleness           as they are set (and settled: no `auto` is left)
    ROLE.optimizer.*, ROLE.rollout.temperature, ROLE.engine.*    of the roles that use them
    data.train.path, actor.model.path                            by what the files hold, not where they lie
    recipe.code, reward.code, data.train.code                    of users' files, comments aside

All that a launch has is compared but for `HARMLESS`, so that a setting which is new is not forgotten: where things run,
how a batch is cut, how long a call may take, and what is written where, change no number beyond rounding.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_dist.compose import Launch
from rlhf_dist.config import RewardConfig
from rlhf_dist.data.files import data_files
from rlhf_dist.python_files import files_with
from rlhf_dist.rewards.load import load_function
from rlhf_dist.role_kinds import generation_of
from rlhf_dist.typed import ConfigError

HARMLESS = (
    *("data.epochs", "*.optimizer.nonfinite", "*.rollout.ratio_tolerance", "*.rollout.canary_tolerance"),
    *(f"*.engine.{name}" for name in ("micro_batch_tokens", "logit_chunk_tokens", "packing", "share_prompts")),
    *(f"*.engine.{name}" for name in ("activation_checkpointing", "compile", "offload", "zero_stage", "export_dtype")),
    *(f"*.engine.{name}" for name in ("sequence_parallel", "tensor_parallel", "replicas")),
    *(f"*.rollout.{name}" for name in ("tensor_parallel", "kv_cache_bytes", "gpu_memory_share", "bucket_bytes")),
    "*.rollout.sleeps",
)
HARMLESS_OF_REWARDS = ("timeout_s", "memory_bytes", "concurrency")
EDGE_BYTES = 1 << 16
"""Of a file of weights its size, its two ends and `PLACES` places between are compared: enough to tell models apart."""
PLACES = 16


def decisive_settings(launch: Launch) -> dict[str, Any]:
    """Setting -> value, as JSON has them."""
    run = launch.run
    found: dict[str, Any] = {"seed": run.seed, "placement.max_staleness": run.placement.max_staleness}
    if run.placement.max_staleness:
        found["placement.interrupt"] = run.placement.interrupt
    found |= _flat(run.data, "data") | _flat(launch.algorithm, "algorithm")
    for role, config in launch.used_roles.items():
        found |= _of_role(launch, role, config)
    for key, value in list(found.items()):
        if key.startswith("data.") and key.endswith(".path") and value is not None:
            found[key] = _contents(data_files(value))
        if key.startswith("data.") and key.endswith(".generator") and str(value).rpartition(":")[0].endswith(".py"):
            found[key.removesuffix("generator") + "code"] = _code([Path(value.rpartition(":")[0])])
    found["recipe.code"] = _code(files_with(launch.recipe.file))
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return {key: value for key, value in plain.items() if not any(fnmatchcase(key, name) for name in HARMLESS)}


def check_unchanged(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> list[str]:
    """What is another than in the checkpoint `folder` and may be, as texts for people.

    allowed: names or patterns of settings. Raises ConfigError naming all that may not, or a name that there is not.
    """
    for name in allowed:
        if not any(fnmatchcase(key, name) for key in (*was, *now)):
            raise ConfigError(f"resume_changes: no setting {name!r} decides what a step sees; leave it out")
    # What the checkpoint does not know is a setting of a later version of this program, which has its usual value.
    changed = [key for key in sorted(was) if key not in now or was[key] != now[key]]
    told = {key: f"{key}={_said(key, was)} (now {_said(key, now)})" for key in changed}
    refused = [key for key in changed if not any(fnmatchcase(key, name) for name in allowed)]
    if refused:
        raise ConfigError(
            f"{folder} was made with {', '.join(told[key] for key in refused)}; set what it was, or go on with the new "
            f"one and resume_changes=[{','.join(refused)}]"
        )
    return list(told.values())


def _of_role(launch: Launch, role: str, config: Any) -> dict[str, Any]:
    scores = isinstance(config, RewardConfig)
    unused = [f"{role}.optimizer."] if role not in launch.learning_roles else []
    if generation_of(launch, role) is None:
        unused.append(f"{role}.rollout.")
    if scores:
        unused += [f"{role}.{name}" for name in HARMLESS_OF_REWARDS]
    function = config.function if scores else None
    if function:
        unused.append(f"{role}.engine.")
    found = {key: value for key, value in _flat(config, role).items() if not key.startswith(tuple(unused))}
    if found.get(f"{role}.model.path"):
        found[f"{role}.model.path"] = _model(Path(found[f"{role}.model.path"]).expanduser())
    if function:
        where, _, name = function.rpartition(":")
        found[f"{role}.function"] = f"{Path(where).name}:{name}" if where.endswith(".py") else function
        found[f"{role}.code"] = _code_of_function(function, launch.recipe.file)
    return found


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Fields of dataclasses under their dotted keys; a mapping of the user's own names is one value, or lists them."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
    elif isinstance(value, Mapping) and any(map(is_dataclass, value.values())):
        parts = dict(value)
    else:
        return {key: value}
    listed: dict[str, Any] = {key: sorted(parts)} if isinstance(value, Mapping) else {}
    for name, entry in parts.items():
        listed |= _flat(entry, f"{key}.{name}")
    return listed


def _said(key: str, settings: Mapping[str, Any]) -> str:
    if key in settings:
        return "null" if settings[key] is None else str(settings[key])
    return "set" if any(name.startswith(f"{key}.") for name in settings) else "null"


# --- what files hold -----------------------------------------------------------------------------------------
def _contents(files: Sequence[Path]) -> str:
    digests = [_digest(file.resolve(), file.stat().st_mtime_ns, file.stat().st_size, whole=True) for file in files]
    return f"contents {_short(digests)} of {len(files)} {'file' if len(files) == 1 else 'files'}"


def _model(folder: Path) -> str:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".bin", ".model")]
    parts = [
        (file.name, _digest(file.resolve(), file.stat().st_mtime_ns, file.stat().st_size, whole=file.suffix == ".json"))
        for file in files
    ]
    return f"contents {_short(parts)}"


@cache
def _digest(file: Path, changed_ns: int, size: int, *, whole: bool) -> str:
    """Of a file's content, or of its size and some places of it; read once in a process until it changes."""
    try:
        with file.open("rb") as stream:
            if whole or size <= EDGE_BYTES * (PLACES + 2):
                return hashlib.file_digest(stream, "sha256").hexdigest()
            found = hashlib.sha256(str(size).encode())
            for place in range(PLACES + 2):
                stream.seek(place * (size - EDGE_BYTES) // (PLACES + 1))
                found.update(stream.read(EDGE_BYTES))
            return found.hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error


def _code_of_function(spec: str, recipe: Path) -> str:
    with suppress(Exception):  # What cannot be found is said by the checks of a launch.
        function = inspect.unwrap(load_function(spec, recipe))
        source = inspect.getsourcefile(
            function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
        )
        if source is not None:
            return _code(files_with(Path(source)))
    return "not known"


def _code(files: Iterable[Path]) -> str:
    """Of Python files, whatever their comments and their layout."""
    trees = []
    for file in files:
        with suppress(OSError, SyntaxError, ValueError):
            trees.append((file.name, ast.dump(ast.parse(file.read_bytes()))))
    return f"contents {_short(trees)}" if trees else "not known"


def _short(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=6).hexdigest()
