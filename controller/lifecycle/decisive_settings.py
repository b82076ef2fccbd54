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
from dataclasses import asdict, is_dataclass
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
    found |= _flat(asdict(run.data), "data")
    if is_dataclass(launch.algorithm) and not isinstance(launch.algorithm, type):
        found |= _flat(asdict(launch.algorithm), "algorithm")
    for role, config in launch.used_roles.items():
        found |= _of_role(launch, role, asdict(config), isinstance(config, RewardConfig))
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
    changed = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    told = {key: f"{key}={_said(was.get(key))} (now {_said(now.get(key))})" for key in changed}
    refused = [key for key in changed if not any(fnmatchcase(key, name) for name in allowed)]
    if refused:
        raise ConfigError(
            f"{folder} was made with {', '.join(told[key] for key in refused)}; set what it was, or go on with the new "
            f"one and resume_changes=[{','.join(refused)}]"
        )
    return list(told.values())


def _of_role(launch: Launch, role: str, config: dict[str, Any], scores: bool) -> dict[str, Any]:
    if role not in launch.learning_roles:
        config.pop("optimizer", None)
    if generation_of(launch, role) is None:
        config.pop("rollout", None)
    for name in HARMLESS_OF_REWARDS if scores else ():
        config.pop(name)
    path = (config.get("model") or {}).get("path")
    if path:
        config["model"]["path"] = _model(Path(path).expanduser())
    if function := config.get("function") if scores else None:
        config.pop("engine")
        config["code"] = _code_of_function(function, launch.recipe.file)
        where, _, name = function.rpartition(":")
        config["function"] = f"{Path(where).name}:{name}" if where.endswith(".py") else function
    return _flat(config, role)


def _flat(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {inner: leaf for name, entry in value.items() for inner, leaf in _flat(entry, f"{key}.{name}").items()}
    return {key: value}


def _said(value: Any) -> str:
    return "null" if value is None else str(value)


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
