"""What a training engine holds, on its ranks and on disk: shards, copies under a name, checkpoints, exports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.reshard.checksum import box_checksum, unsigned
from rlhf_dist.reshard.file_tensors import Cut
from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.reshard.shards import Shards, dtype_name
from rlhf_dist.weights_files import export_dtype
from workers.engines.added.lora import Adapter, is_adapter
from workers.engines.added.own_heads import head_name, is_head, write_heads
from workers.engines.files import checkpoint
from workers.engines.files.checkpoint import CheckpointWriter, ModelCard
from workers.engines.files.export import FILE_BYTES, write_model
from workers.engines.files.file_tensors import file_tensors, kept_buffers, parameters_of
from workers.engines.files.rank_state import RankState, copied, put_back
from workers.engines.files.weight_set import WeightSet, copy_state, room_for, sets_of_card
from workers.engines.model.models import RoleModel
from workers.engines.movable import Movable
from workers.engines.training.gather import full_tensors
from workers.engines.training.interface import DevicePart, Use, WeightPart
from workers.engines.training.mesh import TrainingMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EngineWeights(ABC):
    """The weights half of a `TrainingEngine`; `PackedEngine` computes with them."""

    def __init__(
        self,
        module: RoleModel,
        model: ModelConfig,
        engine: EngineConfig,
        optimizer: OptimizerConfig | None,
        mesh: TrainingMesh,
        seed: int,
    ) -> None:
        if engine.dtype not in DTYPES:
            raise ValueError(f"engine.dtype must be one of {', '.join(DTYPES)}, got {engine.dtype!r}")
        self.version = 0
        self.before_use: Callable[[Use], None] = lambda use: None
        self._parts: dict[DevicePart, Movable] | None = None
        self._module, self._folder, self._config, self._optimizer_config = module, Path(model.path), engine, optimizer
        self._mesh, self._device, self._seed = mesh, mesh.device, seed
        self._dtype = DTYPES[engine.dtype]
        self._export_dtype = export_dtype(model.path, engine.export_dtype, engine.dtype)
        self._writer = CheckpointWriter(mesh.world)
        self._adapters: Mapping[str, Adapter] = {}
        self._sets: dict[str, WeightSet] = {}
        self._layouts: dict[str, Layout] = {}
        """Of the adapters, of heads of its own, and of everything else: nothing moves from rank to rank."""
        parameters = parameters_of(module).items()
        held = {name: parameter for name, parameter in parameters if not is_adapter(name) and not is_head(name)}
        held_shapes = {name: tensor.shape for name, tensor in (held | kept_buffers(module.hf)).items()}
        self._files = file_tensors(module.hf, held_shapes)

    def _fill(self) -> None:
        """Read what this rank holds, where the model came without values."""
        weights, self._module.weights = self._module.weights, None
        if weights is not None:
            weights.fill(self.layout("base"), self.local_shards("base"), dist.get_rank(self._mesh.world))
            self._fill_heads()

    def _fill_heads(self) -> None:
        rank, shards = dist.get_rank(self._mesh.world), self.local_shards("heads")
        for name, held in self.layout("heads").parameters.items():
            for box, shard in zip(np.flatnonzero(held.rank == rank), shards[name], strict=True):
                place = tuple(slice(int(a), int(b)) for a, b in held.box(int(box)))
                shard.copy_(self._module.heads_at_start[head_name(name)][place])

    # --- memory ------------------------------------------------------------------------------------
    def device_parts(self) -> Mapping[DevicePart, Movable]:
        """See `TrainingEngine.device_parts`."""
        if self._parts is None:
            self._parts = self._device_parts()
        return self._parts

    def _require_here(self) -> None:
        if self._parts is not None and not self._parts["parameters"].here:
            raise RuntimeError("the parameters must be on their device, and are in host memory; take the turn first")

    # --- weights and files -------------------------------------------------------------------------
    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """See `TrainingEngine.adapters`."""
        file_of = {parameter: name for name, parameter in self._files.same.items()}
        return (
            {file_of[name]: a for name, a in self._adapters.items()} if self._adapters.keys() <= file_of.keys() else {}
        )

    def layout(self, part: WeightPart = "merged") -> Layout:
        """See `TrainingEngine.layout`."""
        return self._file_layout if part in ("merged", "base") else self._held(part)

    def local_shards(self, part: WeightPart = "merged") -> Shards:
        """See `TrainingEngine.local_shards`."""
        self._require_here()
        shards = self._parameter_shards(part)
        if part in ("adapters", "heads"):
            return {name: boxes for name, boxes in shards.items() if is_head(name) == (part == "heads")}
        buffers = {name: [buffer] for name, buffer in kept_buffers(self._module.hf).items()}
        return self._files.shards(self._cuts, {**shards, **buffers})

    @cached_property
    def _file_layout(self) -> Layout:
        return self._files.layout(self._held("base"))

    @cached_property
    def _cuts(self) -> Mapping[str, Sequence[Cut]]:
        return self._files.cuts(self._held("base"), dist.get_rank(self._mesh.world))

    def _held(self, part: WeightPart) -> Layout:
        """What each rank holds, by names in memory: of adapters, heads of its own, or all else (`base`)."""
        if part not in self._layouts:
            held = self._parameter_layout(adapters=part == "adapters")
            parameters = {name: one for name, one in held.parameters.items() if is_head(name) == (part == "heads")}
            buffers = kept_buffers(self._module.hf) if part == "base" else {}
            ranks = np.arange(held.world)
            copies = {
                name: ParameterLayout.from_mesh(tuple(buffer.shape), dtype_name(buffer), ranks, [None])
                for name, buffer in buffers.items()
            }
            self._layouts[part] = Layout(held.world, {**parameters, **copies})
        return self._layouts[part]

    def full_weights(self, dtype: torch.dtype, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """See `TrainingEngine.full_weights`."""
        yield from full_tensors(self.layout(), self.local_shards(), dtype, bucket_bytes, self._mesh.world, self._device)

    def checksums(self, dtype: torch.dtype) -> dict[str, int]:
        """See `TrainingEngine.checksums`."""
        layout, shards, rank = self.layout(), self.local_shards(), dist.get_rank(self._mesh.world)
        sums = torch.zeros(len(layout.parameters), dtype=torch.int64, device=self._device)
        for k, (name, parameter) in enumerate(layout.parameters.items()):
            counted = set(parameter.distinct[0].tolist())
            for box, shard in zip(np.flatnonzero(parameter.rank == rank), shards[name], strict=True):
                if int(box) in counted:  # of copies, the first
                    place = parameter.box(int(box))
                    sums[k] += box_checksum(shard, place, parameter.shape, dtype.itemsize, dtype).to(self._device)
        dist.all_reduce(sums, group=self._mesh.world)
        return {name: unsigned(value) for name, value in zip(layout, sums.tolist(), strict=True)}

    def save(self, folder: Path) -> Future[None]:
        """See `TrainingEngine.save`."""
        self.before_use("update" if self._optimizer_config is not None else "forward")
        return self._writer.save(folder, self._whole_state(), self._card(), self._module.hf.config, self._folder)

    def close(self) -> None:
        """See `TrainingEngine.close`."""
        self._writer.close()

    def load(self, folder: Path) -> None:
        """See `TrainingEngine.load`."""
        self.before_use("update" if self._optimizer_config is not None else "write")
        state = self._with_buffers()
        saved = checkpoint.load(folder, state, self._card(), self._mesh.world)
        self._sets = sets_of_card(saved.sets, state)
        for name, kept in self._sets.items():
            checkpoint.read_state(folder, kept.of_checkpoint(name), self._mesh.world)
        self.version = saved.version
        self._loaded()

    def copy_state(self) -> RankState:
        """See `TrainingEngine.copy_state`."""
        self.before_use("update" if self._optimizer_config is not None else "forward")
        return copied(self._whole_state(), self.version, self._card().sets)

    def put_back(self, copy: RankState) -> None:
        """See `TrainingEngine.put_back`."""
        self.before_use("update" if self._optimizer_config is not None else "write")
        self._sets = sets_of_card(copy.sets, self._with_buffers())
        put_back(copy, self._whole_state())
        self.version = copy.version
        self._loaded()

    def _whole_state(self) -> checkpoint.State:
        """With the named sets."""
        state = dict(self._with_buffers())
        for name, kept in self._sets.items():
            state |= kept.of_checkpoint(name)
        return state

    def weights_written(self) -> None:
        """See `TrainingEngine.weights_written`."""
        self._loaded()

    def save_weights(self, name: str, *, optimizer: bool) -> None:
        """See `TrainingEngine.save_weights`."""
        self.before_use("update" if optimizer else "forward")
        state, before = self._with_buffers(), self._sets.get(name)
        if before is None or before.optimizer != optimizer:
            before = room_for(state, optimizer=optimizer, version=self.version)
        self._sets[name] = replace(before, version=self.version)
        copy_state(state, before.tensors)

    def restore_weights(self, name: str) -> None:
        """See `TrainingEngine.restore_weights`."""
        self.before_use("write")
        kept, state = self._sets[name], self._with_buffers()
        copy_state(kept.tensors, {key: state[key] for key in kept.tensors})
        if kept.optimizer:
            self.version = kept.version
        self._loaded()

    def _with_buffers(self) -> checkpoint.State:
        return {**self._state(), **{f"model.{name}": b for name, b in kept_buffers(self._module.hf).items()}}

    def export(self, folder: Path) -> None:
        """See `TrainingEngine.export`; in `engine.export_dtype`, else that of the weights it started from."""
        self.before_use("forward")
        buckets = self.full_weights(getattr(torch, self._export_dtype), FILE_BYTES)
        hf = self._module.hf
        writes = dist.get_rank(self._mesh.world) == 0
        write_model(folder, buckets, hf.config, self._folder, type(hf).__name__, writes=writes)
        heads = self._whole_heads()
        if writes:
            write_heads(folder, heads)
        dist.barrier(group=self._mesh.world)

    def _whole_heads(self) -> dict[str, Tensor]:
        layout, shards = self.layout("heads"), self.local_shards("heads")
        whole = full_tensors(layout, shards, torch.float32, FILE_BYTES, self._mesh.world, self._device)
        return {head_name(name): weight for bucket in whole for name, weight in bucket}

    def _card(self) -> ModelCard:
        """Whose state a checkpoint of this engine is."""
        lora = self._config.lora
        return ModelCard(
            engine=self._config.name,
            model=type(self._module.hf).__name__,
            dtype=self._export_dtype,
            source=str(self._folder.resolve()),
            shapes={name: list(shape) for name, shape in {**self._files.shapes, **self._shapes()}.items()},
            files=self._files.as_json(),
            adapters={name: [a.down, a.up, a.scale, a.transposed] for name, a in self._adapters.items()},
            lora=asdict(lora) if lora is not None and self._adapters else {},
            version=self.version,
            sets={name: {"version": kept.version, "optimizer": kept.optimizer} for name, kept in self._sets.items()},
        )

    # --- what engines differ in --------------------------------------------------------------------
    @abstractmethod
    def _parameter_layout(self, *, adapters: bool) -> Layout:
        """What each rank holds of the adapters, or of the other parameters, by names in memory. Collective."""

    @abstractmethod
    def _parameter_shards(self, part: WeightPart) -> Shards:
        """This rank's boxes of it."""

    @property
    @abstractmethod
    def gradient_bytes(self) -> int:
        """See `TrainingEngine.gradient_bytes`."""

    @abstractmethod
    def _device_parts(self) -> dict[DevicePart, Movable]:
        """What is on the device between steps."""

    @abstractmethod
    def _shapes(self) -> Mapping[str, Sequence[int]]:
        """Whole shape of every parameter, adapters included."""

    @abstractmethod
    def _state(self) -> checkpoint.State:
        """What a checkpoint holds: trained parameters and Adam's moments, as views that a load writes to."""

    @abstractmethod
    def _loaded(self) -> None:
        """Bring everything else in line with the state and `version` that were loaded."""
