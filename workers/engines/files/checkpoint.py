"""A training engine on disk, to resume from: safetensors shards that any number of ranks can read.

    actor/  shard-00001-model-....safetensors   what rank 0 holds: weights and Adam's moments, with their offsets
            shard-00002-...
            crc-00001.json ...                  checksum of each rank's files, written after them
            model.json                          whose state this is: names, shapes, version, adapters, source folder
            hf/                                 config and tokenizer, so that the folder can be exported by itself

torch.distributed.checkpoint writes and reads the shards, of FSDP2's DTensors and of ZeRO's flat ranges alike; nothing
is pickled, so nothing in a folder somebody else made can run code. A save copies the state and writes it in
the background, with collectives on a group of its own, while training goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard as FlatShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from rlhf_dist.durable_files import crc_of, sync, write_durably
from rlhf_dist.failure import FailureKind, text_of

SAVE_TIMEOUT_S = 3600.0
"""Longest a background save may take before its collectives give up."""
FRESH_S = 4.0
"""What a network file system may take to show a file that another node has just written."""

HF_FILES = (
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*", "generation_config.json"),
)
"""What belongs to a model folder besides config and weights."""

State = Mapping[str, Tensor | ShardedTensor]


class BrokenCheckpoint(RuntimeError):
    """A checkpoint that is not what was written, or of another model."""

    failure_kind = FailureKind.DATA


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Whose state a folder holds."""

    engine: str
    model: str
    """Class of the model."""
    dtype: str
    """What an export is written in."""
    source: str
    """The model folder training started from; base of adapters."""
    shapes: Mapping[str, Sequence[int]]
    """Of every parameter (and buffer) of the model, adapters included, by its name in memory."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """`FileTensors.as_json`: what an export calls them, and how it cuts them."""
    adapters: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Weight -> names of A and B, the scale of their product, and whether it is transposed."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the adapters."""
    version: int = 0
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named set -> its version, and whether it has the optimizer's state; in the files as NAME/KEY."""


