"""Files that processes on other nodes read under the path they have here: found missing before a role is built.

    run folder              every node: each rank writes its log and its part of a checkpoint there
    model folder of a role  the nodes of the role's pool
    data, the tokenizer     the node of the first host process, which reads the rows

Only the run folder must be one, on a file system that all nodes share; the others may be copies at the same path.
Recipes, losses, rewards and host ops need not be there: they travel by value.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from controller.cluster.pool import ClusterError, Pool
from controller.cluster.replies import Replies
from rlhf_dist.compose import Launch
from rlhf_dist.config import PartConfig, SourceConfig
from rlhf_dist.data.files import data_files
from rlhf_dist.data.of_launch import tokenizer_of
from rlhf_dist.failure import Failure, failure_of_call
from rlhf_dist.placement.roles import HOST_POOL

MODEL_FILES = (".json", ".safetensors")
"""Ends of the names of what is read of a model folder."""
COPY = "copy it to the same path there, or give one on a file system that all nodes share"


@dataclass(frozen=True)
class Need:
    """Files that some nodes must have."""

    rule: str
    """What must be where."""
    files: Mapping[str, int]
    """Absolute path -> bytes."""
    advice: str


def check_files_are_shared(
    launch: Launch, folder: Path, placed: Mapping[str, str], pools: Mapping[str, Pool], replies: Replies, wait_s: float
) -> None:
    """Have the first process of every pool on each node look for what it will read.

    folder: of the run. placed: role (or ROLE.rollout) -> pool. Raises ClusterError naming what is missing on which
    node and what to do.
    """
    with _token(folder) as token:
        asked = {}
        for name, pool in pools.items():
            needs = [_run_folder(folder, token), *_needs_of(launch, name, placed)]
            for rank in _first_on_each_node(pool):
                process = pool.processes[rank]
                asked.update({process.missing.remote(need.files): (need, name, rank) for need in needs})
        left = list(asked)
        while left:
            ready = replies.ready(left, wait_s)
            if not ready:
                raise ClusterError(f"processes did not say within {wait_s:g} s whether they see the files of the run")
            left = [ref for ref in left if ref not in ready]
            for ref, answer in zip(ready, replies.get(ready, wait_s), strict=True):
                need, name, rank = asked[ref]
                told: Any = failure_of_call(answer) if isinstance(answer, Exception) else answer
                where = f"pool {name!r}, rank {rank}"
                if isinstance(told, Failure):
                    raise ClusterError(f"{where}, could not look for files: {told.text}")
                if told is not None:
                    address, lacks = told
                    raise ClusterError(f"{need.rule}: on node {address} ({where}) {lacks}; {need.advice}")


@contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file of this moment: an older run of the same name elsewhere has none."""
    token = folder / f".seen-{uuid4().hex}"
    token.write_text(str(os.getpid()))
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def _first_on_each_node(pool: Pool) -> list[int]:
    return sorted({node: rank for rank, node in reversed(list(enumerate(pool.nodes)))}.values())


def _run_folder(folder: Path, token: Path) -> Need:
    return Need(
        f"the run's folder {folder} must be on a file system that all its nodes share",
        _sizes([token]),
        "set output.root to a folder on a shared file system, or use the slots of one node",
    )


def _needs_of(launch: Launch, pool: str, placed: Mapping[str, str]) -> Iterator[Need]:
    if pool == HOST_POOL:
        yield from _needs_of_sources(launch)
    for name in sorted(placed):
        role = launch.roles[name.split(".")[0]]
        if placed[name] == pool and role.model is not None:
            yield _model(role.model.path, f"the model of {name}")


def _needs_of_sources(launch: Launch) -> Iterator[Need]:
    tokenizer = tokenizer_of(launch)
    if tokenizer is not None:
        yield _model(tokenizer, "the model whose tokenizer encodes the rows")
    sources = {launch.source_key(name): launch.source(name) for name in launch.recipe.sources}
    if launch.run.data.heldout is not None:
        sources["data.heldout"] = launch.run.data.heldout
    for key, source in sources.items():
        parts: list[SourceConfig | PartConfig] = [source, *source.mix.values()]
        files = [file for part in parts for file in _files_of(part)]
        if files:
            yield Need(f"what {key} reads must be where rows are read", _sizes(files), COPY)


def _files_of(part: SourceConfig | PartConfig) -> list[Path]:
    if part.path is not None:
        return data_files(part.path)
    file, named, _ = (part.generator or "").rpartition(":")
    return [Path(file)] if named and file.endswith(".py") else []


def _model(path: str, what: str) -> Need:
    folder = Path(path).expanduser()
    files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES)
    return Need(f"{what}, {path}, must be on every node that reads it", _sizes(files), COPY)


def _sizes(files: list[Path]) -> dict[str, int]:
    return {str(file.absolute()): file.stat().st_size for file in files}