class CheckpointWriter:
    """Background saves of one engine, one at a time."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        self._world, self._rank = world, dist.get_rank(world)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """What background saves talk over; made by the first, since most engines (frozen ones) never save."""
        ranks = dist.get_process_group_ranks(self._world)
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=timedelta(seconds=SAVE_TIMEOUT_S), backend="gloo")
        return group

    def close(self) -> None:
        """End the thread, and let go of the group where no save is under way: a gloo group is a thread of its own,
        which wakes up a hundred times a second until then."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        idle = self._pending is None or self._pending.done()
        if idle and "_group" in vars(self) and dist.is_initialized():
            dist.destroy_process_group(vars(self).pop("_group"))

    def save(self, folder: Path, state: State, card: ModelCard, config: Any, source: Path) -> Future[None]:
        """Copy `state`, then write it to `folder`, which all ranks share; the future ends when all have. Collective.

        Raises FileExistsError if it holds a checkpoint already: shards of two would be read as one; and whatever
        ended an earlier save.
        """
        if self._pending is not None:
            self._pending.result(SAVE_TIMEOUT_S)
        stale = [any(folder.glob("*.safetensors"))]
        dist.broadcast_object_list(stale, group=self._group, group_src=0)
        if stale[0]:
            raise FileExistsError(f"{folder} holds a checkpoint already; save to a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        written = state_dict_saver.async_save(dict(state), storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future), "no stager of its own was asked for"
        self._pending = self._thread.submit(self._finish, written, folder, card, config, source)
        return self._pending

    def _finish(self, written: Future[Any], folder: Path, card: ModelCard, config: Any, source: Path) -> None:
        """Raises BrokenCheckpoint on every rank where one does not read what another wrote."""
        with _plain(folder):
            written.result(SAVE_TIMEOUT_S)
        mine = sorted(folder.glob(f"shard-{self._rank + 1:05d}-*.safetensors"))
        sync(mine)
        sums = {file.name: (file.stat().st_size, crc_of(file)) for file in mine}
        write_durably(folder / sums_name(self._rank), json.dumps(sums))
        if self._rank == 0:
            config.save_pretrained(folder / "hf")
            copy_tokenizer(source, folder / "hf")
            write_durably(folder / "model.json", json.dumps(asdict(card), indent=1))
        dist.barrier(group=self._group)
        # Another rank, where it can on another node, reads it all back: what only its writer sees is not kept.
        ranks = dist.get_world_size(self._group)
        read = folder / sums_name((self._rank + ranks // 2) % ranks)
        _raise_first(_damage(read, FRESH_S) if ranks > 1 else None, folder, self._group)


def sums_name(rank: int) -> str:
    """The file in which a rank says what it wrote: name -> bytes and CRC-32."""
    return f"crc-{rank + 1:05d}.json"


def load(folder: Path, state: State, card: ModelCard, group: dist.ProcessGroup) -> ModelCard:
    """Restore `state` in place from what a save wrote, on any number of ranks; returns its card. Collective.

    Raises FileNotFoundError if there is no checkpoint, BrokenCheckpoint on every rank if a file is missing, cut
    or changed, or if it is of another model than `card` describes.
    """
    saved = read_card(folder)
    problem = _difference(saved, card)
    if problem is None:
        files = sorted(folder.glob("crc-*.json"))[dist.get_rank(group) :: dist.get_world_size(group)]
        problem = next((text for file in files if (text := _damage(file))), None)
    _raise_first(problem, folder, group)
    read_state(folder, state, group)
    return saved


def _raise_first(problem: str | None, folder: Path, group: dist.ProcessGroup) -> None:
    """Raise BrokenCheckpoint on every rank if one has a problem. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    if found := next(filter(None, problems), None):
        raise BrokenCheckpoint(f"{folder}: {found}")


def read_state(folder: Path, state: State, group: dist.ProcessGroup) -> None:
    """Read the tensors of `state` in place, from files that `load` has seen. Collective."""
    with _plain(folder):
        state_dict_loader.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group)


@contextmanager
def _plain(folder: Path) -> Iterator[None]:
    """What the library raises is no Exception, with tracebacks of all ranks: raise the first rank's error alone."""
    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise RuntimeError(f"{folder}, rank {rank}: {text_of(error)}") from error


def read_card(folder: Path) -> ModelCard:
    """The card of a role's checkpoint folder. Raises FileNotFoundError or BrokenCheckpoint."""
    if not (folder / "model.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder} (no model.json there)")
    try:
        return ModelCard(**json.loads((folder / "model.json").read_text()))
    except (ValueError, TypeError) as error:
        raise BrokenCheckpoint(f"{folder}/model.json cannot be read ({error}); use an older checkpoint") from error


def flat_tensor(local: Tensor, ranges: Sequence[tuple[int, int, int]], rank: int) -> ShardedTensor:
    """A flattened parameter of which rank r holds [begin, end) for each (r, begin, end), as DCP takes it.

    local: this rank's elements, [0] if it has none.
    """
    shards = [
        ShardMetadata(shard_offsets=[begin], shard_sizes=[end - begin], placement=f"rank:{r}/{local.device.type}")
        for r, begin, end in ranges
    ]
    size = torch.Size([max(end for _, _, end in ranges)])
    whole = ShardedTensorMetadata(
        shards_metadata=shards, size=size, tensor_properties=TensorProperties(dtype=local.dtype)
    )
    mine = [FlatShard(local, shard) for shard, (r, _, _) in zip(shards, ranges, strict=True) if r == rank]
    return ShardedTensor._init_from_local_shards_and_global_metadata(mine, whole)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what belongs to a model folder besides config and weights."""
    for pattern in HF_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _damage(sums: Path, fresh_s: float = 0.0) -> str | None:
    """What is wrong with a rank's files, as its `sums` say they are; files may take `fresh_s` to be seen."""
    deadline = time.monotonic() + fresh_s
    while (problem := _problem_of(sums)) is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    return problem


def _problem_of(sums: Path) -> str | None:
    try:
        expected = {name: (size, crc) for name, (size, crc) in json.loads(sums.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{sums.name} is missing, cut or not a list of checksums; copy it again or use an older checkpoint"
    for name, (size, crc) in expected.items():
        file = sums.with_name(name)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            return f"{name} {what}; copy it again or use an older checkpoint"
        if crc_of(file) != crc:
            return f"{name} is not what was written (CRC-32 differs); copy it again or use an older checkpoint"
    return None


def _difference(saved: ModelCard, mine: ModelCard) -> str | None:
    if saved.engine != mine.engine:
        return f"engine {saved.engine} wrote it, this is {mine.engine}; set engine={saved.engine}, or export it first"
    if saved.shapes == mine.shapes:
        return None
    names = sorted({*saved.shapes, *mine.shapes}, key=lambda name: (name in saved.shapes and name in mine.shapes, name))
    name = next(name for name in names if saved.shapes.get(name) != mine.shapes.get(name))
    return (
        f"it is of another model: {name} is {saved.shapes.get(name, 'not there')} in it and "
        f"{mine.shapes.get(name, 'not there')} here ({saved.model}, now {mine.model}); resume with the same model.path"
    )
